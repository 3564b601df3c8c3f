"""Files of ``torch.save`` (the zip format, and the legacy format of torch before 1.6), and TorchScript archives.

The files are read without `torch.load`. Its restricted unpickler runs no foreign code, but it believes what it is told:
it allocates the storages that a legacy file merely claims, enlarges storages to the shapes of the tensors that view
them, never checks a checksum, and refuses whole files for an inert object beside the weights. Here, the pickle is read
as plain data and the tensors are read from the file, so that opening reads headers only, in all formats.
"""

from __future__ import annotations

import io
import sys
import zipfile
import zlib
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kcomplex.sources.formats.content import MAX_HEADER_BYTES, check_whole, is_torch_archive, kind_of, zip_names
from kcomplex.sources.formats.guard import Refused, brief, check_distinct, guarded
from kcomplex.sources.formats.pytorch_pickle import (
    PickledTree,
    StoredTensor,
    is_packed,
    read_pickle,
    script_module,
    stored_tensor,
)
from kcomplex.sources.formats.stored_file import StoredFile
from kcomplex.sources.networks import find_network
from kcomplex.sources.state_dicts import beside, merge_shared
from kcomplex.weights import DTYPES, SkippedTensor, TensorHandle, Weights, dtype_name, word_dtype

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# `torch.serialization.MAGIC_NUMBER` and `PROTOCOL_VERSION`, with which a legacy file begins.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x1
# A view may repeat its storage's elements (stride 0). Beyond this size, it may not be larger than the storage.
_EXPANDED_BYTES = 1 << 26


class PyTorchFile:
    """One file of ``torch.save`` or ``torch.jit.save``: whatever holds the tensors of one network."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether the file is a pickle or a torch archive, or is called like one and is nothing else known."""
        kind = kind_of(path)
        if kind == "pickle":
            return True
        named = path.suffix in _SUFFIXES and path.is_file()
        if kind == "zip":
            names = zip_names(path)
            return is_torch_archive(names) or (named and not names)
        return kind == "unknown" and named

    @staticmethod
    def open(path: Path, root: str = "") -> Weights:
        """Return the weights, reading the pickle and the table of contents only.

        Raises
        ------
        FormatError
            The file is broken, holds no network or several (see `find_network`), or claims more than it holds.
        """
        with guarded(path), ExitStack() as stack:
            file = StoredFile(path)
            stack.callback(file.close)
            kind = kind_of(path)
            if kind == "unknown":
                head = file.head(8).read().hex(" ")
                raise Refused(f"begins with {head}, as no file of torch.save does, nor any other that is known")
            contents = _archive(path, file) if kind == "zip" else _legacy(file)
            handles, skipped = _handles(path, contents, root)
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

    file: StoredFile
    value: Any
    regions: dict[str, _Region]
    swapped: bool = False


def _handles(path: Path, contents: _Contents, root: str) -> tuple[list[TensorHandle], list[SkippedTensor]]:
    tree = PickledTree()
    entries, skipped = find_network(tree, contents.value, root)
    verified: set[str] = set()
    handles: list[tuple[Hashable, TensorHandle]] = []
    for name, (value, role) in entries.items():
        with guarded(path, name):
            shape, kind = tree.shape(value), tree.kind(value)
            if shape is None:
                skipped.append(SkippedTensor(name, f"not a tensor but {kind}", role="other"))
                continue
            tensor = stored_tensor(value)
            if isinstance(tensor, str):
                unread = "packed" if is_packed(value) else ""
                skipped.append(SkippedTensor(name, tensor, shape or None, kind, unread if role == "weight" else role))
                continue
            dtype = dtype_name(tensor.dtype)
            if dtype not in DTYPES:
                skipped.append(
                    SkippedTensor(
                        name, f"dtype {dtype} isn't supported", tensor.shape, dtype, role.removeprefix("weight")
                    )
                )
                continue
            region = _checked_region(tensor, contents)
            read = _Reader(path, name, tensor, contents, region, verified)
            handle = TensorHandle(
                name,
                tensor.shape,
                tensor.dtype,
                read,
                load_range=read.part if tensor.is_contiguous else None,
                role=role,
            )
            handles.append((beside(handle, tensor if handle.elements else name), handle))
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
            f"shape {brief(str(tensor.shape))} with strides {brief(str(tensor.strides))} from element {tensor.offset} "
            f"of {dtype_name(tensor.dtype)} is more than the {region.nbytes:,} bytes of its storage"
        )
    nbytes = tensor.elements * tensor.dtype.itemsize
    if nbytes > max(region.nbytes, _EXPANDED_BYTES):
        raise Refused(f"shape {brief(str(tensor.shape))} repeats {region.nbytes:,} bytes until they are {nbytes:,}")
    return region


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads a tensor, or a part of one that lies in its storage as it is."""

    path: Path
    name: str
    tensor: StoredTensor
    contents: _Contents
    region: _Region
    verified: set[str]

    def __call__(self) -> torch.Tensor:
        tensor = self.tensor
        with guarded(self.path, self.name):
            values = self._elements(0, tensor.span)
            values = values.as_strided(tensor.shape, tensor.strides) if tensor.elements else values.view(tensor.shape)
            if tensor.conjugated:
                values = values.conj()
            return values.neg() if tensor.negated else values

    def part(self, start: int, stop: int) -> torch.Tensor:
        with guarded(self.path, self.name):
            return self._elements(start, stop)

    def _elements(self, start: int, stop: int) -> torch.Tensor:
        """Return elements of the storage, counted from the tensor's first."""
        contents, storage, dtype = self.contents, self.tensor.storage, self.tensor.dtype
        if storage.key not in self.verified:
            _verify(contents.file, self.region)
            self.verified.add(storage.key)
        first = self.region.offset + (self.tensor.offset + start) * dtype.itemsize
        values = contents.file.elements(first, stop - start, dtype)
        if contents.swapped:
            values.view(torch.uint8).numpy().view(word_dtype(dtype)).byteswap(inplace=True)
        return values


