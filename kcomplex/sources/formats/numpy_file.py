"""NumPy's ``.npy`` and ``.npz`` files. Pickled objects in them are never loaded."""

from __future__ import annotations

import ast
import io
import math
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from kcomplex.sources.formats.content import check_whole, is_torch_archive, kind_of, zip_names
from kcomplex.sources.formats.guard import Refused, check_distinct, check_shape, guarded
from kcomplex.sources.formats.stored_file import StoredFile
from kcomplex.sources.state_dicts import below
from kcomplex.weights import DTYPES, SkippedTensor, TensorHandle, Weights

# As many as NumPy takes; more are never read.
_HEADER_LETTERS = 10_000
_HEADER_BYTES = 1 << 14
_CHUNK_BYTES = 1 << 20
# Deflate makes at most 1032 bytes of one (and a little at the ends); a member that claims more lies.
_DEFLATE_LIMIT = 1032
_ENCRYPTED = 0x1
# An .npy file doesn't name its array.
_NAME = "tensor"


class NpyFile:
    """One ``.npy`` file: a single tensor called ``tensor``."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether the file starts like ``.npy``, or is called so and starts like nothing known."""
        kind = kind_of(path)
        return kind == "npy" or (kind == "unknown" and path.suffix == ".npy" and path.is_file())

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
            header = _read_header(file.head(_HEADER_BYTES))
            if not header.reason:
                header.check_size(file.size)
            resources = stack.pop_all()
        if header.reason:
            return Weights((), [header.skipped(_NAME)], str(path), resources)
        read, part = _window_readers(path, file, header)
        handle = TensorHandle(_NAME, header.shape, header.torch_dtype, read, load_range=part)
        return below(Weights([handle], (), str(path), resources), root)


class NpzFile:
    """One ``.npz`` file: a zip of ``.npy`` files, each read when it is asked for."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether the file is a zip of ``.npy`` members, or is called ``.npz`` and is nothing else known."""
        kind = kind_of(path)
        if kind == "zip":
            names = zip_names(path)
            by_content = any(name.endswith(".npy") for name in names)
            return (by_content or (path.suffix == ".npz" and not names)) and not is_torch_archive(names)
        return kind == "unknown" and path.suffix == ".npz" and path.is_file()

    @staticmethod
    def open(path: Path, root: str = "") -> Weights:
        """Return the weights, reading the headers of the members only.

        Raises
        ------
        FormatError
            The zip file or a header is broken, or a member claims more than its compressed bytes can hold.
        """
        with guarded(path), ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(path))
            check_whole(archive, path)
            size = path.stat().st_size
            check_distinct(archive.namelist())
            tensors, skipped = [], []
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with guarded(path, name):
                    _check_member(member, size)
                    with archive.open(member) as file:
                        head = file.read(_HEADER_BYTES)
                    if name == member.filename:
                        skipped.append(SkippedTensor(name, "not an array but another kind of file"))
                        continue
                    header = _read_header(io.BytesIO(head))
                    if header.reason:
                        skipped.append(header.skipped(name))
                        continue
                    header.check_size(member.file_size)
                load = _member_reader(path, archive, member, name, header)
                tensors.append(TensorHandle(name, header.shape, header.torch_dtype, load))
            resources = stack.pop_all()
        return below(Weights(tensors, skipped, str(path), resources), root)


