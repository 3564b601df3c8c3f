"""Scales as side information: the floats that quantisers multiply their symbols with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.symbols import Shape

Values = NDArray[np.floating[Any]]

# Bits of a number that are counted at a time.
_DIGIT = 16


def rows(values: Values, per_row: bool) -> Values:
    """Return values with one row for each scale: the rows of the first axis, or all in one.

    Only tensors with two axes or more have rows; a scale for each entry of a bias would cost more than the bias.
    """
    count = row_count(values.shape, per_row)
    return values.reshape(count, values.size // max(count, 1))


def largest_magnitude(pieces: Iterable[Values]) -> Values:
    """Return the largest magnitude in pieces of a tensor, in their dtype."""
    largest: Values = np.max([np.abs(values).max(initial=0) for values in pieces])
    return largest


def ordered_magnitude(pieces: Callable[[], Iterable[Values]], rank: int) -> Values:
    """Return the magnitude at a place among all of a tensor's in ascending order.

    Its bits are found 16 at a time, the highest first: magnitudes are in the order of their bit patterns.
    """
    dtype = next(iter(pieces())).dtype
    found = 0
    for shift in range(8 * dtype.itemsize - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for values in pieces():
            digits = np.abs(values).reshape(-1).view(f"i{dtype.itemsize}") >> shift
            counts += np.bincount(digits[digits >> _DIGIT == found] & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT)
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, rank, side="right"))
        rank -= int(below[digit] - counts[digit])
        found = found << _DIGIT | digit
    magnitude: Values = np.array([found]).astype(f"i{dtype.itemsize}").view(dtype)[0]
    return magnitude


def row_count(shape: Shape, per_row: bool) -> int:
    """Return how many scales a tensor of this shape has."""
    return shape[0] if per_row and len(shape) > 1 else 1


def pack_scales(scales: Values) -> bytes:
    """Return non-negative scales as little-endian floats in their own width."""
    return scales.astype(scales.dtype.newbyteorder("<")).tobytes()


def unpack_scales(side: bytes, count: int, dtype: np.dtype[Any]) -> Values:
    """Return the scales that `pack_scales` wrote, in a column.

    Raises
    ------
    StreamError
        The bytes aren't ``count`` finite, non-negative floats of this dtype.
    """
    if len(side) != count * dtype.itemsize:
        raise StreamError(f"{len(side)} bytes of scales where {count} of dtype {dtype} were expected")
    scales: Values = np.frombuffer(side, dtype.newbyteorder("<")).astype(dtype)
    if not (np.isfinite(scales).all() and not np.signbit(scales).any()):
        raise StreamError("a scale is negative, infinite or NaN: the stream is corrupted")
    return scales.reshape(count, 1)


def scaled(symbols: Values, scales: Values, shape: Shape) -> Values:
    """Return the products in a shape, none larger than the dtype holds; zeros are positive zeros."""
    with np.errstate(over="ignore"):
        products: Values = symbols * scales
    return (bounded(products) + 0.0).reshape(shape)


def bounded(values: Values) -> Values:
    """Return values with infinity, the outcome of rounding up the largest number there is, replaced by that number."""
    limit = np.finfo(values.dtype).max
    return np.clip(values, -limit, limit)
