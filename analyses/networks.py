"""Small networks by specification string, such as ``mlp:hidden=128+64``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn

from kcomplex.errors import SpecError, UnknownNameError
from kcomplex.spec import configure, spec_of

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Network(ABC):
    """A recipe for a classifier of images of shape (channels, height, width)."""

    name: ClassVar[str]

    @property
    def spec(self) -> str:
        """Specification string that builds this recipe again."""
        return spec_of(self)

    @abstractmethod
    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return a freshly initialised network: inputs (n, *input_shape) to logits (n, classes), both float32.

        Raises
        ------
        SpecError
            The network can't take inputs of this shape.
        """


@dataclass(frozen=True)
class MLP(Network):
    """Fully connected layers with ReLU between them.

    Parameters
    ----------
    hidden
        Widths of the hidden layers, from the input on; none makes a linear classifier.
    """

    hidden: tuple[int, ...] = (128,)
    name: ClassVar[str] = "mlp"

    def __post_init__(self) -> None:
        _check_widths(self.name, "hidden", self.hidden)

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        return nn.Sequential(nn.Flatten(), *_dense((math.prod(input_shape), *self.hidden, classes)))


@dataclass(frozen=True)
class LeNet300(Network):
    """LeNet-300-100 (LeCun et al. 1998): 266,610 parameters for 28x28 images and ten classes."""

    name: ClassVar[str] = "lenet300"

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        return MLP((300, 100)).build(input_shape, classes)


@dataclass(frozen=True)
class LeNet5(Network):
    """LeNet-5 as Caffe has it (20 and 50 feature maps, 500 units, ReLU): 431,080 parameters for 28x28 images."""

    name: ClassVar[str] = "lenet5"

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        channels, height, width = input_shape
        # Twice: a 5x5 kernel without padding takes four rows and columns, pooling half of what is left.
        height, width = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        if min(height, width) < 1:
            raise SpecError(f"lenet5 needs images of 16x16 or more, not {input_shape}: take convnet or mlp")
        return nn.Sequential(
            nn.Conv2d(channels, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            *_dense((50 * height * width, 500, classes)),
        )


@dataclass(frozen=True)
class ConvNet(Network):
    """3x3 convolutions, each with ReLU and halving by max pooling, then one linear layer.

    Parameters
    ----------
    channels
        Feature maps of each convolution; as many halvings as convolutions.
    """

    channels: tuple[int, ...] = (16, 32)
    name: ClassVar[str] = "convnet"

    def __post_init__(self) -> None:
        _check_widths(self.name, "channels", self.channels)
        if not self.channels:
            raise SpecError("convnet: channels must name at least one convolution: write for example channels=16+32")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        channels, height, width = input_shape
        halvings = len(self.channels)
        if min(height, width) >> halvings < 1:
            raise SpecError(f"{self.spec}: images of shape {input_shape} can't be halved {halvings} times")
        layers: list[nn.Module] = []
        for before, after in pairwise((channels, *self.channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        features = self.channels[-1] * (height >> halvings) * (width >> halvings)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


NETWORKS: dict[str, type[Network]] = {cls.name: cls for cls in (MLP, LeNet300, LeNet5, ConvNet)}


def network(spec: str) -> Network:
    """Return the recipe of a specification string.

    Raises
    ------
    SpecError
        An option is unknown or wrong.
    UnknownNameError
        No network has this name.

    Examples
    --------
    >>> network("mlp:hidden=128+64").hidden
    (128, 64)
    """
    built: Network = configure(_load, spec)
    return built


def _load(name: str) -> Any:
    if name not in NETWORKS:
        raise UnknownNameError(f"no network is called {name!r}. Known: {', '.join(sorted(NETWORKS))}")
    return NETWORKS[name]


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


def _check_widths(name: str, field: str, widths: tuple[int, ...]) -> None:
    if any(width < 1 for width in widths):
        raise SpecError(f"{name}: {field} must be positive, not {'+'.join(map(str, widths))}")
