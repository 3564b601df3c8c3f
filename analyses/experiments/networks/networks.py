"""Small networks by specification string, such as ``mlp:hidden=128+64``: of images, and of characters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

from torch import nn

from kcomplex.errors import SpecError, UnknownNameError
from kcomplex.estimators.spec import configure, spec_of

from .residual import ResidualNetwork
from .transformer import CharacterModel, VisionTransformer

# (channels, height, width) of images, (length,) of windows of characters.
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Network(ABC):
    """A recipe for a classifier of images of shape (channels, height, width), or of windows of characters.

    Attributes
    ----------
    axes
        Number of axes of an input: three of an image, one of a window.
    """

    name: ClassVar[str]
    axes: ClassVar[int] = 3

    @property
    def spec(self) -> str:
        """Specification string that builds this recipe again."""
        return spec_of(self)

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return a freshly initialised network, by PyTorch's global generator.

        It takes images (n, *input_shape), float32, to logits (n, classes); or characters (n, length), int64, to logits
        (n, length, classes) of the ones that follow.

        Raises
        ------
        SpecError
            The network can't take inputs of this shape.
        """
        if len(input_shape) != self.axes:
            kinds = {1: "characters", 3: "images"}
            fitting = sorted(name for name, cls in NETWORKS.items() if cls.axes == len(input_shape))
            raise SpecError(
                f"{self.name} takes {kinds[self.axes]}, not inputs of shape {tuple(input_shape)}. "
                f"What takes those: {', '.join(fitting) or 'nothing'}"
            )
        return self.construct(input_shape, classes)

    @abstractmethod
    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network of inputs with the right number of axes; see `build`."""


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

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        return nn.Sequential(nn.Flatten(), *_dense((math.prod(input_shape), *self.hidden, classes)))


@dataclass(frozen=True)
class LeNet300(Network):
    """LeNet-300-100 (LeCun et al. 1998): 266,610 parameters for 28x28 images and ten classes."""

    name: ClassVar[str] = "lenet300"

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        return MLP((300, 100)).construct(input_shape, classes)


@dataclass(frozen=True)
class LeNet5(Network):
    """LeNet-5 as Caffe has it (20 and 50 feature maps, 500 units, ReLU): 431,080 parameters for 28x28 images."""

    name: ClassVar[str] = "lenet5"

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
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

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
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


@dataclass(frozen=True)
class VGG16(Network):
    """VGG-16 for small images: 15,253,578 parameters for three channels of 32x32 and ten classes.

    The thirteen 3x3 convolutions of Simonyan & Zisserman 2014 (arXiv:1409.1556, column D), with the batch
    normalisation, two hidden linear layers of 512 and dropout of 0.4 that arXiv:2505.17469 has on CIFAR-10; where to
    drop isn't told there: here, before every linear layer. Pooling halves the sides five times; odd ones are rounded
    up.

    Parameters
    ----------
    width
        Feature maps of the first convolutions; up to eight times as many follow, and the hidden linear layers are as
        wide as the last.
    dropout
        Probability of dropping an input of a linear layer, in [0, 1).
    """

    width: int = 64
    dropout: float = 0.4
    name: ClassVar[str] = "vgg16"

    def __post_init__(self) -> None:
        _check_widths(self.name, "width", (self.width,))
        if not 0 <= self.dropout < 1:
            raise SpecError(f"vgg16: dropout must be in [0, 1), not {self.dropout}")

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        before, height, width = input_shape
        layers: list[nn.Module] = []
        for wider, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            maps = wider * self.width
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, maps, 3, padding=1), nn.BatchNorm2d(maps), nn.ReLU()]
                before = maps
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        layers.append(nn.Flatten())
        features = before * math.ceil(height / 32) * math.ceil(width / 32)
        for inputs in (features, before):
            layers += [nn.Dropout(self.dropout), nn.Linear(inputs, before), nn.ReLU()]
        return nn.Sequential(*layers, nn.Dropout(self.dropout), nn.Linear(before, classes))


@dataclass(frozen=True)
class ResNet20(Network):
    """ResNet-20 for small images (He et al. 2015): 269,722 parameters for three channels and ten classes.

    Parameters
    ----------
    width
        Feature maps of the first stage; twice and four times as many follow.
    """

    width: int = 16
    name: ClassVar[str] = "resnet20"

    def __post_init__(self) -> None:
        _check_widths(self.name, "width", (self.width,))

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        return ResidualNetwork(input_shape[0], classes, blocks=3, widths=(self.width, 2 * self.width, 4 * self.width))


@dataclass(frozen=True)
class _Transformer(Network):
    """A transformer: blocks of attention and two layers four times as wide, with norms before both.

    Parameters
    ----------
    width, depth, heads
        Of the vectors, of the stack of blocks, and of attention; the width is a multiple of the heads.
    """

    width: int = 64
    depth: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        for field in ("width", "depth", "heads"):
            _check_widths(self.name, field, (getattr(self, field),))
        if self.width % self.heads:
            raise SpecError(f"{self.name}: width must be a multiple of heads={self.heads}, not {self.width}")


@dataclass(frozen=True)
class ViT(_Transformer):
    """A vision transformer (Dosovitskiy et al. 2020) whose patches are averaged at the end.

    Parameters
    ----------
    width, depth, heads
        Of the patches' vectors, of the stack of blocks, and of attention; the width is a multiple of the heads.
    patch
        Side of a patch; images are filled up with zeros to whole patches.
    """

    patch: int = 4
    name: ClassVar[str] = "vit"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_widths(self.name, "patch", (self.patch,))

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        channels, height, width = input_shape
        return VisionTransformer(
            channels, (height, width), classes, self.patch, self.width, depth=self.depth, heads=self.heads
        )


@dataclass(frozen=True)
class GPT(_Transformer):
    """A generative transformer of characters (Radford et al. 2019), its output layer tied to its embedding.

    Parameters
    ----------
    width, depth, heads
        Of the characters' vectors, of the stack of blocks, and of attention; the width is a multiple of the heads.
        What it can look back on is a window of the data set.
    """

    name: ClassVar[str] = "gpt"
    axes: ClassVar[int] = 1

    def construct(self, input_shape: Shape, classes: int) -> nn.Module:
        """Return the network; see `Network.build`."""
        return CharacterModel(classes, input_shape[0], self.width, depth=self.depth, heads=self.heads)


NETWORKS: dict[str, type[Network]] = {
    cls.name: cls for cls in (MLP, LeNet300, LeNet5, ConvNet, VGG16, ResNet20, ViT, GPT)
}


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
