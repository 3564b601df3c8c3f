"""The low-rank part of an update: factors of a few integers, whose products are added to what is expected.

Every product is ``left * right * 2**exponent`` in float64, and products are added up one after another in the order of
the stream: the same bits on every machine. How the encoder finds the factors may differ from machine to machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Part
from kcomplex.estimators.structure import Reader, varint
from kcomplex.machine.blas_threads import one_blas_thread

from ..tables.numbers import unzigzag, zigzag
from .integers import IntegerMix
from .matrix import Integers, Memory

Matrix = NDArray[np.float64]

MOST_RANK = 256
# Ranks up to which singular vectors are looked for, as long as the last ones were worth it.
_SEARCHED = (16, 64, MOST_RANK)
_FEWEST = 4
# The step of a factor, in standard deviations of what is left, at which a Gaussian code is shortest; measured a little
# finer, because linear prediction makes less of rounding errors than of what else is left.
STEP = 0.7 * math.sqrt(12.0)
# A part is tried if it promises to save so many bits a weight, and so many in all.
_LEAST_GAIN, _LEAST_BITS = 2e-3, 64.0
_MOST_EXPONENT = 1000
# Factors are exact in float64.
_LARGEST = 1 << 50


class LowRank(NamedTuple):
    """Factors of a matrix of low rank.

    Attributes
    ----------
    left, right
        int64 of shapes (rank, height) and (rank, width).
    exponents
        Of the power of two that each product of a row of both is multiplied with.
    """

    left: Integers
    right: Integers
    exponents: tuple[int, ...]

    def product(self) -> Matrix:
        """Return the matrix, the same bits on every machine; zero where it isn't finite."""
        total = np.zeros((self.left.shape[1], self.right.shape[1]))
        term = np.empty_like(total)
        with np.errstate(over="ignore", invalid="ignore"):
            for left, right, exponent in zip(self.left, self.right, self.exponents, strict=True):
                np.multiply(np.ldexp(left.astype(np.float64), exponent)[:, None], right.astype(np.float64), out=term)
                total += term
        total[~np.isfinite(total)] = 0.0
        return total

    def part(self, memory: Memory) -> Part:
        """Return what `read_low_rank` reads; the memory learns from the factors."""
        data = b"".join(part.data for part in _coder(memory).encode_parts(np.hstack([self.left, self.right])))
        steps = np.diff(self.exponents, prepend=0).tolist()
        told = [len(self.exponents), *map(zigzag, steps), len(data)]
        return Part("low rank", b"".join(map(varint, told)) + data)


def read_low_rank(reader: Reader, memory: Memory, shape: tuple[int, int]) -> LowRank:
    """Return the low-rank part of a matrix in a stream.

    Raises
    ------
    StreamError
        Its rank is higher than the matrix has or than is ever coded, or it is no such part at all.
    """
    height, width = shape
    rank = reader.varint()
    if not 1 <= rank <= min(height, width, MOST_RANK):
        raise StreamError(f"mix: a low-rank part of rank {rank} in a matrix of {height} rows and {width} columns")
    exponents: list[int] = []
    for _ in range(rank):
        exponents.append(unzigzag(reader.varint()) + (exponents[-1] if exponents else 0))
        if abs(exponents[-1]) > _MOST_EXPONENT:
            raise StreamError(f"mix: a low-rank part with the exponent {exponents[-1]}")
    factors = _coder(memory).decode(reader.take(reader.varint()), (rank, height + width), np.dtype(np.int64))
    whole = factors.astype(np.int64)
    return LowRank(whole[:, :height], whole[:, height:], tuple(exponents))


def _coder(memory: Memory) -> IntegerMix:
    return IntegerMix(False, memory)


@dataclass(frozen=True)
class Directions:
    """The first singular vectors of a matrix.

    Attributes
    ----------
    left, right
        float64 of shapes (height, count) and (count, width).
    values
        The singular values, descending.
    power
        The sum of the matrix's squares.
    floor
        A standard deviation: errors below it needn't be smaller.
    """

    left: Matrix
    values: Matrix
    right: Matrix
    power: float
    floor: float

    @classmethod
    def of(cls, matrix: Matrix, count: int, floor: float) -> Directions:
        """Return so many directions of a finite matrix."""
        with one_blas_thread():
            left, values, right = _decomposed(matrix, count)
        return cls(left, values, right, float(np.square(matrix).sum()), floor)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return len(self.left), self.right.shape[1]

    def rest(self, rank: int) -> float:
        """Return the standard deviation of what so many directions leave over, or the floor."""
        left_over = self.power - float(np.square(self.values[:rank]).sum())
        return max(math.sqrt(max(left_over, 0.0) / math.prod(self.shape)), self.floor)

    def product(self, rank: int) -> Matrix:
        """Return the best matrix of a rank."""
        with one_blas_thread():
            product: Matrix = (self.left[:, :rank] * self.values[:rank]) @ self.right[:rank]
        return product

    def best_rank(self) -> int:
        """Return the rank at which a Gaussian code of factors and rest is shortest; 0 if there is little to gain."""
        height, width = self.shape
        before = math.log2(self.rest(0)) * height * width
        best, gain = 0, _LEAST_GAIN * height * width + _LEAST_BITS
        for rank in range(1, self.values.size + 1):
            rest = self.rest(rank)
            # Standard deviations of the integers.
            own = self.values[:rank] / (STEP * rest)
            cost = sum(size * 0.5 * np.log2(1.0 + 17.1 * np.square(own) / size).sum() for size in (height, width))
            found = before - math.log2(rest) * height * width - float(cost)
            if found > gain:
                best, gain = rank, found
        return best

    def rounded(self, rank: int, precision: float) -> LowRank:
        """Return the part of a rank.

        Parameters
        ----------
        precision
            The step of an integer in standard deviations of the rest, about: its square is rounded to a power of two.
        """
        rest = self.rest(rank) * precision
        lefts, rights, exponents = [], [], []
        for left, value, right in zip(self.left.T[:rank], self.values, self.right, strict=False):
            largest = value * max(float(np.abs(left).max()), float(np.abs(right).max())) ** 2 / _LARGEST**2
            exponent = min(round(math.log2(max(rest * rest / max(value, 1e-290), largest))), _MOST_EXPONENT)
            scale = math.sqrt(value) * 2.0 ** (-0.5 * exponent)
            lefts.append(np.rint(left * scale).astype(np.int64))
            rights.append(np.rint(right * scale).astype(np.int64))
            exponents.append(exponent)
        return LowRank(np.array(lefts), np.array(rights), tuple(exponents))


def directions(matrix: Matrix, floor: float) -> Directions | None:
    """Return the singular vectors of a finite matrix that may be worth telling; None where none are."""
    found, most = None, min(matrix.shape) - 1
    for count in _SEARCHED if most >= _FEWEST - 1 and matrix.any() else ():
        found = Directions.of(matrix, min(count, most), floor)
        if found.best_rank() < 0.75 * count:
            break
    return found if found is not None and found.best_rank() else None


def _decomposed(matrix: Matrix, count: int) -> tuple[Any, Any, Any]:
    if 3 * count > min(matrix.shape):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], values[:count], right[:count]
    # Takes long to import.
    from sklearn.utils.extmath import randomized_svd

    left, values, right = randomized_svd(matrix, count, n_iter=4, power_iteration_normalizer="QR", random_state=0)
    return left, values, right
