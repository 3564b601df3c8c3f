"""Safetensors files: laziness, dtypes without a torch dtype, odd layouts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from kcomplex.sources.open import open_weights


def test_dtypes_that_cant_be_measured_are_skipped_with_a_reason(tmp_path: Path, hostile_module: ModuleType) -> None:
    entry = hostile_module.tensor_entry
    header = {
        "w": entry("U8", (3,), 0, 3),
        "four": entry("F4", (4,), 3, 5),
        "six": entry("F6_E2M3", (4,), 5, 8),
        "__metadata__": {"format": "pt"},
    }
    (tmp_path / "x.safetensors").write_bytes(hostile_module.safetensors(header, bytes(8)))
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert list(weights) == ["w"]
        assert [(item.name, item.reason, item.shape, item.dtype) for item in weights.skipped] == [
            ("four", "dtype F4 isn't supported", (4,), "F4"),
            ("six", "dtype F6_E2M3 isn't supported", (4,), "F6_E2M3"),
        ]
        assert (weights.coverage.nbytes, weights.coverage.of_bytes) == (3, 8)


def test_a_sparse_file_opens_without_reading(tmp_path: Path, hostile_module: ModuleType) -> None:
    path, size = tmp_path / "x.safetensors", 2**31
    header = {
        "big": hostile_module.tensor_entry("F32", (2**29,), 0, size),
        "small": hostile_module.tensor_entry("F32", (1,), size, size + 4),
    }
    with path.open("wb") as file:
        text = json.dumps(header).encode()
        file.write(hostile_module.safetensors(text + b" " * (-len(text) % 8)))
        file.seek(size, 1)
        file.write(struct.pack("<f", 7))
    with open_weights(path) as weights:
        assert weights.nbytes == size + 4
        assert weights["small"].values().tolist() == [7]
        assert weights["big"].read()[-1] == 0


def test_tensors_at_odd_addresses(tmp_path: Path, hostile_module: ModuleType) -> None:
    values = np.arange(5, dtype=np.float64)
    header = {
        "a": hostile_module.tensor_entry("U8", (1,), 0, 1),
        "b": hostile_module.tensor_entry("F64", (5,), 1, 41),
    }
    (tmp_path / "x.safetensors").write_bytes(hostile_module.safetensors(header, b"\x01" + values.tobytes()))
    with open_weights(tmp_path / "x.safetensors") as weights:
        tensor = weights["b"].read()
        assert tensor.data_ptr() % 8 == 0
        assert torch.equal(tensor, torch.from_numpy(values))


def test_a_header_that_begins_like_a_pickle(tmp_path: Path, hostile_module: ModuleType) -> None:
    header = {"w": hostile_module.tensor_entry("U8", (3,), 0, 3)}
    text = str(header).replace("'", '"').encode()
    text += b" " * (0x280 - len(text))
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile_module.safetensors(text, b"abc"))
    assert path.read_bytes().startswith(b"\x80\x02")
    with open_weights(path) as weights:
        assert bytes(weights["w"].words()) == b"abc"
