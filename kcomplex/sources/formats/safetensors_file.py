"""Safetensors files.

The safetensors library maps files into memory, where whoever shortens one ends the process that reads it; so their
headers are read here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kcomplex.errors import WeightsError
from kcomplex.sources.formats.content import MAX_HEADER_BYTES, kind_of
from kcomplex.sources.formats.guard import Refused, check_distinct, check_shape, guarded
from kcomplex.sources.formats.stored_file import StoredFile
from kcomplex.sources.state_dicts import below
from kcomplex.weights import OTHER_BITS, SkippedTensor, TensorHandle, Weights, dtype_name

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
    """One ``.safetensors`` file."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether the file starts like safetensors, or is called so and starts like nothing known."""
        kind = kind_of(path)
        return kind == "safetensors" or (kind == "unknown" and path.suffix == ".safetensors" and path.is_file())

    @staticmethod
    def open(path: Path, root: str = "") -> Weights:
        """Return the weights, reading the header only.

        Raises
        ------
        FormatError
            The header is broken, or doesn't fit the file.
        """
        with guarded(path), ExitStack() as stack:
            file = StoredFile(path)
            stack.callback(file.close)
            tensors, skipped, end = [], [], 0
            header, start = _header(file)
            # The format allows no gap between tensors, and none twice: nothing hides in a file.
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                with guarded(path, name):
                    first, last = entry["data_offsets"]
                    if first != end:
                        raise Refused(f"its bytes begin at {first:,} and not at {end:,}, where the ones before end")
                    end = last
                    shape, code = tuple(entry["shape"]), entry["dtype"]
                    check_shape(shape)
                    if code not in _DTYPES and code not in OTHER_BITS:
                        raise Refused(f"its dtype {code!r:.50} isn't known")
                    bits = OTHER_BITS.get(code) or 8 * _DTYPES[code].itemsize
                    if 8 * (last - first) != bits * math.prod(shape):
                        raise Refused(f"{last - first:,} bytes aren't what shape {shape} of {code} takes")
                if code in _DTYPES:
                    tensors.append(_handle(path, file, name, shape, _DTYPES[code], start + first))
                else:
                    skipped.append(SkippedTensor(name, f"dtype {code} isn't supported", shape, code))
            if start + end != file.size:
                why = "truncated" if start + end > file.size else "something follows"
                raise Refused(f"{why}: its tensors end at {start + end:,}, and the file has {file.size:,} bytes")
            resources = stack.pop_all()
        return below(Weights(tensors, skipped, str(path), resources), root)


def _header(file: StoredFile) -> tuple[dict[str, Any], int]:
    """Return the entry of each tensor, and where their data starts."""
    size = int.from_bytes(file.window(0, 8).tobytes(), "little")
    if size > MAX_HEADER_BYTES:
        raise Refused(f"its header claims {size:,} bytes")
    # The last of two tensors of one name would win.
    header = json.loads(file.window(8, size).tobytes().decode(), object_pairs_hook=_distinct)
    if not isinstance(header, dict):
        raise Refused("its header isn't a table of tensors")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Refused("its metadata isn't a table of texts")
    for name, entry in header.items():
        match entry:
            case {"dtype": str(), "shape": list(shape), "data_offsets": [int(first), int(last)]} if (
                0 <= first <= last <= file.size and all(type(length) is int for length in shape)
            ):
                continue
        raise Refused(f"the entry of the tensor {name!r:.100} makes no sense, or the file is truncated")
    return header, 8 + size


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_distinct([name for name, _ in pairs])
    return dict(pairs)


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


def _handle(
    path: Path, file: StoredFile, name: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int
) -> TensorHandle:
    @guarded(path, name)
    def load() -> torch.Tensor:
        return load_range(0, math.prod(shape)).view(shape)

    @guarded(path, name)
    def load_range(start: int, stop: int) -> torch.Tensor:
        return file.elements(offset + start * dtype.itemsize, stop - start, dtype)

    return TensorHandle(name, shape, dtype, load, load_range=load_range)
