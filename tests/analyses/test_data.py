"""Data sets: the idx format, checksums, splits."""

from __future__ import annotations

import gzip
import hashlib
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kcomplex.analyses import data
from kcomplex.analyses.idx import read_idx
from kcomplex.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@given(arrays.arrays(np.uint8, arrays.array_shapes(max_dims=4, max_side=5)), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_idx_file_gives_back_its_array(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray[Any, Any], packed: bool
) -> None:
    content = idx(array)
    path = write(tmp_path_factory.mktemp("idx") / "array", gzip.compress(content) if packed else content)
    np.testing.assert_array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\0\0\x08", "not an idx file"),
        (b"PNG." + bytes(40), "not an idx file"),
        (b"\0\0\x0d\1" + struct.pack(">I", 1) + bytes(4), "type 13"),
        (b"\0\0\x08\0", "0 dimensions"),
        (b"\0\0\x08\xff" + bytes(2000), "255 dimensions"),
        (idx(IMAGES)[:9], "inside its header"),
        (idx(IMAGES)[:-1], "23 of the 24"),
        (idx(IMAGES) + b"x", "more than the 24"),
        (b"\0\0\x08\3" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1), "can't hold"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_idx_file_is_refused(tmp_path: Path, content: bytes, message: str, packed: bool) -> None:
    path = write(tmp_path / "broken", gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message) as refusal:
        read_idx(path)
    assert str(path) in str(refusal.value)


def test_a_header_that_lies_within_what_gzip_could_hold_is_refused(tmp_path: Path) -> None:
    content = b"\0\0\x08\1" + struct.pack(">I", 20_000) + bytes(100)
    with pytest.raises(DataError, match="100 of the 20,000"):
        read_idx(write(tmp_path / "lying.gz", gzip.compress(content)))


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-12], lambda packed: packed[:20] + b"\xff" * 8 + packed[28:]]
)
def test_a_broken_gzip_stream_is_refused(tmp_path: Path, damage: Any) -> None:
    packed = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (20, 9), dtype=np.uint8)))
    with pytest.raises(DataError, match=r"gzip stream is broken|of the 180|not an idx|can't hold"):
        read_idx(write(tmp_path / "broken.gz", damage(packed)))


def test_the_checksum_is_that_of_the_decompressed_file(tmp_path: Path) -> None:
    content = idx(IMAGES)
    md5 = hashlib.md5(content).hexdigest()
    for packed in (content, gzip.compress(content)):
        np.testing.assert_array_equal(read_idx(write(tmp_path / "images", packed), md5), IMAGES)
    with pytest.raises(DataError, match=f"MD5 {md5}, not the published"):
        read_idx(write(tmp_path / "images", content), "0" * 32)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_idx(tmp_path / "absent")


def test_digits_are_split_the_same_way_every_time() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert [len(split) for split in (first.train, first.validation, first.test)] == [1197, 150, 450]
    assert first.input_shape == (1, 8, 8)
    assert first.train.inputs.dtype == torch.float32
    assert first.train.labels.dtype == torch.int64
    assert 0 == first.train.inputs.min() < first.train.inputs.max() == 1
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(second, split).inputs)
        assert set(getattr(first, split).labels.tolist()) == set(range(10))


def test_the_splits_are_the_whole_data_set_once() -> None:
    from sklearn.datasets import load_digits

    dataset = data.load("digits")
    images, labels = load_digits(return_X_y=True)
    parts = (dataset.train, dataset.validation, dataset.test)
    found = np.concatenate([np.c_[part.inputs.reshape(len(part), -1) * 16, part.labels] for part in parts])
    expected = np.c_[images, labels]
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def small_set(folder: Path, monkeypatch: pytest.MonkeyPatch, labels: int = 6000) -> None:
    """Write an idx set of 6,000 + 10 images of 2x2 whose pixels are their label, under MNIST's name."""
    sums = {}
    for part, images in (("train", 6000), ("t10k", 10)):
        values = np.arange(images, dtype=np.uint8) % 10
        files = {
            f"{part}-images-idx3-ubyte": np.broadcast_to(values[:, None, None], (images, 2, 2)),
            f"{part}-labels-idx1-ubyte": values[: labels if part == "train" else images],
        }
        for name, array in files.items():
            content = idx(array)
            sums[name] = hashlib.md5(content).hexdigest()
            write(folder / f"{name}.gz", gzip.compress(content))
    monkeypatch.setitem(data._CHECKSUMS, "mnist", sums)


