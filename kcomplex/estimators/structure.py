"""The structure of a checkpoint as bytes: which tensors there are, and how long each one's stream is.

Every decodable description pays for it, so that its bits give back a whole checkpoint and not loose numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kcomplex.errors import StreamError
from kcomplex.weights import DTYPES, Weights, dtype_name

MAGIC = b"kcx1"
# The position is the code in streams: only ever append.
_DTYPE_NAMES = (
    "bfloat16",
    "bool",
    "complex128",
    "complex32",
    "complex64",
    "float16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "int16",
    "int32",
    "int64",
    "int8",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
)
_DTYPE_CODES = {name: code for code, name in enumerate(_DTYPE_NAMES)}
_MOST_DIMENSIONS = 64
# Deflate makes at most 1032 bytes of one; a header that claims more lies.
_DEFLATE_LIMIT = 1032


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in the structure: its names (the first is its own), dtype, shape and stream length in bytes."""

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Structure:
    """What a stream says before its payload: the estimator's specification, shared bytes, tensors."""

    spec: str
    shared: int
    tensors: tuple[TensorEntry, ...]
    size: int


def encode_structure(spec: str, weights: Weights, shared: int, lengths: Iterable[int]) -> bytes:
    """Return the structure's bytes: magic, length, and the deflated table of tensors.

    Parameters
    ----------
    spec
        Specification of the estimator that decodes.
    weights
        Whose names, aliases, dtypes and shapes to store.
    shared
        Length in bytes of the side information shared by all tensors.
    lengths
        Length in bytes of each tensor's stream, in the order of the weights.
    """
    body = bytearray()
    _put_text(body, spec)
    body += varint(shared)
    body += varint(len(weights))
    for handle, length in zip(weights.values(), lengths, strict=True):
        body += varint(len(handle.aliases) + 1)
        for name in (handle.name, *handle.aliases):
            _put_text(body, name)
        body += varint(_DTYPE_CODES[dtype_name(handle.dtype)])
        body += varint(len(handle.shape))
        for side in handle.shape:
            body += varint(side)
        body += varint(length)
    packed = zlib.compress(bytes(body), 9)
    return MAGIC + varint(len(body)) + varint(len(packed)) + packed


def decode_structure(data: bytes) -> Structure:
    """Return the structure at the beginning of a stream.

    Raises
    ------
    StreamError
        The bytes aren't a stream of kcomplex, or are truncated or corrupted.
    """
    if not data.startswith(MAGIC):
        raise StreamError("this isn't a kcomplex stream: it doesn't begin with its magic bytes")
    outer = Reader(data, len(MAGIC))
    unpacked_size, packed_size = outer.varint(), outer.varint()
    if unpacked_size > _DEFLATE_LIMIT * max(packed_size, 1):
        raise StreamError(f"the structure claims {unpacked_size} bytes in {packed_size}: the stream is corrupted")
    try:
        inflater = zlib.decompressobj()
        body = inflater.decompress(outer.take(packed_size), unpacked_size + 1)
    except zlib.error as error:
        raise StreamError(f"the structure of the stream is corrupted: {error}") from error
    if len(body) != unpacked_size or not inflater.eof:
        raise StreamError("the structure of the stream hasn't the length that it claims")
    reader = Reader(body)
    spec, shared = reader.text(), reader.varint()
    tensors = []
    for _ in range(reader.varint()):
        names = tuple(reader.text() for _ in range(reader.count()))
        code = reader.varint()
        if code >= len(_DTYPE_NAMES) or not names:
            raise StreamError("the structure of the stream names an unknown dtype or a tensor without a name")
        shape = tuple(reader.varint() for _ in range(reader.count()))
        if len(shape) > _MOST_DIMENSIONS or math.prod(max(side, 1) for side in shape) >= 1 << 60:
            raise StreamError(f"the tensor {names[0]!r} claims the impossible shape {shape}")
        tensors.append(TensorEntry(names, DTYPES[_DTYPE_NAMES[code]], shape, reader.varint()))
    if reader.left:
        raise StreamError("the structure of the stream has bytes left over")
    return Structure(spec, shared, tuple(tensors), outer.position)


class Reader:
    """Reads varints, texts and byte strings; refuses to read past the end."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data = data
        self.position = position

    @property
    def left(self) -> int:
        """Bytes that haven't been read."""
        return len(self.data) - self.position

    def take(self, length: int) -> bytes:
        """Return the next bytes.

        Raises
        ------
        StreamError
            There are fewer than that.
        """
        if length > self.left:
            raise StreamError(f"the stream ends after {self.left} of the {length} bytes that it announces")
        self.position += length
        return self.data[self.position - length : self.position]

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(self.left)

    def varint(self) -> int:
        """Return the next variable-length integer (seven bits a byte, low bits first)."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise StreamError("the stream holds an integer longer than 64 bits")

    def count(self) -> int:
        """Return the next integer as a number of items, each of which takes at least a byte."""
        count = self.varint()
        if count > self.left:
            raise StreamError(f"the stream announces {count} items in {self.left} bytes")
        return count

    def text(self) -> str:
        """Return the next text: length, then UTF-8."""
        try:
            return self.take(self.varint()).decode()
        except UnicodeDecodeError as error:
            raise StreamError("the stream holds a name that isn't UTF-8") from error


def varint(value: int) -> bytes:
    """Return a non-negative integer in seven bits a byte, low bits first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def join_lengths(lengths: Iterable[int]) -> bytes:
    """Return lengths as varints, to stand before pieces of which the last needs no length."""
    return b"".join(varint(length) for length in lengths)


def split_lengths(data: bytes, count: int) -> list[bytes]:
    """Return ``count`` pieces of bytes that begin with the lengths of all but the last.

    Raises
    ------
    StreamError
        The bytes are fewer than the lengths say.
    """
    reader = Reader(data)
    lengths = [reader.varint() for _ in range(count - 1)]
    return [*(reader.take(length) for length in lengths), reader.rest()]


def _put_text(body: bytearray, text: str) -> None:
    encoded = text.encode()
    body += varint(len(encoded))
    body += encoded
