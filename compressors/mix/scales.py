"""Running scales of a matrix, its rows and columns, and the regression that expects an entry's magnitude from them.

All models of rows share them: what an entry is expected to differ from its mean by, what is learned from it, and how
often a flag about entries is set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import inlined

from ..tables.logistic import natural_log, natural_power
from .bins import log_bin
from .logistic_mixing import Engine, slow_down

# Running scales besides those of columns: of the matrix, what a row begins with, of the row, its mean, how many entries
# it counts, of the last eight entries, of the last 32.
_WHOLE, _START, _ROW, _ROW_MEAN, _ROW_SEEN, _LAST_8, _LAST_32 = range(7)
_FEATURES = 7


class Scales(NamedTuple):
    """What is known of the magnitudes of a matrix while its rows are coded (float64).

    Attributes
    ----------
    columns, means, seen, sibling
        Of each column: running mean magnitude of the residual, of the value, entries seen, and the scale at the end of
        the last matrix of this width (0 if there is none).
    running
        Of the whole matrix and of the row, see above.
    features, regression
        Of shape (7,): logarithms of the scales around an entry, and the coefficients by which they are expected to add
        up to the logarithm of its magnitude.
    """

    columns: NDArray[np.float64]
    means: NDArray[np.float64]
    seen: NDArray[np.float64]
    sibling: NDArray[np.float64]
    running: NDArray[np.float64]
    features: NDArray[np.float64]
    regression: NDArray[np.float64]


class Limits(NamedTuple):
    """How small and how large magnitudes are told apart.

    Attributes
    ----------
    scale, recent, near
        What is added to the scales of rows, columns and matrices, of the last eight entries, and of the neighbours.
    smallest, largest
        Natural logarithms between which magnitudes are expected.
    octave, near_octave
        Octaves of the lowest bins of scales, and of that of the neighbours.
    """

    scale: float
    recent: float
    near: float
    smallest: float
    largest: float
    octave: float
    near_octave: float


# Of numbers in units of a matrix.
UNIT_LIMITS = Limits(scale=1e-3, recent=1e-3, near=1e-2, smallest=-9.2, largest=8.0, octave=-9.0, near_octave=-9.0)


class Expected(NamedTuple):
    """What is expected of the magnitude of an entry.

    Attributes
    ----------
    scale, per_scale, log
        It, one over it, and its natural logarithm.
    bin, row_bin, column_bin, near_bin
        The bins of it, and of the scales of row, column and neighbours; below `BINS`.
    """

    scale: float
    per_scale: float
    log: float
    bin: int
    row_bin: int
    column_bin: int
    near_bin: int


def new_regression() -> NDArray[np.float64]:
    """Return the coefficients of the expected log magnitude: constant, row, column, last eight, neighbours, ..."""
    return np.array([0.0, 0.3, 0.3, 0.15, 0.1, 0.1, 0.05])


def new_scales(scale: float, sibling: NDArray[np.float64], regression: NDArray[np.float64]) -> Scales:
    """Return the scales of a matrix of which no row is known but its mean magnitude."""
    width = sibling.size
    return Scales(
        columns=np.where(sibling > 0, 0.5 * scale + 0.5 * sibling, scale),
        means=np.zeros(width),
        seen=np.zeros(width),
        sibling=sibling,
        running=np.full(7, scale),
        features=np.ones(_FEATURES),
        regression=regression,
    )


@inlined
def begin_row(engine: Engine, scales: Scales) -> None:
    """Begin a row: with the matrix's scale and that of the row above."""
    slow_down(engine.mixer)
    running = scales.running
    start = running[_START]
    running[_ROW], running[_ROW_MEAN], running[_ROW_SEEN] = start, 0.0, 4.0
    running[_LAST_8], running[_LAST_32] = start, start


@inlined
def end_row(scales: Scales) -> None:
    """Keep what the next row begins with."""
    scales.running[_START] = 0.5 * scales.running[_WHOLE] + 0.5 * scales.running[_ROW]


@inlined
def start_of(scales: Scales) -> float:
    """Return the scale that a row begins with."""
    return float(scales.running[_START])


@inlined
def expected_scale(engine: Engine, scales: Scales, column: int, neighbours: float, limits: Limits) -> Expected:
    """Return what is expected of an entry's magnitude.

    Parameters
    ----------
    neighbours
        Mean magnitude of the residuals next to it.
    """
    running, features, table = scales.running, scales.features, engine.tables.log
    features[1] = natural_log(running[_ROW] + limits.scale, table)
    features[2] = natural_log(scales.columns[column] + limits.scale, table)
    features[3] = natural_log(running[_LAST_8] + limits.recent, table)
    features[4] = natural_log(neighbours + limits.near, table)
    features[5] = natural_log(running[_WHOLE] + limits.scale, table)
    sibling = scales.sibling[column]
    features[6] = natural_log(sibling + limits.scale, table) if sibling > 0.0 else features[5]
    log = 0.0
    for which in range(_FEATURES):
        log += scales.regression[which] * features[which]
    log = min(max(log, limits.smallest), limits.largest)
    scale = natural_power(log, engine.tables.exp)
    return Expected(
        scale,
        1.0 / scale,
        log,
        log_bin(log, 8.0, limits.octave),
        log_bin(features[1], 6.0, limits.octave),
        log_bin(features[2], 6.0, limits.octave),
        log_bin(features[4], 4.0, limits.near_octave),
    )


