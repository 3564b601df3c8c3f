"""The table of a zero-order model: how often each symbol occurs, no more exactly than it pays."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.machine.compiled import compiled, leading_zeros

from ..tables.universal import decode_integers, encode_integers, encoded_size

Frequencies: TypeAlias = NDArray[np.int64]

# Binary digits kept of a count. Ten make the loss smaller than a bit for every piece that a coder sees.
_LARGEST_PRECISION = 10
_DIFFERENCES = 1 << 7
# Digits that a count may lose; a table that drops more is corrupted, and would overflow.
_MOST_DROPPED = 40


def encode_counts(counts: NDArray[np.integer[Any]]) -> tuple[bytes, Frequencies, float]:
    """Return the table of positive counts, the frequencies that a decoder reads from it, and the payload's bits.

    A count is rounded to a short floating-point number; its precision is chosen so that table and payload together
    are shortest. (A precision of half the digits of the number of symbols is what the theory of two-part codes asks
    for: Rissanen, "A universal prior for integers and estimation by minimum description length", Annals of
    Statistics 11, 1983.) The table holds the numbers, or their differences where neighbours are alike.
    """
    positive = counts.astype(np.int64)
    best: tuple[float, int, int] | None = None
    for precision in range(_LARGEST_PRECISION + 1):
        numbers, _, bits = _rounded(positive, precision)
        sizes = [encoded_size(numbers.astype(np.uint64)), encoded_size(_folded(numbers))]
        trial = 8 * (1 + min(sizes)) + bits, precision, int(sizes[1] < sizes[0])
        best = trial if best is None or trial[0] < best[0] else best
    assert best is not None
    _, precision, differences = best
    numbers, frequencies, bits = _rounded(positive, precision)
    table = encode_integers(_folded(numbers) if differences else numbers.astype(np.uint64))
    return bytes([precision | differences * _DIFFERENCES]) + table, frequencies, bits


def decode_counts(data: bytes, size: int) -> Frequencies:
    """Return the frequencies of ``size`` symbols from a table that `encode_counts` wrote.

    Raises
    ------
    StreamError
        The table is truncated or corrupted.
    """
    if not data:
        raise StreamError("a table of counts is missing")
    precision = data[0] & (_DIFFERENCES - 1)
    integers = decode_integers(data[1:], size)
    numbers = np.cumsum(_unfolded(integers)) if data[0] & _DIFFERENCES else integers.astype(np.int64)
    if precision > _LARGEST_PRECISION or numbers.min() < 1 or (numbers.max() >> precision) - 1 > _MOST_DROPPED:
        raise StreamError("a table of counts is corrupted: a precision or a count is out of range")
    return _frequencies(numbers, precision)


@compiled
def _rounded(counts: NDArray[np.int64], precision: int) -> tuple[NDArray[np.int64], Frequencies, float]:
    """Return counts as numbers, their frequencies, and the bits of symbols with these counts.

    Small counts are their own numbers, others exponent and ``precision`` digits after the first.
    """
    numbers, total = np.empty_like(counts), 0
    for place in range(counts.size):
        dropped = max(63 - leading_zeros(counts[place]) - precision, 0)
        numbers[place] = (dropped << precision) + (counts[place] >> dropped)
    frequencies = _frequencies(numbers, precision)
    for place in range(counts.size):
        total += frequencies[place]
    bits = 0.0
    for place in range(counts.size):
        # Exact also where one symbol has nearly all of the frequency.
        bits -= counts[place] * math.log1p((frequencies[place] - total) / total)
    return numbers, frequencies, bits / math.log(2)


@compiled
def _frequencies(numbers: NDArray[np.int64], precision: int) -> Frequencies:
    """Return the middle of the counts that share a code, for each code."""
    frequencies = np.empty_like(numbers)
    for place in range(numbers.size):
        dropped = max((numbers[place] >> precision) - 1, 0)
        low = (numbers[place] - (dropped << precision)) << dropped
        frequencies[place] = low + ((1 << dropped) >> 1)
    return frequencies


@compiled
def _folded(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the differences of numbers as non-negative integers: 0, -1, 1, -2 ... become 0, 1, 2, 3 ..."""
    folded, before = np.empty(numbers.size, np.uint64), np.int64(0)
    for place in range(numbers.size):
        difference = numbers[place] - before
        folded[place] = np.uint64((difference << 1) ^ (difference >> 63))
        before = numbers[place]
    return folded


def _unfolded(integers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (integers >> np.uint64(1)).astype(np.int64) ^ -(integers & np.uint64(1)).astype(np.int64)
