"""Factories that recipes name in the tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

CALLED = "KCOMPLEX_TEST_CALLED"


def two_layers(width: int = 30) -> nn.Module:
    """A small network; leaves a file behind where the environment asks for it, so that a test sees whether it ran."""
    if CALLED in os.environ:
        Path(os.environ[CALLED]).touch()
    return nn.Sequential(nn.Linear(20, width), nn.BatchNorm1d(width), nn.Linear(width, 5))


def state_dict() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(40, 30)}


def broken() -> nn.Module:
    raise RuntimeError("no such network")


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to what goes in."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2016) with the names, shapes and initialisation that it has in torchvision; no forward."""
    model = nn.Module()
    model.conv1, model.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
    width_in = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        blocks = nn.Sequential(Block(width_in, width, 1 if stage == 1 else 2), Block(width, width, 1))
        setattr(model, f"layer{stage}", blocks)
        width_in = width
    model.fc = nn.Linear(512, 1000)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return model


def ending() -> nn.Module:
    """End the program."""
    raise SystemExit(3)


def nothing() -> None:
    """Return no network."""