@inlined
def learn(scales: Scales, column: int, value: float, residual: float, per_scale: float) -> None:
    """Learn from an entry.

    Parameters
    ----------
    value
        What the means of rows and columns are of.
    residual
        The magnitude of what it differs by from what was expected.
    per_scale
        One over the magnitude that was expected of that.
    """
    running, features = scales.running, scales.features
    error = min(residual * per_scale - 1.0, 3.0)
    for which in range(_FEATURES):
        scales.regression[which] += 0.0008 * error * features[which] / (1.0 + abs(features[which]))
    seen = running[_ROW_SEEN] + 1.0
    weight = 1.0 / seen if seen < 200.0 else 0.005
    running[_ROW_SEEN] = seen
    running[_ROW] += (residual - running[_ROW]) * weight
    running[_ROW_MEAN] += (value - running[_ROW_MEAN]) * weight
    seen = scales.seen[column] + 1.0
    weight = 1.0 / (seen + 2.0) if seen < 120.0 else 0.008
    scales.seen[column] = seen
    scales.columns[column] += (residual - scales.columns[column]) * weight
    scales.means[column] += (value - scales.means[column]) * weight
    running[_LAST_8] += (residual - running[_LAST_8]) * 0.08
    running[_LAST_32] += (residual - running[_LAST_32]) * 0.025
    running[_WHOLE] += (residual - running[_WHOLE]) * 0.0005


@inlined
def row_tilt(scales: Scales, least: float) -> float:
    """Return the mean of a row's values in units of its scale."""
    return float(scales.running[_ROW_MEAN] / (scales.running[_ROW] + least))


@inlined
def column_tilt(scales: Scales, column: int, least: float) -> float:
    """Return the mean of a column's values in units of its scale."""
    return float(scales.means[column] / (scales.columns[column] + least))


@inlined
def lately(scales: Scales) -> float:
    """Return the scale of the last 32 entries."""
    return float(scales.running[_LAST_32])


class Shares(NamedTuple):
    """How often a flag about the entries of a matrix is set (float64).

    Attributes
    ----------
    columns
        Running share of each column.
    running
        Those of the whole matrix and of the row.
    """

    columns: NDArray[np.float64]
    running: NDArray[np.float64]


_OF_WHOLE, _OF_ROW = 0, 1


def new_shares(width: int) -> Shares:
    """Return shares of which nothing is known."""
    return Shares(np.full(width, 0.5), np.full(2, 0.5))


@inlined
def forget_row_share(shares: Shares) -> None:
    """Begin with the share of the matrix, as if no row were known."""
    shares.running[_OF_ROW] = shares.running[_OF_WHOLE]


@inlined
def begin_row_share(shares: Shares) -> None:
    """Begin a row between the share of the row above and the matrix's."""
    shares.running[_OF_ROW] = 0.5 * shares.running[_OF_ROW] + 0.5 * shares.running[_OF_WHOLE]


@inlined
def expect_share(engine: Engine, shares: Shares, column: int) -> None:
    """Expect a flag as often as in row and column: their mean; and as if they had nothing to do with each other."""
    own, row = shares.columns[column], shares.running[_OF_ROW]
    engine.parametric[0] = within(0.5 * (own + row))
    engine.parametric[1] = within(own * row / (shares.running[_OF_WHOLE] + 1e-4))


@inlined
def within(share: float) -> float:
    """Return a share that leaves room for the other case."""
    return min(max(share, 0.0005), 0.9995)


@inlined
def row_share_bin(engine: Engine, shares: Shares, octave: float) -> int:
    """Return the bin of a row's share."""
    return log_bin(natural_log(shares.running[_OF_ROW] + 1e-3, engine.tables.log), 3.0, octave)


@inlined
def column_share_bin(engine: Engine, shares: Shares, column: int, octave: float) -> int:
    """Return the bin of a column's share."""
    return log_bin(natural_log(shares.columns[column] + 1e-3, engine.tables.log), 3.0, octave)


@inlined
def learn_share(shares: Shares, column: int, flag: int) -> None:
    """Count a flag."""
    shares.columns[column] += (float(flag) - shares.columns[column]) * 0.02
    shares.running[_OF_ROW] += (float(flag) - shares.running[_OF_ROW]) * 0.02
    shares.running[_OF_WHOLE] += (float(flag) - shares.running[_OF_WHOLE]) * 0.0005
