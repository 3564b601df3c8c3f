"""The parameters that a mode with ``include=*`` prices are those that published networks are said to have."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from kcomplex.training.protocol.mode import WEIGHT_LAYERS, chosen_parameters


def convolution(before: int, after: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, kernel, bias=False), nn.BatchNorm2d(after)]


def resnet50() -> nn.Module:
    """Only the layers, as He et al. 2015 (arXiv:1512.03385), table 1, has them, with projections where maps change."""
    layers = convolution(3, 64, 7)
    for (before, after), blocks in zip(pairwise((64, 256, 512, 1024, 2048)), (3, 4, 6, 3), strict=True):
        inner = after // 4
        layers += convolution(before, after, 1)
        for block in range(blocks):
            layers += convolution(after if block else before, inner, 1)
            layers += convolution(inner, inner, 3)
            layers += convolution(inner, after, 1)
    return nn.Sequential(*layers, nn.Linear(2048, 1000))


def byte_transformer() -> nn.Module:
    """Ten blocks of width 1600 on bytes, as arXiv:2505.17469 has them: the two norms of a block are one."""
    blocks = [nn.TransformerEncoderLayer(1600, 25, 6400) for _ in range(10)]
    for block in blocks:
        block.norm2 = block.norm1
    return nn.Sequential(nn.Embedding(256, 1600), *blocks, nn.LayerNorm(1600), nn.Linear(1600, 256))


@pytest.mark.parametrize(
    ("build", "count"), [(resnet50, 25_557_032), (byte_transformer, 308_198_656)], ids=["resnet50", "byte_transformer"]
)
def test_every_parameter_is_chosen_once(build, count):
    with torch.device("meta"):
        model = build()
    chosen = chosen_parameters(model, WEIGHT_LAYERS, "*", ())
    assert sum(getattr(module, name).numel() for module, name, _ in chosen) == count
