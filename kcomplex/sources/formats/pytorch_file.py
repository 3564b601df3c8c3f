"""Files of ``torch.save``: the zip format, and the legacy format of torch before 1.6.

The files are read without `torch.load`. Its restricted unpickler runs no foreign code, but it believes what it is told:
it allocates the storages that a legacy file merely claims, enlarges storages to the shapes of the tensors that view
them, and never checks a checksum. Here, the pickle is read as plain data and the tensors are mapped from the file, so
that opening reads headers only, in both formats.
"""

from __future__ import annotations

import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kcomplex.sources.formats.content import MAX_HEADER_BYTES, is_torch_archive, kind_of, zip_names
from kcomplex.sources.formats.guard import Refused, check_distinct, guarded
from kcomplex.sources.formats.mapped_file import MappedFile
from kcomplex.sources.formats.pytorch_pickle import StoredTensor, find_state_dict, read_pickle, stored_tensor
from kcomplex.sources.state_dicts import merge_shared
from kcomplex.weights import DTYPES, SkippedTensor, TensorHandle, Weights, dtype_name, tensor_from_words, word_dtype

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# `torch.serialization.MAGIC_NUMBER` and `PROTOCOL_VERSION`, with which a legacy file begins.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x1
_CHUNK_BYTES = 1 << 26
# A view may repeat its storage's elements (stride 0). Beyond this size, it may not be larger than the storage.
_EXPANDED_BYTES = 1 << 26


class PyTorchFile:
    """One file of ``torch.save``: a state dict, a checkpoint that holds one, a tensor, or a list of tensors."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether the file is a pickle or a torch archive, or is called like one and is nothing else known."""
        kind = kind_of(path)
        if kind == "pickle":
            return True
        named = path.suffix in _SUFFIXES and path.is_file()
        if kind == "zip":
            names = zip_names(path)
            return is_torch_archive(names) or (named and not any(name.endswith(".npy") for name in names))
        return kind == "unknown" and named

    @staticmethod
    def open(path: Path) -> Weights:
        """Return the weights, reading the pickle and the table of contents only.

        Raises
        ------
        FormatError
            The file is broken, isn't plain weights, or claims more than it holds.
        """
        with guarded(path), ExitStack() as stack:
            file = MappedFile(path)
            stack.callback(file.close)
            contents = _archive(path, file) if kind_of(path) == "zip" else _legacy(file)
            handles, skipped = _handles(path, contents)
            resources = stack.pop_all()
        return Weights(handles, skipped, str(path), resources)


@dataclass(frozen=True)
class _Region:
    """Where a storage's bytes lie in the file, and their CRC-32 (0: none was written)."""

    offset: int
    nbytes: int
    checksum: int = 0


@dataclass(frozen=True)
class _Contents:
    """What a file describes, before any tensor is read."""

    file: MappedFile
    value: Any
    regions: dict[str, _Region]
    swapped: bool = False


def _handles(path: Path, contents: _Contents) -> tuple[list[TensorHandle], list[SkippedTensor]]:
    entries, skipped = find_state_dict(contents.value)
    verified: set[str] = set()
    handles: list[tuple[Hashable, TensorHandle]] = []
    for name, value in entries.items():
        with guarded(path, name):
            tensor = stored_tensor(value)
            if isinstance(tensor, str):
                skipped.append(SkippedTensor(name, tensor))
                continue
            dtype = dtype_name(tensor.dtype)
            if dtype not in DTYPES:
                skipped.append(SkippedTensor(name, f"dtype {dtype} isn't supported", tensor.shape, dtype))
                continue
            region = _checked_region(tensor, contents)
            load = _reader(path, name, tensor, contents, region, verified)
            handle = TensorHandle(name, tensor.shape, tensor.dtype, load)
            handles.append((tensor if handle.elements else name, handle))
    return merge_shared(handles), skipped


def _checked_region(tensor: StoredTensor, contents: _Contents) -> _Region:
    """Return where the tensor's storage lies, after checking what is claimed about it."""
    storage = tensor.storage
    region = contents.regions.get(storage.key)
    if region is None:
        raise Refused(f"its storage {storage.key!r:.100} isn't in the file")
    if region.nbytes != storage.nbytes:
        raise Refused(
            f"its storage {storage.key!r:.100} claims {storage.nbytes:,} bytes, but {region.nbytes:,} are there"
        )
    if (tensor.offset + tensor.span) * tensor.dtype.itemsize > region.nbytes and tensor.elements:
        raise Refused(
            f"shape {tensor.shape} with strides {tensor.strides} from element {tensor.offset} of "
            f"{dtype_name(tensor.dtype)} is more than the {region.nbytes:,} bytes of its storage"
        )
    nbytes = tensor.elements * tensor.dtype.itemsize
    if nbytes > max(region.nbytes, _EXPANDED_BYTES):
        raise Refused(f"shape {tensor.shape} repeats {region.nbytes:,} bytes until they are {nbytes:,}")
    return region


