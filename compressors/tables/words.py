"""Integers as little-endian bytes, the common ground of the general-purpose compressors."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Coder
from kcomplex.estimators.symbols import Shape, Symbols


def to_bytes(symbols: Symbols) -> bytes:
    """Return integers in C order, little-endian whatever the machine."""
    return symbols.astype(symbols.dtype.newbyteorder("<"), copy=False).tobytes()


def from_bytes(data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
    """Return the integers that `to_bytes` wrote.

    Raises
    ------
    StreamError
        The number of bytes doesn't fit the shape.
    """
    expected = byte_size(shape, dtype)
    if len(data) != expected:
        raise StreamError(
            f"{len(data)} bytes can't hold integers of shape {shape} and dtype {dtype} ({expected} bytes)"
        )
    return np.frombuffer(data, dtype=dtype.newbyteorder("<")).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def byte_size(shape: Shape, dtype: np.dtype[Any]) -> int:
    """Return how many bytes integers of a shape and dtype take."""
    return math.prod(shape) * dtype.itemsize


class ByteCoder(Coder):
    """A coder that knows nothing of integers: it compresses their little-endian bytes.

    Subclasses implement `compress` and `decompress`. Where there are no bytes, the stream is empty.

    Attributes
    ----------
    largest_expansion
        The most bytes that the format can make of one; a stream that is too short for what was announced is refused
        unread. None where the format has no small bound: then `decompress` must grow with what it finds.
    """

    largest_expansion: ClassVar[int | None] = None

    @abstractmethod
    def compress(self, plain: bytes, width: int) -> bytes:
        """Return compressed bytes.

        Parameters
        ----------
        plain
            At least one byte.
        width
            Bytes an integer, for compressors that can use it.
        """

    @abstractmethod
    def decompress(self, data: bytes, size: int, width: int) -> bytes:
        """Return what was compressed, or no more than a little over ``size`` bytes of it.

        Parameters
        ----------
        data
            The whole compressed stream.
        size
            How many bytes were compressed.
        width
            Bytes an integer, as for `compress`.

        Raises
        ------
        StreamError
            The stream is truncated, corrupted, or followed by other bytes.
        """

    def encode(self, symbols: Symbols) -> bytes:
        """Return the compressed bytes of the integers."""
        return self.compress(to_bytes(symbols), symbols.dtype.itemsize) if symbols.size else b""

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`. No more than the announced size is ever allocated."""
        size = byte_size(shape, dtype)
        if size == 0:
            return from_bytes(data, shape, dtype)
        if self.largest_expansion is not None and size > len(data) * self.largest_expansion:
            raise StreamError(f"{self.name}: {len(data)} bytes can't hold the {size} bytes that were announced")
        plain = self.decompress(data, size, dtype.itemsize)
        if len(plain) > size:
            raise StreamError(f"{self.name}: the stream holds more than the {size} bytes that were announced")
        return from_bytes(plain, shape, dtype)


def require_end(name: str, *, ended: bool, surplus: bytes) -> None:
    """Refuse a stream that doesn't end where its bytes end.

    Raises
    ------
    StreamError
        The stream goes on (``ended`` is False), or ``surplus`` bytes follow it.
    """
    if not ended:
        raise StreamError(f"{name}: the stream is truncated, or holds more than was announced")
    if surplus:
        raise StreamError(f"{name}: {len(surplus)} bytes follow the end of the stream")
