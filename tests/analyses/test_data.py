"""Data sets: the idx format, checksums, splits."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kcomplex.analyses.experiments.data import data
from kcomplex.analyses.experiments.data.idx import read_idx
from kcomplex.errors import DataError, SpecError

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
    with pytest.raises(DataError, match="digits, mnist, fashion-mnist, cifar10-jpeg, tinyshakespeare, hf:NAME"):
        data.load("cifar")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_published_files_are_what_they_should_be(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} isn't here")
    dataset = data.load(name, SHARED)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [55_000, 5_000, 10_000]
    assert dataset.input_shape == (1, 28, 28)


def jpeg(colour: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, size, (colour,) * 3 if mode == "RGB" else colour).save(file, "JPEG")
    return file.getvalue()


def enormous() -> bytes:
    """Return a small file whose header says that there are 65,535 x 65,535 pixels."""
    content = jpeg(1)
    sides = content.index(b"\xff\xc0") + 5
    return content[:sides] + b"\xff" * 4 + content[sides + 4 :]


def jpegs() -> dict[str, bytes]:
    """Return eight images of three classes for training and two for testing, each class of another brightness."""
    files = {}
    for part, count in (("train", 8), ("test", 2)):
        for place, kind in enumerate(("bird", "airplane", "truck")):
            files |= {f"{part}/{kind}/{number:04}.jpg": jpeg(60 * place + 3 * number) for number in range(count)}
    return files


def packed(files: dict[str, bytes], compression: str = "xz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def few_jpegs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_IMAGES_PER_CLASS", {"train": 8, "test": 2})
    monkeypatch.setattr(data, "_JPEG_VALIDATION", 6)


@pytest.mark.usefixtures("few_jpegs")
@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tar.xz"])
def test_jpegs_are_read_from_a_folder_or_an_archive(tmp_path: Path, kind: str) -> None:
    where = tmp_path / "cifar10-jpeg"
    where.mkdir()
    # In an archive, a folder of its own around them does no harm; neither do other files.
    files = {"README.md": b"pictures", "other/bird/0001.jpg": b"", **jpegs()}
    if kind == "folder":
        for name, content in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            write(where / name, content)
    else:
        files = {f"CIFAR-10-images/{name}": content for name, content in reversed(files.items())}
        write(where / f"images.{kind}", packed(files, kind.removeprefix("tar").removeprefix(".")))
    dataset = data.load("cifar10-jpeg", tmp_path)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [18, 6, 6]
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # By class in alphabetical order: airplane, bird, truck.
    brightness = dataset.test.inputs.mean((1, 2, 3)) * 255
    torch.testing.assert_close(brightness, torch.tensor([60.0, 63, 0, 3, 120, 123]), atol=1.5, rtol=0)


@pytest.mark.usefixtures("few_jpegs")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files | {"train/bird/0003.jpg": files["train/bird/0003.jpg"][:-200]}, "0003.jpg can't be read"),
        (lambda files: files | {"train/bird/0003.jpg": b""}, "0003.jpg can't be read"),
        (lambda files: files | {"train/bird/0003.jpg": b"GIF89a" + bytes(99)}, "0003.jpg can't be read"),
        (lambda files: files | {"train/bird/0003.jpg": jpeg(1, (33, 32))}, "0003.jpg is 33x32 in mode RGB"),
        (lambda files: files | {"train/bird/0003.jpg": enormous()}, "0003.jpg can't be read"),
        (lambda files: files | {"train/bird/0003.jpg": jpeg(1, mode="L")}, "0003.jpg is 32x32 in mode L"),
        (lambda files: files | {"train/bird/0008.jpg": jpeg(1)}, "train/bird has 9 images, not 8"),
        (lambda files: {name: files[name] for name in files if name != "test/bird/0001.jpg"}, "test/bird has 1 images"),
        (lambda files: {name: files[name] for name in files if "test/bird" not in name}, "test/bird has 0 images"),
        (lambda files: {"README.md": b""}, "holds no images called train/CLASS"),
    ],
)
def test_jpegs_that_are_broken_or_missing_are_told(tmp_path: Path, damage: Any, message: str) -> None:
    write(tmp_path / "images.tar.xz", packed(damage(jpegs())))
    with pytest.raises(DataError, match=message) as refusal:
        data.load("cifar10-jpeg", tmp_path)
    assert "images.tar.xz" in str(refusal.value)


@pytest.mark.usefixtures("few_jpegs")
@pytest.mark.parametrize("kind", ["", "gz", "xz"])
@pytest.mark.parametrize("length", [0, 0.3, 0.7])
def test_a_broken_archive_of_jpegs_is_told(tmp_path: Path, kind: str, length: float) -> None:
    content = packed(jpegs(), kind)
    write(tmp_path / "images.tar", content[: int(length * len(content))])
    with pytest.raises(DataError, match=r"images\.tar"):
        data.load("cifar10-jpeg", tmp_path)


def test_a_folder_without_jpegs_says_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither images\.tar nor JPEG files\. Get .*CIFAR-10-images"):
        data.load("cifar10-jpeg", tmp_path)


def play(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(data, "_TEXT_CHECKSUM", hashlib.md5(text.encode()).hexdigest())
    return write(folder / "input.txt", text.encode())


@pytest.mark.parametrize("window", [1, 3, 7, 49])
def test_a_text_is_predicted_character_by_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    characters = np.random.default_rng(0).integers(0, 26, 1003)
    play(tmp_path / "tinyshakespeare", monkeypatch, "".join(chr(97 + c) for c in characters))
    dataset = data.load(f"tinyshakespeare:window={window}", tmp_path)
    assert dataset.classes == 26
    assert dataset.input_shape == (window,)
    # The last tenth for testing, the twentieth before it for validation.
    for split, start, end in ((dataset.train, 0, 853), (dataset.validation, 853, 903), (dataset.test, 903, 1003)):
        count = (end - start - 1) // window
        assert split.predictions == count * window
        np.testing.assert_array_equal(split.inputs.flatten(), characters[start : start + count * window])
        np.testing.assert_array_equal(split.labels.flatten(), characters[start + 1 : start + 1 + count * window])


def test_a_text_must_be_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = play(tmp_path, monkeypatch, "to be or not to be" * 9)
    with pytest.raises(SpecError, match="window must be below 8"):
        data.load("tinyshakespeare", tmp_path)
    for content, message in ((b"to be", "not the published"), (b"\xff\xfe", "isn't UTF-8")):
        write(file, content)
        with pytest.raises(DataError, match=message):
            data.load("tinyshakespeare", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="char-rnn"):
        data.load("tinyshakespeare", tmp_path)


@pytest.mark.parametrize("spec", ["tinyshakespeare:window=0", "tinyshakespeare:length=3", "tinyshakespeare:"])
def test_wrong_options_of_a_data_set_are_refused(spec: str) -> None:
    with pytest.raises(SpecError):
        data.load(spec)


def test_the_published_text_is_what_it_should_be() -> None:
    if not (SHARED / "tinyshakespeare").is_dir():
        pytest.skip(f"{SHARED / 'tinyshakespeare'} isn't here")
    dataset = data.load("tinyshakespeare:window=100", SHARED)
    assert dataset.classes == 65
    assert [split.predictions for split in (dataset.train, dataset.validation, dataset.test)] == [948000, 55700, 111500]


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


def test_data_are_looked_for_beside_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KCOMPLEX_DATA", raising=False)
    if (SHARED / "mnist").is_dir():
        assert data._folder("mnist", None) == SHARED / "mnist"
    monkeypatch.setitem(data._SOURCES, "absent", "it nowhere")
    with pytest.raises(DataError) as refused:
        data._folder("absent", None)
    assert f"no such data in {SHARED}." in str(refused.value)