@pytest.mark.parametrize("subfolder", [".", "mnist"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_an_idx_set_is_found_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subfolder: str, by_environment: bool
) -> None:
    (tmp_path / subfolder).mkdir(exist_ok=True)
    small_set(tmp_path / subfolder, monkeypatch)
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path if by_environment else tmp_path / "elsewhere"))
    dataset = data.load("mnist", None if by_environment else tmp_path)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [1000, 5000, 10]
    for split in (dataset.train, dataset.validation, dataset.test):
        torch.testing.assert_close(split.inputs[:, 0, 1, 1] * 255, split.labels.float())


def test_a_file_of_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_set(tmp_path, monkeypatch)
    write(tmp_path / "t10k-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(10, np.uint8))))
    with pytest.raises(DataError, match="not the published"):
        data.load("mnist", tmp_path)


def test_labels_must_go_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_set(tmp_path, monkeypatch, labels=5999)
    with pytest.raises(DataError, match="6,000 images don't go with 5,999 labels"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("exists", [False, True])
def test_missing_data_says_where_it_was_sought_and_where_to_get_it(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "data"
    if exists:
        folder.mkdir()
    with pytest.raises(DataError, match=r"https://") as refusal:
        data.load("fashion-mnist", folder)
    assert str(folder) in str(refusal.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="digits, mnist, fashion-mnist, hf:NAME"):
        data.load("cifar")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_published_files_are_what_they_should_be(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} isn't here")
    dataset = data.load(name, SHARED)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [55_000, 5_000, 10_000]
    assert dataset.input_shape == (1, 28, 28)


class Image:
    """Stands for the Hugging Face feature of this name, which is recognised by it."""


class ClassLabel:
    """Stands for the Hugging Face feature of this name, which is recognised by it."""

    num_classes = 3


class Part(dict[str, Any]):
    """A split of a Hugging Face data set: columns, and their features."""

    features: ClassVar[dict[str, Any]] = {"image": Image(), "label": ClassLabel()}


def hub(monkeypatch: pytest.MonkeyPatch, **parts: Part) -> None:
    module = ModuleType("datasets")
    module.load_dataset = lambda name: parts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def pictures(count: int, shape: tuple[int, ...] = (4, 5, 3)) -> Part:
    return Part(image=[np.full(shape, 10 * i, np.uint8) for i in range(count)], label=[i % 3 for i in range(count)])


def test_a_hugging_face_set_is_read_with_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, train=pictures(24), test=pictures(6))
    dataset = data.load("hf:someone/pictures")
    assert dataset.input_shape == (3, 4, 5)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [22, 2, 6]
    assert dataset.classes == 3
    torch.testing.assert_close(dataset.test.inputs[5].mean(), torch.tensor(50 / 255))


def test_a_hugging_face_set_without_test_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, train=pictures(24))
    with pytest.raises(DataError, match="no test split"):
        data.load("hf:someone/pictures")


def test_hugging_face_images_of_several_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = Part(image=pictures(3)["image"] + pictures(3, (5, 5, 3))["image"], label=[0] * 6)
    hub(monkeypatch, train=mixed, test=pictures(2))
    with pytest.raises(DataError, match="one shape"):
        data.load("hf:someone/pictures")


def test_a_hugging_face_set_with_two_image_columns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    part = pictures(24)
    monkeypatch.setattr(part, "features", {"left": Image(), "right": Image(), "label": ClassLabel()}, raising=False)
    hub(monkeypatch, train=part, test=part)
    with pytest.raises(DataError, match="one column of type Image, has 2"):
        data.load("hf:someone/pictures")


def test_a_hugging_face_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no route"):
        data.load("hf:someone/pictures")


def test_a_missing_hugging_face_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'kcomplex\[datasets\]'"):
        data.load("hf:ylecun/mnist")
