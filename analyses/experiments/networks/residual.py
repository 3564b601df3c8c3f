"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad, relu


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to the block's input.

    Where the block has more maps than its input, the input is taken at every ``stride``-th place and filled up with
    maps of zeros: the shortcut has no parameters (He et al., option A).
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride = stride
        self.new_maps = after - before

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Return (n, after, height / stride, width / stride), sides rounded up."""
        added = self.bn2(self.conv2(relu(self.bn1(self.conv1(maps)))))
        shortcut = pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_maps))
        return relu(shortcut + added)


class ResidualNetwork(nn.Sequential):
    """A stem, stages of residual blocks, each but the first halving the sides, and a linear layer of averaged maps.

    Parameters
    ----------
    channels, classes
        Of the images.
    blocks
        Of a stage.
    widths
        Feature maps of each stage; none has fewer than the one before.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun: Deep residual learning for image recognition. arXiv:1512.03385, 2015, section 4.2.
    """

    def __init__(self, channels: int, classes: int, blocks: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        before = widths[0]
        for number, width in enumerate(widths, 1):
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(ResidualBlock(before, width, stride=2 if number > 1 and block == 0 else 1))
                before = width
            self.add_module(f"stage{number}", stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
