"""The way from a path to a reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from kcomplex.errors import FormatError, SourceNotFoundError
from kcomplex.sources.open import open_weights


@pytest.mark.parametrize("source", ["https://example.org/model.safetensors", "hf://owner/model", "s3://bucket/x.pt"])
def test_addresses_are_refused_with_advice(source: str) -> None:
    with pytest.raises(FormatError, match="download it") as caught:
        open_weights(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.pt", "null\0character", "file/inside.pt"])
def test_a_path_to_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceNotFoundError, match="no such file or folder"):
        open_weights(str(tmp_path / name))


def test_a_name_that_the_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="can't be read"):
        open_weights(tmp_path / ("x" * 5000))


def test_devices_are_not_read() -> None:
    with pytest.raises(FormatError, match="device"):
        open_weights("/dev/zero")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(FormatError, match=r"notes\.txt: a file of no known format\. Known: huggingface, npy"):
        open_weights(tmp_path / "notes.txt")
