"""Linear prediction of a matrix's entries from the entries to their left, learned from the rows that are already coded.

The covariance of the columns is estimated from the rows before a segment of rows (and from earlier matrices of the same
width, which often read from or write into the same residual stream), shrunk towards its diagonal, and factored,
``A = L L'``: the expected value of an entry given those to its left is a row of L times the innovations so far.

A decoder must repeat every bit of this. Rows hold integers of at most 18 bits, so that sums of their products are exact
in float64 whatever the order in which a library adds them up; the factorisation is our own, in a fixed order. Only the
search for the best shrinkage uses LAPACK; its outcome is a part of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from kcomplex.machine.blas_threads import one_blas_thread
from kcomplex.machine.compiled import compiled_in_place, inlined

Matrix: TypeAlias = NDArray[np.float64]

# Index into this table, or its length for no prediction, is what the stream says of each segment.
SHRINKAGES = (0.02, 0.06, 0.15, 0.3, 0.5, 0.75, 0.9)
NO_PREDICTION = len(SHRINKAGES)
_FEWEST_ROWS, _FEWEST_COLUMNS = 8, 4
_WIDEST_WINDOW = 1024
# Earlier matrices count as at most so many rows.
_MOST_CARRIED_ROWS = 2000.0
_RIDGE = 1e-6
_PANEL = 32
# Numbers are counted up to this magnitude: float64 sums their products exactly, a segment of rows at a time.
MOST_COUNTED = (1 << 18) - 1


class Factors(NamedTuple):
    """What a kernel predicts with: entry k of a row gains ``rows[j, k - window] * innovation`` from each j before it.

    Attributes
    ----------
    rows
        float32 of shape (width, window): row j of the transposed Cholesky factor from its window's beginning.
    inverses
        float32 of shape (width,): one over the factor's diagonal.
    """

    rows: NDArray[np.float32]
    inverses: NDArray[np.float32]


class Prediction(NamedTuple):
    """What a kernel expects of rows.

    Attributes
    ----------
    expected
        float32 of shape (rows, width): means; what entries tell of those to their right is added in place.
    rows, inverses
        See `Factors`; of size 0 for none.
    """

    expected: NDArray[np.float32]
    rows: NDArray[np.float32]
    inverses: NDArray[np.float32]


@inlined
def predict_rest(prediction: Prediction, row: int, column: int, innovation: float) -> None:
    """Add what an entry's difference from what was expected tells of those to its right."""
    factors = prediction.rows
    if factors.size > 0:
        step = np.float32(innovation) * prediction.inverses[column]
        begin = column - column % factors.shape[1]
        end = min(begin + factors.shape[1], prediction.expected.shape[1])
        for other in range(column + 1, end):
            prediction.expected[row, other] += factors[column, other - begin] * step


NO_FACTORS = Factors(np.zeros((0, 0), np.float32), np.zeros(0, np.float32))


@dataclass
class Covariance:
    """Sums of products of a matrix's columns, window by window.

    Attributes
    ----------
    earlier, earlier_rows
        float64 of shape (window, window) each: of earlier matrices, each in units of its root mean square, so that
        matrices of any scale and density weigh the same; and how many rows they count as.
    own, own_rows
        Of this matrix as far as it is known, in its own units.
    """

    earlier: list[Matrix]
    earlier_rows: float
    own: list[Matrix]
    own_rows: int = 0

    @classmethod
    def empty(cls, width: int) -> Covariance:
        """Return the covariance of no rows."""
        return cls(_zeros(width), 0.0, _zeros(width))

    @property
    def rows(self) -> float:
        """How many rows are known."""
        return self.earlier_rows + self.own_rows

    def carried(self) -> Covariance:
        """Return what a next matrix of this width begins with."""
        share = min(1.0, _MOST_CARRIED_ROWS / self.rows) if self.rows > 0 else 0.0
        width = sum(len(sums) for sums in self.own)
        return Covariance([sums * share for sums in self.sums()], self.rows * share, _zeros(width))

    def add(self, rows: Matrix) -> None:
        """Count rows of this matrix in."""
        for sums, (start, stop) in zip(self.own, windows(rows.shape[1]), strict=True):
            part = np.ascontiguousarray(rows[:, start:stop])
            sums += part.T @ part
        self.own_rows += len(rows)

    def sums(self) -> list[Matrix]:
        """Return all sums, those of this matrix in units of its root mean square so far."""
        # The sum of the diagonals, rounded once, whichever order the machine takes.
        power = math.fsum(entry for sums in self.own for entry in sums.diagonal().tolist())
        if not power:
            return self.earlier
        power /= self.own_rows * sum(len(sums) for sums in self.own)
        return [sums + own / power for sums, own in zip(self.earlier, self.own, strict=True)]

    def factors(self, choice: int) -> Factors:
        """Return the factors under one shrinkage; none for `NO_PREDICTION` or before enough rows."""
        if choice == NO_PREDICTION or self.rows < _FEWEST_ROWS:
            return NO_FACTORS
        known = self.sums()
        width = sum(len(sums) for sums in known)
        rows = np.zeros((width, max(len(sums) for sums in known)), np.float32)
        inverses = np.zeros(width, np.float32)
        start = 0
        for sums in known:
            factor = self._shrunk(sums, choice)
            factor_in_place(factor)
            stop = start + len(sums)
            rows[start:stop, : len(sums)] = factor
            inverses[start:stop] = np.float32(1.0) / factor.diagonal()
            start = stop
        return Factors(rows, inverses)

    def best_choice(self, rows: Matrix, likely: int) -> tuple[int, float]:
        """Return the shrinkage that predicts rows best, and the bits that a Gaussian code gains by it.

        The search may differ from machine to machine: its outcome is told to the decoder.

        Parameters
        ----------
        likely
            Where the search begins; it goes up and down from there for as long as it gains.
        """
        if self.rows < _FEWEST_ROWS:
            return NO_PREDICTION, 0.0
        known, power = self.sums(), max(float(np.square(rows).mean()), 1e-9)
        best, least = likely, self._error(rows, known, likely)
        for step in (1, -1):
            while 0 <= best + step < NO_PREDICTION:
                error = self._error(rows, known, best + step)
                if error >= least:
                    break
                best, least = best + step, error
            if best != likely:
                break
        if not math.isfinite(least):
            return NO_PREDICTION, 0.0
        gain = 0.5 * math.log2(power / max(least / rows.size, 1e-9)) * rows.size
        return (best, gain) if gain > 0 else (NO_PREDICTION, 0.0)

    def _error(self, rows: Matrix, known: list[Matrix], choice: int) -> float:
        """Return the sum of squares of what a shrinkage leaves over; infinity where there is no such prediction."""
        error, narrow = 0.0, rows.astype(np.float32)
        for sums, (start, stop) in zip(known, windows(rows.shape[1]), strict=True):
            try:
                lower = cholesky(self._shrunk(sums, choice), lower=True, check_finite=False)
            except LinAlgError:
                return math.inf
            innovations = solve_triangular(lower, narrow[:, start:stop].T, lower=True, check_finite=False)
            error += float(np.square(innovations * lower.diagonal()[:, None]).sum(dtype=np.float64))
        return error

    def _shrunk(self, sums: Matrix, choice: int) -> NDArray[np.float32]:
        covariance = sums / self.rows
        diagonal = covariance.diagonal() + _RIDGE
        covariance *= 1.0 - SHRINKAGES[choice]
        np.fill_diagonal(covariance, diagonal)
        # Shrunk as much as it is at least, float32 is enough to factor it, and takes half the time.
        return covariance.astype(np.float32)


