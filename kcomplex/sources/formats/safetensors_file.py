"""Safetensors files, through the safetensors library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kcomplex.errors import WeightsError
from kcomplex.sources.formats.content import MAX_HEADER_BYTES, kind_of
from kcomplex.sources.formats.guard import check_distinct, check_shape, guarded
from kcomplex.weights import SkippedTensor, TensorHandle, Weights, dtype_name

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# What stands beside the tensors in a header, under a name that none of them can have.
_METADATA = "__metadata__"


class SafetensorsFile:
    """One ``.safetensors`` file, memory-mapped."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether the file starts like safetensors, or is called so and starts like nothing known."""
        kind = kind_of(path)
        return kind == "safetensors" or (kind == "unknown" and path.suffix == ".safetensors" and path.is_file())

    @staticmethod
    def open(path: Path) -> Weights:
        """Return the weights, reading the header only.

        Raises
        ------
        FormatError
            The header is broken, or doesn't fit the file.
        """
        with guarded(path), ExitStack() as stack:
            file = stack.enter_context(safe_open(path, framework="pt"))
            # The library lets the last of two tensors of one name win.
            _refuse_duplicates(path)
            tensors, skipped = [], []
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                entry = file.get_slice(name)
                shape, code = tuple(entry.get_shape()), entry.get_dtype()
                with guarded(path, name):
                    check_shape(shape)
                if code in _DTYPES:
                    tensors.append(TensorHandle(name, shape, _DTYPES[code], _reader(path, file, name)))
                else:
                    skipped.append(SkippedTensor(name, f"dtype {code} isn't supported", shape, code))
            resources = stack.pop_all()
        return Weights(tensors, skipped, str(path), resources)


def original_layout(path: Path) -> tuple[dict[str, str], tuple[str, ...]] | None:
    """Return the metadata of a safetensors file and its names in the order of their data; None for any other file.

    The order is empty where it is that in which the safetensors library writes.
    """
    if not SafetensorsFile.recognises(path):
        return None
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop(_METADATA, {})
    dtypes = {name: _DTYPES[entry["dtype"]] for name, entry in header.items() if entry["dtype"] in _DTYPES}
    order = sorted(dtypes, key=lambda name: header[name]["data_offsets"])
    usual = sorted(dtypes, key=lambda name: _library_rank(name, dtypes[name]))
    return metadata, () if order == usual else tuple(order)


def safetensors_header(
    layout: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str], order: Sequence[str]
) -> tuple[bytes, dict[str, int]]:
    """Return the beginning of a safetensors file, and where each tensor's data stands after it, in bytes.

    Parameters
    ----------
    layout
        Name, dtype and shape of each tensor.
    metadata
        Texts by name.
    order
        Names in the order of their data; those that aren't in it follow, all in the safetensors library's order if
        it is empty.

    Raises
    ------
    WeightsError
        Safetensors files can't hold such a dtype or name, or so many of them.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    ranks = {name: rank for rank, name in enumerate(order)}
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    for name, dtype, shape in sorted(
        layout, key=lambda item: (ranks.get(item[0], len(ranks)), _library_rank(*item[:2]))
    ):
        if dtype not in codes or name == _METADATA:
            problem = f"the name {name!r}" if dtype in codes else f"{dtype_name(dtype)} (the tensor {name!r})"
            raise WeightsError(f"safetensors files can't hold {problem}: write a .pt file")
        offsets[name] = position
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise WeightsError(f"the names and shapes of {len(offsets)} tensors are too long for a safetensors file")
    return len(text).to_bytes(8, "little") + text, offsets


def _library_rank(name: str, dtype: torch.dtype) -> tuple[int, str]:
    """Return the key by which tensors are sorted: widest words first, which keeps every tensor aligned."""
    return -dtype.itemsize, name


def _refuse_duplicates(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    json.loads(header, object_pairs_hook=lambda pairs: check_distinct([name for name, _ in pairs]))


def _reader(path: Path, file: Any, name: str) -> Callable[[], torch.Tensor]:
    @guarded(path, name)
    def load() -> torch.Tensor:
        tensor: torch.Tensor = file.get_tensor(name)
        # Headers of other writers leave tensors at odd addresses, which compiled kernels can't read.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    return load
