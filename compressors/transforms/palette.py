"""Palette: a tensor with few distinct values becomes a table and indices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Transform
from kcomplex.estimators.symbols import Shape, Symbols

from ..tables.alphabet import alphabet, decode_alphabet, encode_alphabet, positions
from .lattice import decode_lattice, encode_lattice

_PASSED_THROUGH = b"\x00"
_ASCENDING = b"\x01"
_AS_FLOATS = b"\x02"
_LATTICE = b"\x03"


@dataclass(frozen=True)
class Palette(Transform):
    """Makes a quantised network that is stored as floats cost what it is worth, without loss.

    The side information is the table of distinct words; the stream holds each word's position in it, in the smallest
    unsigned dtype and the symbols' shape. The positions follow the words as integers or, where that brings them closer
    together, as floats (sign and magnitude), so that coders of numbers find numbers. Floats that are whole multiples
    of one step, as uniform quantisers leave them, have a table of the step and the multiples.

    Symbols for which plain table and indices wouldn't be shorter than the plain words (K distinct ones of N symbols of
    w bits: ``K w + N ceil(log2 K) >= N w``) pass through unchanged, for one byte.
    """

    name: ClassVar[str] = "palette"

    def split(self, symbols: Symbols) -> tuple[bytes, list[Symbols]]:
        """Return the table and the indices; or a flag and the symbols."""
        found = alphabet(symbols, _largest_palette(symbols.size, 8 * symbols.dtype.itemsize))
        if found is None or not symbols.size:
            return _PASSED_THROUGH, [symbols]
        words, counts = found
        indices = positions(symbols, words, index_dtype(words.size).type)
        flag, order = _ASCENDING, _float_order(words)
        if order is not None and _spread(counts[order]) < _spread(counts):
            flag = _AS_FLOATS
            rank = np.empty_like(order)
            rank[order] = np.arange(order.size)
            indices = rank.astype(indices.dtype)[indices]
        side, lattice = flag + encode_alphabet(words), encode_lattice(words)
        # A lattice is in the order of floats.
        if lattice is not None and len(lattice) + 1 < len(side) and (order is None or flag == _AS_FLOATS):
            side = _LATTICE + lattice
        return side, [indices.reshape(symbols.shape)]

    def table(self, side: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols | None:
        """Return the words that indices stand for; None where the symbols passed through.

        Raises
        ------
        StreamError
            The side information is corrupted.
        """
        return _table(side, shape, dtype)

    def join(self, side: bytes, streams: list[Symbols], shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the symbols; see `Transform.join`."""
        words = _table(side, shape, dtype)
        require_forms(self.name, streams, [(shape, dtype if words is None else index_dtype(words.size))])
        if words is None:
            return streams[0]
        indices = streams[0]
        if indices.max() >= words.size:
            raise StreamError(f"palette: index {indices.max()} in a table of {words.size} words")
        joined: Symbols = words[indices]
        return joined


def _table(side: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols | None:
    """Return the words of a table; None where the symbols passed through."""
    if side == _PASSED_THROUGH:
        return None
    if not side.startswith((_ASCENDING, _AS_FLOATS, _LATTICE)):
        raise StreamError("palette: the side information is corrupted")
    limit = _largest_palette(math.prod(shape), 8 * dtype.itemsize)
    if side.startswith(_LATTICE):
        return decode_lattice(side[1:], dtype, limit)
    words = decode_alphabet(side[1:], dtype, limit)
    if side.startswith(_ASCENDING):
        return words
    order = _float_order(words)
    if order is None:
        raise StreamError("palette: the side information is corrupted")
    ordered: Symbols = words[order]
    return ordered


def _float_order(words: Symbols) -> NDArray[np.intp] | None:
    """Return the order of ascending words by sign and magnitude; None where it is the same or the words are signed."""
    if words.dtype.kind != "u":
        return None
    negative = int(np.searchsorted(words, words.dtype.type(1 << 8 * words.dtype.itemsize - 1)))
    if negative == words.size:
        return None
    return np.concatenate([np.arange(words.size - 1, negative - 1, -1), np.arange(negative)])


def _spread(counts: NDArray[np.int64]) -> int:
    """Return the sum over all symbols of the distance of their position from the median position."""
    median = int(np.searchsorted(2 * np.cumsum(counts), int(counts.sum())))
    return int((counts * np.abs(np.arange(counts.size) - median)).sum())


def _largest_palette(size: int, width: int) -> int:
    """Return the most distinct words with which table and indices are shorter than ``size`` words of ``width`` bits."""
    largest = int(size > 1)
    for bits in range(1, width):
        # With indices of this many bits the table may have up to 2**bits words, if that still pays.
        affordable = min(1 << bits, (size * (width - bits) - 1) // width)
        if affordable > 1 << (bits - 1):
            largest = affordable
    return largest


def index_dtype(words: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the smallest unsigned dtype that holds the positions in a table of so many words."""
    return np.min_scalar_type(max(words - 1, 0))