def _zeros(width: int) -> list[Matrix]:
    return [np.zeros((stop - start, stop - start)) for start, stop in windows(width)]


def windows(width: int) -> list[tuple[int, int]]:
    """Return the windows of columns within which entries predict each other; one for widths of up to 1024."""
    count = -(-width // _WIDEST_WINDOW)
    size = -(-width // count)
    return [(start, min(start + size, width)) for start in range(0, width, size)]


def segments(rows: int, learned: bool, eager: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the segments of rows after which the prediction is learned anew; the first is short if nothing is known.

    Eagerly, every segment is, at the beginning: worth its time where much is to be learned.
    """
    size = max(16, min(256, rows // 12))
    start = 0
    while start < rows:
        if eager:
            size = max(16, min(256, start // 8))
        stop = min(start + (size if start or learned else 16), rows)
        yield start, stop
        start = stop


def is_predictable(shape: tuple[int, int]) -> bool:
    """Return whether prediction is tried: enough rows and columns."""
    rows, columns = shape
    return rows >= _FEWEST_ROWS and columns >= _FEWEST_COLUMNS


def plan(rows: Matrix, covariance: Covariance, eager: bool = False) -> tuple[list[int], float]:
    """Return the best shrinkage of each segment of a matrix and the bits gained; the covariance learns the matrix."""
    choices, gain, likely = [], 0.0, NO_PREDICTION // 2
    with one_blas_thread():
        for start, stop in segments(len(rows), covariance.rows > 0, eager):
            choice, gained = covariance.best_choice(rows[start:stop], likely)
            choices.append(choice)
            gain += gained
            likely = likely if choice == NO_PREDICTION else choice
            covariance.add(rows[start:stop])
    return choices, gain


@compiled_in_place
def factor_in_place(matrix: NDArray[np.float32]) -> None:
    """Turn a symmetric positive definite matrix into its upper Cholesky factor, operation by operation in fixed order.

    The lower triangle is set to zero. Pivots below 1e-12 are raised to it, so that any input ends in finite numbers.
    """
    size = len(matrix)
    for begin in range(0, size, _PANEL):
        end = min(begin + _PANEL, size)
        for j in range(begin, end):
            row = matrix[j]
            for i in range(begin, j):
                weight = matrix[i, j]
                above = matrix[i]
                for k in range(j, size):
                    row[k] -= weight * above[k]
            pivot = np.sqrt(max(row[j], np.float32(1e-12)))
            for k in range(j):
                row[k] = 0.0
            row[j] = pivot
            for k in range(j + 1, size):
                row[k] /= pivot
        # The last panel is the only one that isn't whole, and no rows follow it.
        for j in range(end, size):
            row = matrix[j, j:]
            for i in range(begin, end, 8):
                a, b, c, d = matrix[i, j], matrix[i + 1, j], matrix[i + 2, j], matrix[i + 3, j]
                e, f, g, h = matrix[i + 4, j], matrix[i + 5, j], matrix[i + 6, j], matrix[i + 7, j]
                row_a, row_b, row_c, row_d = matrix[i, j:], matrix[i + 1, j:], matrix[i + 2, j:], matrix[i + 3, j:]
                row_e, row_f, row_g, row_h = matrix[i + 4, j:], matrix[i + 5, j:], matrix[i + 6, j:], matrix[i + 7, j:]
                for k in range(size - j):
                    less = row[k] - a * row_a[k] - b * row_b[k] - c * row_c[k] - d * row_d[k]
                    row[k] = less - e * row_e[k] - f * row_f[k] - g * row_g[k] - h * row_h[k]