def _reader(
    path: Path, name: str, tensor: StoredTensor, contents: _Contents, region: _Region, verified: set[str]
) -> Callable[[], torch.Tensor]:
    @guarded(path, name)
    def load() -> torch.Tensor:
        if tensor.storage.key not in verified:
            _verify(contents.file, region)
            verified.add(tensor.storage.key)
        if not tensor.elements:
            return tensor_from_words(np.empty(0, np.uint8), tensor.dtype, tensor.shape)
        width = tensor.dtype.itemsize
        start = region.offset + tensor.offset * width
        data = contents.file.window(start, tensor.span * width)
        if contents.swapped:
            data = data.view(word_dtype(tensor.dtype)).byteswap().view("u1")
        elif start % width:
            # Compiled kernels can't read at odd addresses; legacy files have no alignment.
            data = data.copy()
        values = torch.from_numpy(data).view(tensor.dtype).as_strided(tensor.shape, tensor.strides)
        if tensor.conjugated:
            values = values.conj()
        return values.neg() if tensor.negated else values

    return load


def _verify(file: MappedFile, region: _Region) -> None:
    """Refuse a storage whose bytes don't have the checksum that was written with them."""
    if not region.checksum:
        return
    checksum = 0
    for start in range(0, region.nbytes, _CHUNK_BYTES):
        chunk = file.window(region.offset + start, min(_CHUNK_BYTES, region.nbytes - start))
        checksum = zlib.crc32(chunk.data, checksum)
    if checksum != region.checksum:
        raise Refused(f"corrupted: its bytes have the checksum {checksum:08x} instead of {region.checksum:08x}")


def _archive(path: Path, file: MappedFile) -> _Contents:
    """Return the contents of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    # torch looks records up without regard to case.
    check_distinct([member.filename.casefold() for member in members])
    prefix = members[0].filename.partition("/")[0] + "/" if members else ""
    records = {member.filename.removeprefix(prefix): member for member in members if member.filename.startswith(prefix)}
    if "data.pkl" not in records:
        raise Refused("a zip file without the record data.pkl: torch.save didn't write it")
    if "constants.pkl" in records:
        raise Refused("a TorchScript archive, which is a program: save the module's state_dict() and measure that")
    value, _ = read_pickle(io.BytesIO(_small_record(file, records["data.pkl"])))
    order = _small_record(file, records["byteorder"]).decode() if "byteorder" in records else "little"
    if order not in ("little", "big"):
        raise Refused(f"unknown byte order {order!r:.50}")
    regions = {
        name.removeprefix("data/"): _region(file, member)
        for name, member in records.items()
        if name.startswith("data/")
    }
    return _Contents(file, value, regions, swapped=order != sys.byteorder)


def _region(file: MappedFile, member: zipfile.ZipInfo) -> _Region:
    """Return where a record's bytes lie."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
        raise Refused(f"the record {member.filename!r:.100} is compressed or encrypted, which torch.save never does")
    if member.file_size != member.compress_size:
        raise Refused(f"the record {member.filename!r:.100} claims two sizes")
    header = file.window(member.header_offset, _LOCAL_HEADER_BYTES).tobytes()
    if header[:4] != b"PK\x03\x04":
        raise Refused(f"the record {member.filename!r:.100} isn't where the table of contents says")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = member.header_offset + _LOCAL_HEADER_BYTES + names
    file.check(offset, member.file_size)
    return _Region(offset, member.file_size, member.CRC)


def _small_record(file: MappedFile, member: zipfile.ZipInfo) -> bytes:
    region = _region(file, member)
    if region.nbytes > MAX_HEADER_BYTES:
        raise Refused(f"the record {member.filename!r:.100} has {region.nbytes:,} bytes, which no plain weights need")
    _verify(file, region)
    return file.window(region.offset, region.nbytes).tobytes()


def _legacy(file: MappedFile) -> _Contents:
    """Return the contents of a file that is a row of pickles, followed by the storages."""
    with file.stream(MAX_HEADER_BYTES) as stream:
        if read_pickle(stream)[0] != _LEGACY_MAGIC:
            raise Refused("a pickle, but not one of torch.save; nothing of it was run")
        if read_pickle(stream)[0] != _LEGACY_PROTOCOL:
            raise Refused("a protocol of torch.save that isn't known")
        read_pickle(stream)  # The writer's byte order and type sizes; the format itself is little-endian.
        value, storages = read_pickle(stream)
        keys, _ = read_pickle(stream)
        offset = stream.tell()
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise Refused("the pickle is corrupted: the storages that it uses aren't the ones that are there")
    regions = {}
    for key in keys:
        elements = int.from_bytes(file.window(offset, 8).tobytes(), "little", signed=True)
        nbytes = elements * storages[key].dtype.itemsize
        file.check(offset + 8, nbytes)
        regions[key] = _Region(offset + 8, nbytes)
        offset += 8 + nbytes
    if offset != file.size:
        raise Refused(f"{file.size - offset:,} bytes follow the storages")
    return _Contents(file, value, regions, swapped=sys.byteorder != "little")