def _verify(file: StoredFile, region: _Region) -> None:
    """Refuse a storage whose bytes don't have the checksum that was written with them."""
    if not region.checksum:
        return
    checksum = 0
    for chunk in file.chunks(region.offset, region.nbytes):
        checksum = zlib.crc32(chunk.data, checksum)
    if checksum != region.checksum:
        raise Refused(f"corrupted: its bytes have the checksum {checksum:08x} instead of {region.checksum:08x}")


def _archive(path: Path, file: StoredFile) -> _Contents:
    """Return the contents of a zip file."""
    with zipfile.ZipFile(path) as archive:
        check_whole(archive, path)
        members = archive.infolist()
    # torch looks records up without regard to case.
    check_distinct([member.filename.casefold() for member in members])
    prefix = members[0].filename.partition("/")[0] + "/" if members else ""
    records = {member.filename.removeprefix(prefix): member for member in members if member.filename.startswith(prefix)}
    if "data.pkl" not in records:
        raise Refused("a zip file without the record data.pkl: torch.save didn't write it")
    order = _small_record(file, records["byteorder"]).decode() if "byteorder" in records else "little"
    if order not in ("little", "big"):
        raise Refused(f"unknown byte order {order!r:.50}")
    value, _ = read_pickle(io.BytesIO(_small_record(file, records["data.pkl"])), "data/")
    if "constants.pkl" in records:
        constants, _ = read_pickle(io.BytesIO(_small_record(file, records["constants.pkl"])), "constants/")
        value = script_module(value, constants)
    regions = {
        name: _region(file, member) for name, member in records.items() if name.startswith(("data/", "constants/"))
    }
    return _Contents(file, value, regions, swapped=order != sys.byteorder)


def _region(file: StoredFile, member: zipfile.ZipInfo) -> _Region:
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


def _small_record(file: StoredFile, member: zipfile.ZipInfo) -> bytes:
    region = _region(file, member)
    if region.nbytes > MAX_HEADER_BYTES:
        raise Refused(f"the record {member.filename!r:.100} has {region.nbytes:,} bytes, which no plain weights need")
    _verify(file, region)
    return file.window(region.offset, region.nbytes).tobytes()


def _legacy(file: StoredFile) -> _Contents:
    """Return the contents of a file that is a row of pickles, followed by the storages."""
    stream = file.head(MAX_HEADER_BYTES)
    if not _is_number(read_pickle(stream)[0], _LEGACY_MAGIC):
        raise Refused("a pickle, but not one of torch.save; nothing of it was run. Save its arrays with numpy.savez")
    if not _is_number(read_pickle(stream)[0], _LEGACY_PROTOCOL):
        raise Refused("a protocol of torch.save that isn't known")
    read_pickle(stream)  # The writer's byte order and type sizes; the format itself is little-endian.
    value, storages = read_pickle(stream)
    keys, _ = read_pickle(stream)
    offset = stream.tell()
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or len(keys) != len(storages)
        or set(keys) != storages.keys()
    ):
        raise Refused("the pickle is corrupted: the storages that it uses aren't the ones that are there")
    regions = {}
    for key in keys:
        elements = int.from_bytes(file.window(offset, 8).tobytes(), "little", signed=True)
        nbytes = elements * storages[key].dtype.itemsize
        file.check(offset + 8, nbytes)
        regions[key] = _Region(offset + 8, nbytes)
        offset += 8 + nbytes
    if offset != file.size:
        raise Refused(
            f"{file.size - offset:,} bytes follow the storages: if several objects were saved to one file, save each "
            "to a file of its own"
        )
    return _Contents(file, value, regions, swapped=sys.byteorder != "little")


def _is_number(value: object, number: int) -> bool:
    return isinstance(value, int) and value == number
