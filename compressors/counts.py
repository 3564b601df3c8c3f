"""The table of a zero-order model: how often each symbol occurs, no more exactly than it pays."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.compressors.universal import decode_integers, encode_integers
from kcomplex.errors import StreamError

Frequencies: TypeAlias = NDArray[np.int64]

# Binary digits kept of a count. Ten make the loss smaller than a bit for every chunk that a coder sees.
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
    best: tuple[bytes, Frequencies, float] | None = None
    for precision in range(_LARGEST_PRECISION + 1):
        codes = _rounded(counts, precision)
        differences = np.diff(codes, prepend=0)
        table = min(
            bytes([precision]) + encode_integers(codes.astype(np.uint64)),
            bytes([precision | _DIFFERENCES]) + encode_integers(_folded(differences)),
            key=len,
        )
        frequencies = _frequencies(codes, precision)
        bits = _payload_bits(counts, frequencies)
        if best is None or 8 * len(table) + bits < 8 * len(best[0]) + best[2]:
            best = table, frequencies, bits
    assert best is not None
    return best


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
    codes = np.cumsum(_unfolded(integers)) if data[0] & _DIFFERENCES else integers.astype(np.int64)
    if precision > _LARGEST_PRECISION or codes.min() < 1 or (codes.max() >> precision) - 1 > _MOST_DROPPED:
        raise StreamError("a table of counts is corrupted: a precision or a count is out of range")
    return _frequencies(codes, precision)


def _payload_bits(counts: NDArray[np.integer[Any]], frequencies: Frequencies) -> float:
    """Return the bits of symbols with these counts, exact also where one symbol has nearly all of the frequency."""
    total = frequencies.sum()
    return float(-(counts * np.log1p((frequencies - total) / total)).sum() / math.log(2))


def _rounded(counts: NDArray[np.integer[Any]], precision: int) -> NDArray[np.int64]:
    """Return counts as codes: small ones as they are, others as exponent and ``precision`` digits after the first."""
    exponents = np.frexp(counts.astype(np.float64))[1].astype(np.int64) - 1
    dropped = np.maximum(exponents - precision, 0)
    codes: NDArray[np.int64] = (dropped << precision) + (counts.astype(np.int64) >> dropped)
    return codes


def _frequencies(codes: NDArray[np.int64], precision: int) -> Frequencies:
    """Return the middle of the counts that share a code, for each code."""
    dropped = np.maximum((codes >> precision) - 1, 0)
    low = (codes - (dropped << precision)) << dropped
    frequencies: Frequencies = low + ((np.int64(1) << dropped) >> 1)
    return frequencies


def _folded(integers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return integers of either sign as non-negative ones: 0, -1, 1, -2 ... become 0, 1, 2, 3 ..."""
    return ((integers << 1) ^ (integers >> 63)).astype(np.uint64)


def _unfolded(integers: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (integers >> np.uint64(1)).astype(np.int64) ^ -(integers & np.uint64(1)).astype(np.int64)
