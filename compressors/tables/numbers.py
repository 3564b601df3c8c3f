"""Integers and scales as streams tell them, and the rows and columns in which a tensor is coded."""

from __future__ import annotations

import math

import numpy as np

from kcomplex.errors import StreamError
from kcomplex.estimators.structure import Reader
from kcomplex.estimators.symbols import Shape

from .logistic import exponential

# Vectors, and matrices with longer rows than this, are coded in rows of `_FOLD`.
_WIDEST = 1 << 16
_FOLD = 1024
_EIGHTHS = exponential(np.arange(8.0) * (0.6931471805599453 / 8))


def folded(shape: Shape) -> tuple[int, int]:
    """Return the rows and columns in which a tensor is coded: its first dimension by the others.

    Vectors, and matrices with longer rows than 65536, are cut in the longest rows of at most 1024 that divide them.
    """
    size = math.prod(shape)
    if len(shape) > 1 and shape[0] > 1 and size // shape[0] <= _WIDEST:
        return shape[0], size // shape[0]
    if size <= _FOLD:
        return 1, size
    width = next(width for width in range(_FOLD, 0, -1) if size % width == 0)
    return size // width, width


def eighths_of_octaves(magnitude: float) -> int:
    """Return the logarithm of a positive magnitude to base 2**(1/8), rounded."""
    return round(8 * math.log2(magnitude))


def octave_fraction(eighths: int) -> float:
    """Return 2**(eighths / 8), the same bits on every machine."""
    return float(np.ldexp(_EIGHTHS[eighths % 8], eighths // 8))


def read_middle(reader: Reader) -> int:
    """Return what integers are counted from.

    Raises
    ------
    StreamError
        It is beyond 64 bits.
    """
    middle = unzigzag(reader.varint())
    if not -(1 << 63) <= middle < 1 << 63:
        raise StreamError(f"integers can't be counted from {middle}")
    return middle


def zigzag(value: int) -> int:
    """Return a non-negative integer for any: 0, -1, 1, -2 ... become 0, 1, 2, 3 ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(folded: int) -> int:
    """Return the integer of a `zigzag`."""
    return folded // 2 if folded % 2 == 0 else -(folded + 1) // 2
