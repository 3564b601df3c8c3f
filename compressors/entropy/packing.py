"""Integers of a limited range in as many bits each as the range needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kcomplex.errors import StreamError
from kcomplex.estimators.symbols import Shape, Symbols

# A multiple of eight, so that every segment but the last ends with a byte.
_SEGMENT = 1 << 16


def bits_needed(symbols: Symbols) -> int:
    """Return the bits that each symbol's distance from the smallest one takes; 0 for equal symbols."""
    return (int(symbols.max()) - int(symbols.min())).bit_length()


def packed_size(count: int, bits: int, dtype: np.dtype[Any]) -> int:
    """Return the length in bytes of what `pack` returns."""
    return dtype.itemsize + -(-count * bits // 8)


def pack(symbols: Symbols, bits: int) -> bytes:
    """Return the smallest symbol, then each one's distance from it in ``bits`` bits, the highest bit first."""
    flat = symbols.reshape(-1)
    smallest = flat.min()
    unsigned = np.dtype(f"u{flat.dtype.itemsize}")
    pieces = [smallest.astype(flat.dtype.newbyteorder("<")).tobytes()]
    places = np.arange(bits)[::-1].astype(unsigned)
    for start in range(0, flat.size if bits else 0, _SEGMENT):
        distances = flat[start : start + _SEGMENT].view(unsigned) - smallest.view(unsigned)
        digits = ((distances[:, None] >> places) & unsigned.type(1)).astype(np.uint8)
        pieces.append(np.packbits(digits).tobytes())
    return b"".join(pieces)


def unpack(data: bytes, bits: int, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
    """Return the symbols that `pack` wrote.

    Raises
    ------
    StreamError
        The bytes are fewer or more than the shape says, or too many bits are asked of the dtype.
    """
    size = math.prod(shape)
    if bits > 8 * dtype.itemsize or len(data) != packed_size(size, bits, dtype):
        raise StreamError(f"{len(data)} bytes can't hold {size} integers of {bits} bits and dtype {dtype}")
    unsigned = np.dtype(f"u{dtype.itemsize}")
    smallest = np.frombuffer(data, unsigned.newbyteorder("<"), count=1).astype(unsigned)
    words = np.full(size, smallest)
    payload = np.frombuffer(data, np.uint8, offset=dtype.itemsize)
    for start in range(0, size if bits else 0, _SEGMENT):
        count = min(_SEGMENT, size - start)
        piece = payload[start * bits // 8 : -(-(start + count) * bits // 8)]
        digits = np.unpackbits(piece, count=count * bits).reshape(count, bits)
        for place in range(bits):
            words[start : start + count] += digits[:, bits - 1 - place].astype(unsigned) << unsigned.type(place)
    return words.view(dtype).reshape(shape)
