"""What is expected of an entry given another: a factor of that one, and an offset."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.structure import Reader, varint

from ..tables.numbers import unzigzag, zigzag

# Rounding the factor moves what is expected by at most about so many mean differences.
_PRECISION = 0.01
_MOST_BITS = 60


class Line(NamedTuple):
    """What is expected of an entry, told before a matrix: a factor of the given weights, and an offset.

    Attributes
    ----------
    factor, bits
        The factor is ``factor / 2**bits``.
    offset, offset_bits
        The same for the offset.
    """

    factor: int
    bits: int
    offset: int = 0
    offset_bits: int = 0

    def of(self, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what is expected, the same bits on every machine; zero where that isn't finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = given * math.ldexp(self.factor, -self.bits)
            expected = scaled + math.ldexp(self.offset, -self.offset_bits)
        return np.where(np.isfinite(expected), expected, 0.0)

    def to_bytes(self) -> bytes:
        """Return what `read_line` reads; without an offset of zero."""
        pieces = [zigzag(self.factor), zigzag(self.bits)]
        if self.offset:
            pieces += [zigzag(self.offset), zigzag(self.offset_bits)]
        return b"".join(map(varint, pieces))


def read_line(reader: Reader, offset: bool) -> Line:
    """Return the line in a stream.

    Raises
    ------
    StreamError
        Its numbers are out of range.
    """
    line = Line(*(unzigzag(reader.varint()) for _ in range(4 if offset else 2)))
    octaves = max(line.factor.bit_length() - line.bits, line.offset.bit_length() - line.offset_bits)
    large = max(abs(line.factor), abs(line.offset)) >> _MOST_BITS
    if max(abs(line.bits), abs(line.offset_bits)) > 1000 or octaves > 1023 or large:
        raise StreamError("mix: the factor of what is given is out of range")
    return line


def fitted_line(values: NDArray[np.float64], given: NDArray[np.float64], with_offset: bool) -> Line:
    """Return the line with the least squared error over entries that aren't zero, rounded to what matters."""
    used = ordinary(values) & ordinary(given)
    nonzero = used & (values != 0)
    used = nonzero if nonzero.any() else used
    x, y = given[used], values[used]
    power = float(np.square(x).sum())
    if not power > 0:
        return Line(0, 0)
    offset = 0.0
    if with_offset:
        spread = float(np.square(x - x.mean()).sum())
        factor = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
        offset = float(y.mean() - factor * x.mean())
    else:
        factor = float((x * y).sum() / power)
    error = max(float(np.abs(y - factor * x - offset).mean()), 1e-300)
    return Line(*_rounded(factor, _PRECISION * error / math.sqrt(power / x.size)), *_rounded(offset, 0.05 * error))


def ordinary(numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which numbers are finite and no outliers: one broken weight mustn't decide for all."""
    magnitudes = np.where(np.isfinite(numbers), np.abs(numbers), np.inf)
    usual = magnitudes[(magnitudes > 0) & (magnitudes < 1e100)]
    return magnitudes <= (1000.0 * float(np.median(usual)) if usual.size else 0.0)


def _rounded(number: float, precision: float) -> tuple[int, int]:
    """Return integer and bits after its point of a number rounded to about a precision, without zeros at its end."""
    if not math.isfinite(number) or abs(number) < max(precision, 1e-290):
        return 0, 0
    bits = min(math.ceil(-math.log2(max(precision, 1e-300))), 52 - math.frexp(number)[1])
    integer = round(math.ldexp(number, bits))
    while integer and integer % 2 == 0:
        integer, bits = integer // 2, bits - 1
    return (integer, bits) if integer and abs(bits) <= 1000 else (0, 0)