@dataclass(frozen=True)
class _Header:
    """An ``.npy`` header; `offset` is where the data starts, `reason` why it can't be measured (or empty)."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def reason(self) -> str:
        if self.dtype.hasobject:
            return "object arrays are pickles, which are never loaded"
        if self.is_bfloat16 or self.dtype.name in DTYPES:
            return ""
        kind = " (structured, or an extension type such as float8)" if self.dtype.kind == "V" else ""
        return f"dtype {self.dtype.str if kind else self.dtype.name}{kind} isn't supported"

    @property
    def is_bfloat16(self) -> bool:
        """Whether elements are two nameless bytes: so NumPy writes bfloat16, the only such type of ml_dtypes."""
        return self.dtype.str == "|V2" and self.dtype.names is None and self.dtype.subdtype is None

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_bfloat16 else DTYPES[self.dtype.name]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def skipped(self, name: str) -> SkippedTensor:
        return SkippedTensor(name, self.reason, self.shape, self.dtype.name)

    def check_size(self, size: int) -> None:
        """Refuse an array that doesn't fill its file of `size` bytes exactly."""
        there = size - self.offset
        if there < self.nbytes:
            raise Refused(
                f"truncated: shape {self.shape} of {self.dtype} takes {self.nbytes:,} bytes, but {there:,} are there"
            )
        if there > self.nbytes:
            raise Refused(f"{there - self.nbytes:,} bytes follow the array of shape {self.shape} and {self.dtype}")

    def tensor(self, data: NDArray[np.uint8], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor of bytes of the array, sharing their memory where it can."""
        array = data.view("<u2" if self.is_bfloat16 else self.dtype)
        if not array.dtype.isnative:
            array = array.byteswap().view(array.dtype.newbyteorder("="))
        return torch.from_numpy(array.reshape(shape, order="F" if self.fortran else "C")).view(self.torch_dtype)


def _read_header(file: IO[bytes]) -> _Header:
    """Return the header at the beginning of an array.

    NumPy's own function cuts a header that is no literal into tokens, for some in exponential time.
    """
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise Refused(f"version {version} of the npy format isn't known")
    length = 2 if version == (1, 0) else 4
    size = int.from_bytes(file.read(length), "little")
    text = file.read(size)
    if len(text) < size or size > _HEADER_LETTERS:
        raise Refused(
            f"its header claims {size:,} bytes; {len(text):,} are there, and at most {_HEADER_LETTERS:,} usual"
        )
    with warnings.catch_warnings():
        # Python warns about odd literals in hostile headers, and NumPy about old names of dtypes.
        warnings.simplefilter("ignore")
        # Python 2 marked long integers.
        header = ast.literal_eval(re.sub(r"(?<=\d)L\b", "", text.decode("utf-8" if version == (3, 0) else "latin-1")))
        match header:
            case {"descr": descr, "fortran_order": bool(fortran), "shape": tuple(shape), **rest} if not rest and all(
                type(size) is int for size in shape
            ):
                check_shape(shape)
                return _Header(shape, fortran, npy.descr_to_dtype(descr), file.tell())
    raise Refused("its header isn't one of NumPy")


def _check_member(member: zipfile.ZipInfo, archive_size: int) -> None:
    """Refuse a zip member that lies about its size, or that NumPy can't have written."""
    if member.flag_bits & _ENCRYPTED:
        raise Refused("encrypted members aren't supported")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused(f"compression method {member.compress_type} isn't supported: NumPy stores or deflates")
    if member.header_offset + member.compress_size > archive_size:
        raise Refused(f"truncated: {member.compress_size:,} compressed bytes are beyond the file's {archive_size:,}")
    stored = member.compress_type == zipfile.ZIP_STORED
    limit = member.compress_size if stored else _DEFLATE_LIMIT * (member.compress_size + 1)
    if member.file_size > limit:
        raise Refused(f"claims {member.file_size:,} bytes, but {member.compress_size:,} can't hold more than {limit:,}")


def _window_readers(
    path: Path, file: StoredFile, header: _Header
) -> tuple[Callable[[], torch.Tensor], Callable[[int, int], torch.Tensor] | None]:
    """Return what reads the array, and what reads a part of one in C order."""

    @guarded(path, _NAME)
    def load() -> torch.Tensor:
        return header.tensor(file.window(header.offset, header.nbytes), header.shape)

    @guarded(path, _NAME)
    def load_range(start: int, stop: int) -> torch.Tensor:
        width = header.dtype.itemsize
        return header.tensor(file.window(header.offset + start * width, (stop - start) * width), (stop - start,))

    return load, None if header.fortran else load_range


def _member_reader(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, header: _Header
) -> Callable[[], torch.Tensor]:
    @guarded(path, name)
    def load() -> torch.Tensor:
        data = np.empty(header.nbytes, np.uint8)
        with archive.open(member) as file:
            file.read(header.offset)
            for start in range(0, header.nbytes, _CHUNK_BYTES):
                part = data[start : start + _CHUNK_BYTES]
                chunk = file.read(len(part))
                if len(chunk) < len(part):
                    raise Refused(f"truncated: {start + len(chunk):,} bytes instead of {header.nbytes:,}")
                part[:] = np.frombuffer(chunk, np.uint8)
            # Only at the end does zipfile compare the checksum.
            if file.read(1):
                raise Refused("the member holds more than its array")
        return header.tensor(data, header.shape)

    return load
