"""The alphabet of integers: which distinct ones there are, how often, and the table that tells a decoder."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Symbols
from kcomplex.machine.compiled import compiled

from .universal import decode_integers, encode_integers

Counts: TypeAlias = NDArray[np.int64]
IndexT = TypeVar("IndexT", bound=np.integer[Any])

# Integers of up to two bytes are counted and looked up by their bit pattern, segment by segment to stay in the cache.
_NARROW = 2
_SEGMENT = 1 << 18
# Knuth's multiplier for Fibonacci hashing, by the bytes of a word: 2**bits divided by the golden ratio, made odd.
_MULTIPLIERS = {4: 0x9E3779B1, 8: 0x9E3779B97F4A7C15}
_LARGEST_TABLE_LOG = 22
# In place of the order of a universal code: the words follow as they are.
_PLAIN = b"\xff"


def alphabet(symbols: Symbols, limit: int) -> tuple[Symbols, Counts] | None:
    """Return the distinct symbols in ascending order and how often each occurs; None if there are more than ``limit``.

    Whether there are depends on nothing but the symbols. Memory: a sorted copy, or a histogram for narrow integers.
    """
    flat = np.ascontiguousarray(symbols).reshape(-1)
    if flat.dtype.itemsize <= _NARROW:
        words, counts = _counted(flat)
        return (words, counts) if words.size <= limit else None
    # A part has no more distinct symbols than the whole: most tensors that exceed the limit are found out early.
    if flat.size > 4 * limit and _runs(np.sort(flat[: 2 * limit])).size > limit:
        return None
    ordered = np.sort(flat)
    starts = _runs(ordered)
    return (ordered[starts], np.diff(starts, append=flat.size)) if starts.size <= limit else None


def positions(symbols: Symbols, words: Symbols, dtype: type[IndexT]) -> NDArray[IndexT]:
    """Return, flat, each symbol's position in the alphabet that it is from, in a dtype that holds the largest one."""
    flat = np.ascontiguousarray(symbols).reshape(-1)
    unsigned = np.dtype(f"u{flat.dtype.itemsize}")
    patterns, keys = flat.view(unsigned), words.view(unsigned)
    if unsigned.itemsize <= _NARROW:
        table = np.zeros(1 << 8 * unsigned.itemsize, dtype)
        table[keys] = np.arange(words.size, dtype=dtype)
        looked_up: NDArray[IndexT] = table[patterns]
        return looked_up
    table_log = min(words.size.bit_length() + 6, _LARGEST_TABLE_LOG)
    multiplier, shift = unsigned.type(_MULTIPLIERS[unsigned.itemsize]), unsigned.type(8 * unsigned.itemsize - table_log)
    table = np.zeros(1 << table_log, dtype)
    table[(keys * multiplier) >> shift] = np.arange(words.size, dtype=dtype)
    found = np.empty(flat.size, dtype)
    for start in range(0, flat.size, _SEGMENT):
        segment = patterns[start : start + _SEGMENT]
        guess = table[(segment * multiplier) >> shift]
        # Words that share a slot with another one are looked up by bisection; few do.
        missed = np.flatnonzero(keys[guess] != segment)
        guess[missed] = np.searchsorted(words, flat[start : start + _SEGMENT][missed])
        found[start : start + _SEGMENT] = guess
    return found


def encode_alphabet(words: Symbols) -> bytes:
    """Return the table of an alphabet with at least one word: size, first word, and the gaps between words.

    The gaps are left out where all are one, coded universally, or replaced by the words where those are shorter.
    """
    native = words.astype(words.dtype.newbyteorder("<"))
    gaps = np.diff(_as_uint64(words)) - np.uint64(1)
    tail = b""
    if gaps.any():
        tail = min(encode_integers(gaps), _PLAIN + native[1:].tobytes(), key=len)
    return varint(words.size) + native[:1].tobytes() + tail


def decode_alphabet(data: bytes, dtype: np.dtype[Any], limit: int) -> Symbols:
    """Return the words of a table; ``limit`` is how many there can be.

    Raises
    ------
    StreamError
        The table is truncated or corrupted.
    """
    reader = Reader(data)
    size = reader.varint()
    if not 1 <= size <= limit:
        raise StreamError(f"an alphabet of {size} words where there can be 1 to {limit}")
    little = dtype.newbyteorder("<")
    first = np.frombuffer(reader.take(dtype.itemsize), little).astype(dtype)
    tail = reader.rest()
    if tail.startswith(_PLAIN):
        if len(tail) != 1 + (size - 1) * dtype.itemsize:
            raise StreamError(f"an alphabet of {size} words has {len(tail)} bytes")
        words: Symbols = np.concatenate([first, np.frombuffer(tail, little, offset=1).astype(dtype)])
    else:
        gaps = decode_integers(tail, size - 1) if tail else np.zeros(size - 1, np.uint64)
        offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(gaps + np.uint64(1), dtype=np.uint64)])
        words = (_as_uint64(first) + offsets).astype(f"u{dtype.itemsize}").view(dtype)
    # Also what wraps around the largest integer shows here.
    if size > 1 and not (words[1:] > words[:-1]).all():
        raise StreamError("the words of an alphabet aren't in ascending order")
    return words


def histogram(symbols: Symbols) -> Counts:
    """Return how often each bit pattern occurs among integers of one or two bytes."""
    patterns = np.ascontiguousarray(symbols).reshape(-1).view(f"u{symbols.dtype.itemsize}")
    counts = np.zeros(1 << 8 * patterns.itemsize, np.int64)
    _count(patterns, counts)
    return counts


def _counted(flat: Symbols) -> tuple[Symbols, Counts]:
    counts = histogram(flat)
    used = np.flatnonzero(counts)
    words = used.astype(f"u{flat.dtype.itemsize}").view(flat.dtype)
    order = np.argsort(words)
    return words[order], counts[used[order]]


@compiled
def _count(patterns: Symbols, counts: Counts) -> None:
    for pattern in patterns:
        counts[pattern] += 1


def _runs(ordered: Symbols) -> NDArray[np.intp]:
    """Return where a new value begins in sorted symbols."""
    if not ordered.size:
        return np.zeros(0, np.intp)
    return np.concatenate([np.zeros(1, np.intp), np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])


def _as_uint64(words: Symbols) -> NDArray[np.uint64]:
    """Return words modulo 2**64, so that differences of sorted words are right for every dtype."""
    wide = np.int64 if words.dtype.kind == "i" else np.uint64
    return words.astype(wide).view(np.uint64)
