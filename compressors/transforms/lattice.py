"""Lattices: tables of floats that are whole multiples of one step, as uniform quantisers leave them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Symbols

from ..tables.numbers import unzigzag, zigzag
from ..tables.universal import decode_integers, encode_integers

Floats: TypeAlias = NDArray[np.floating[Any]]
Multiples: TypeAlias = NDArray[np.int64]

# The floats that words of so many bytes are, and the whole numbers that these hold exactly. Words of two bytes have two
# formats, and short tables anyway.
_FORMATS: dict[int, tuple[np.dtype[Any], int]] = {
    4: (np.dtype(np.float32), 1 << 24),
    8: (np.dtype(np.float64), 1 << 53),
}
# The least magnitude is looked for at up to so many steps, and the step so many neighbours away from the quotient.
_MOST_STEPS = 32
_NEIGHBOURS = 2
# Quotients farther from a whole number, relatively, aren't rounded products.
_SLACK = 1e-5
_PROBE = 64


def encode_lattice(words: Symbols) -> bytes | None:
    """Return the table of words that are the floats ``k s`` of one step s; None if they aren't.

    The table holds the step, the number of words, the least k, how far the largest is, and any gaps.
    Products are rounded once, as IEEE 754 has it.

    Parameters
    ----------
    words
        Distinct bit patterns.
    """
    if words.dtype.kind != "u" or words.itemsize not in _FORMATS or not words.size:
        return None
    dtype, _ = _FORMATS[words.itemsize]
    values = np.sort(words.view(dtype))
    found = _step_of(values)
    if found is None or not np.array_equal(np.sort(_words(*found)), np.sort(words)):
        return None
    step, multiples = found
    gaps = (np.diff(multiples) - 1).astype(np.uint64)
    first, span = int(multiples[0]), int(multiples[-1] - multiples[0])
    head = varint(words.size) + varint(zigzag(first)) + varint(span)
    plain: bytes = step.astype(dtype.newbyteorder("<")).tobytes()
    return plain + head + (encode_integers(gaps) if gaps.any() else b"")


def decode_lattice(data: bytes, dtype: np.dtype[Any], limit: int) -> Symbols:
    """Return the words of a table by ascending value; ``limit`` is how many there can be.

    Raises
    ------
    StreamError
        The table is truncated or corrupted.
    """
    if dtype.kind != "u" or dtype.itemsize not in _FORMATS:
        raise StreamError(f"words of {dtype} aren't floats with a step")
    floats, exact = _FORMATS[dtype.itemsize]
    reader = Reader(data)
    step = np.frombuffer(reader.take(dtype.itemsize), floats.newbyteorder("<")).astype(floats)[0]
    size = reader.varint()
    if not 1 <= size <= limit:
        raise StreamError(f"a lattice of {size} words where there can be 1 to {limit}")
    first, span = unzigzag(reader.varint()), reader.varint()
    if not 0 < step < np.inf or abs(first) > exact or span > exact - first or span < size - 1:
        raise StreamError("a lattice's step or multiples are out of range")
    tail, gaps = reader.rest(), np.zeros(size - 1, np.uint64)
    if tail or span > size - 1:
        gaps = decode_integers(tail, size - 1)
    if (gaps > np.uint64(span)).any() or int(gaps.sum()) != span - (size - 1):
        raise StreamError("a lattice's gaps don't add up")
    words = _words(step, np.concatenate([[first], gaps.astype(np.int64) + 1]).cumsum())
    values = words.view(floats)
    if not np.isfinite(values).all() or not (values[1:] > values[:-1]).all():
        raise StreamError("the words of a lattice aren't finite and in ascending order")
    return words


def _step_of(values: Floats) -> tuple[np.floating[Any], Multiples] | None:
    """Return a step and the multiples of ascending values; None if there is no step."""
    magnitudes = np.sort(np.abs(values[values != 0]))
    if not magnitudes.size or not np.isfinite(magnitudes[-1]):
        return None
    for steps in range(1, _MOST_STEPS + 1):
        quotient = magnitudes[0] / values.dtype.type(steps)
        if not quotient or not _nearly_whole(magnitudes[:: max(1, magnitudes.size // _PROBE)], quotient):
            continue
        # What is too many steps becomes infinite.
        with np.errstate(over="ignore"):
            wide = np.rint(values.astype(np.float64) / float(quotient))
        if np.abs(wide).max() > _FORMATS[values.itemsize][1]:
            return None
        multiples = wide.astype(np.int64)
        for step in _around(quotient):
            if np.array_equal(_products(step, multiples), values):
                return step, multiples
    return None


def _nearly_whole(magnitudes: Floats, quotient: np.floating[Any]) -> bool:
    # What is infinite isn't near a whole number.
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = magnitudes.astype(np.float64) / float(quotient)
        return bool((np.abs(numbers - np.rint(numbers)) <= _SLACK * numbers).all())


def _around(quotient: np.floating[Any]) -> list[np.floating[Any]]:
    """Return a quotient and its neighbours, the nearest ones first."""
    found = below = above = quotient
    zero, infinity = quotient.dtype.type(0), quotient.dtype.type(np.inf)
    steps = [found]
    for _ in range(_NEIGHBOURS):
        with np.errstate(over="ignore", under="ignore"):
            below, above = np.nextafter(below, zero), np.nextafter(above, infinity)
        steps += [below, above]
    return [step for step in steps if 0 < step < np.inf]


def _products(step: np.floating[Any], multiples: Multiples) -> Floats:
    # What is too large for the format becomes infinite, and is refused.
    with np.errstate(over="ignore"):
        products: Floats = multiples.astype(step.dtype) * step
    return products


def _words(step: np.floating[Any], multiples: Multiples) -> Symbols:
    return _products(step, multiples).view(f"u{step.dtype.itemsize}")
