"""Image data sets by name, each split once and for all into training, validation and test images.

Choices (when to prune, which settings) are made on the validation images; the test images are only reported on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.analyses.idx import read_idx
from kcomplex.errors import DataError

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
_SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/ (or use hf:ylecun/mnist)",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist (or use hf:zalando-datasets/fashion_mnist)",
}
NAMES = ("digits", *_CHECKSUMS)


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes
    ----------
    inputs
        float32 in [0, 1], shape (n, channels, height, width).
    labels
        int64, shape (n,).
    """

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

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
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.inputs.shape[1:]
        return channels, height, width

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
        of 28x28), or ``hf:NAME`` for an image classification set of the Hugging Face hub.
    folder
        Where the idx files lie (raw or gzipped), directly or in a subfolder called like the data set. By default the
        environment variable ``KCOMPLEX_DATA``, else the folder ``shared/data`` beside a checkout.

    Raises
    ------
    DataError
        The data set isn't known or isn't there, its files are broken, or their MD5 isn't the published one.
    """
    if name == "digits":
        return _digits()
    if name in _CHECKSUMS:
        return _idx_set(name, folder)
    if name.startswith(_HUGGING_FACE):
        return _hugging_face(name)
    raise DataError(f"no data set is called {name!r}. Known: {', '.join(NAMES)}, hf:NAME (Hugging Face hub)")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = _split((images / 16).reshape(-1, 8, 8), labels)
    rest, test = _part(whole, 450)
    train, validation = _part(rest, 150)
    return Dataset("digits", train, validation, test, classes=10)


def _idx_set(name: str, folder: str | os.PathLike[str] | None) -> Dataset:
    where = _folder(name, folder)
    arrays = {stem: read_idx(_idx_file(where, stem, name), md5) for stem, md5 in _CHECKSUMS[name].items()}
    whole, test = (
        _split(_scaled(arrays[f"{part}-images-idx3-ubyte"]), arrays[f"{part}-labels-idx1-ubyte"])
        for part in ("train", "t10k")
    )
    train, validation = _part(whole, 5000)
    return Dataset(name, train, validation, test, classes=10)


def _folder(name: str, folder: str | os.PathLike[str] | None) -> Path:
    default = os.environ.get(FOLDER_VARIABLE)
    beside_checkout = Path(__file__).parents[2] / "shared" / "data"
    base = Path(folder or default or beside_checkout)
    if (base / name).is_dir():
        return base / name
    if base.is_dir() and (folder or default):
        return base
    raise DataError(
        f"{name}: no such data in {base}. Get the four idx files from {_SOURCES[name]} and say where they are with "
        f"--data-dir or {FOLDER_VARIABLE}"
    )


def _idx_file(folder: Path, stem: str, name: str) -> Path:
    for file in (folder / stem, folder / f"{stem}.gz"):
        if file.is_file():
            return file
    raise DataError(f"{name}: {folder} holds neither {stem} nor {stem}.gz. Get them from {_SOURCES[name]}")


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
    whole, test = (_split(_images(name, parts[part][image]), parts[part][label]) for part in ("train", "test"))
    train, validation = _part(whole, len(whole) // 12)
    return Dataset(name, train, validation, test, parts["train"].features[label].num_classes)


def _columns(name: str, features: Any) -> tuple[str, str]:
    """Return the image column and the label column of a Hugging Face data set, of which there must be one each."""
    found = []
    for kind in ("Image", "ClassLabel"):
        columns = [column for column, feature in features.items() if type(feature).__name__ == kind]
        if len(columns) != 1:
            raise DataError(f"{name}: must have one column of type {kind}, has {len(columns)} ({', '.join(features)})")
        found.append(columns[0])
    return found[0], found[1]


def _images(name: str, pictures: Any) -> NDArray[np.float32]:
    """Return pictures as (n, channels, height, width) or (n, height, width), scaled to [0, 1]."""
    arrays = [np.asarray(picture) for picture in pictures]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1 or any(array.dtype != np.uint8 for array in arrays):
        raise DataError(f"{name}: its images aren't all of one shape in 8 bits a channel")
    stacked = _scaled(np.stack(arrays))
    return stacked.transpose(0, 3, 1, 2) if stacked.ndim == 4 else stacked


def _scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.divide(images, 255, dtype=np.float32)


def _split(images: NDArray[Any], labels: Any) -> Split:
    """Return images (n, height, width) or (n, channels, height, width), already scaled, with their labels."""
    if len(images) != len(labels):
        raise DataError(f"{len(images):,} images don't go with {len(labels):,} labels")
    inputs = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if inputs.ndim == 3:
        inputs = inputs.unsqueeze(1)
    return Split(inputs, torch.from_numpy(np.array(labels, dtype=np.int64)))


def _part(whole: Split, held_out: int) -> tuple[Split, Split]:
    """Return the images that stay and a fixed random choice of images that are held out."""
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    kept, out = order[held_out:], order[:held_out]
    return Split(whole.inputs[kept], whole.labels[kept]), Split(whole.inputs[out], whole.labels[out])
