"""Running scales of a matrix, its rows and columns, and the regression that expects an entry's magnitude from them.

All models of rows share them: what an entry is expected to differ from its mean by, what is learned from it, and how
often a flag about entries is set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import inlined, record

from ..tables.logistic import natural_log, natural_power
from .bins import log_bin
from .logistic_mixing import FIRST_REGRESSION, Engine, slow_down

_COLUMN = np.dtype([("scale", "f8"), ("mean", "f8"), ("seen", "f8"), ("earlier", "f8")])


class Scales(NamedTuple):
    """What is known of the magnitudes of a matrix while its rows are coded.

    Attributes
    ----------
    columns
        Of each column: running mean magnitude of the residual, of the value, entries seen, and the scale at the end of
        the last matrix of this width (0 if there is none).
    running
        Running scales of the matrix, of what a row begins with, of the row, its mean, how many entries it counts, of
        the last eight entries and of the last 32; and the logarithms of the scales around an entry, which are expected
        to add up to the logarithm of its magnitude, times the coefficients of the mixer's regression.
    """

    columns: NDArray[np.void]
    running: np.record


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


def new_scales(scale: float, earlier: NDArray[np.float64]) -> Scales:
    """Return the scales of a matrix of which no row is known but its mean magnitude."""
    columns = np.zeros(earlier.size, _COLUMN)
    columns["scale"] = np.where(earlier > 0, 0.5 * scale + 0.5 * earlier, scale)
    columns["earlier"] = earlier
    running = dict.fromkeys(("whole", "start", "row", "row_mean", "row_seen", "last_8", "last_32"), scale)
    return Scales(columns, record(**running, features=np.ones(len(FIRST_REGRESSION))))


@inlined
def begin_row(engine: Engine, scales: Scales) -> None:
    """Begin a row: with the matrix's scale and that of the row above."""
    slow_down(engine.mixer)
    running = scales.running
    running.row, running.row_mean, running.row_seen = running.start, 0.0, 4.0
    running.last_8, running.last_32 = running.start, running.start


@inlined
def end_row(scales: Scales) -> None:
    """Keep what the next row begins with."""
    scales.running.start = 0.5 * scales.running.whole + 0.5 * scales.running.row


@inlined
def start_of(scales: Scales) -> float:
    """Return the scale that a row begins with."""
    return float(scales.running.start)


@inlined
def expected_scale(engine: Engine, scales: Scales, column: int, neighbours: float, limits: Limits) -> Expected:
    """Return what is expected of an entry's magnitude.

    Parameters
    ----------
    neighbours
        Mean magnitude of the residuals next to it.
    """
    running, features, tables = scales.running, scales.running.features, engine.tables
    features[1] = running.row + limits.scale
    features[2] = scales.columns[column].scale + limits.scale
    features[3] = running.last_8 + limits.recent
    features[4] = neighbours + limits.near
    features[5] = running.whole + limits.scale
    earlier = scales.columns[column].earlier
    features[6] = earlier + limits.scale if earlier > 0.0 else features[5]
    log = engine.mixer.regression[0]
    for which in range(1, features.size):
        features[which] = natural_log(features[which], tables)
        log += engine.mixer.regression[which] * features[which]
    log = min(max(log, limits.smallest), limits.largest)
    scale = natural_power(log, tables)
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
def learn(engine: Engine, scales: Scales, column: int, value: float, residual: float, per_scale: float) -> None:
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
    running, features, known = scales.running, scales.running.features, scales.columns[column]
    error = min(residual * per_scale - 1.0, 3.0)
    for which in range(features.size):
        engine.mixer.regression[which] += 0.0008 * error * features[which] / (1.0 + abs(features[which]))
    seen = running.row_seen + 1.0
    weight = 1.0 / seen if seen < 200.0 else 0.005
    running.row_seen = seen
    running.row += (residual - running.row) * weight
    running.row_mean += (value - running.row_mean) * weight
    seen = known.seen + 1.0
    weight = 1.0 / (seen + 2.0) if seen < 120.0 else 0.008
    known.seen = seen
    known.scale += (residual - known.scale) * weight
    known.mean += (value - known.mean) * weight
    running.last_8 += (residual - running.last_8) * 0.08
    running.last_32 += (residual - running.last_32) * 0.025
    running.whole += (residual - running.whole) * 0.0005


@inlined
def row_tilt(scales: Scales, least: float) -> float:
    """Return the mean of a row's values in units of its scale."""
    return float(scales.running.row_mean / (scales.running.row + least))


@inlined
def column_tilt(scales: Scales, column: int, least: float) -> float:
    """Return the mean of a column's values in units of its scale."""
    return float(scales.columns[column].mean / (scales.columns[column].scale + least))


@inlined
def lately(scales: Scales) -> float:
    """Return the scale of the last 32 entries."""
    return float(scales.running.last_32)


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
    running: np.record


def new_shares(width: int) -> Shares:
    """Return shares of which nothing is known."""
    return Shares(np.full(width, 0.5), record(whole=0.5, row=0.5))


@inlined
def forget_row_share(shares: Shares) -> None:
    """Begin with the share of the matrix, as if no row were known."""
    shares.running.row = shares.running.whole


@inlined
def begin_row_share(shares: Shares) -> None:
    """Begin a row between the share of the row above and the matrix's."""
    shares.running.row = 0.5 * shares.running.row + 0.5 * shares.running.whole


@inlined
def expect_share(engine: Engine, shares: Shares, column: int) -> None:
    """Expect a flag as often as in row and column: their mean; and as if they had nothing to do with each other."""
    own, row = shares.columns[column], shares.running.row
    engine.mixer.parametric[0] = within(0.5 * (own + row))
    engine.mixer.parametric[1] = within(own * row / (shares.running.whole + 1e-4))


@inlined
def within(share: float) -> float:
    """Return a share that leaves room for the other case."""
    return min(max(share, 0.0005), 0.9995)


@inlined
def row_share_bin(engine: Engine, shares: Shares, octave: float) -> int:
    """Return the bin of a row's share."""
    return log_bin(natural_log(shares.running.row + 1e-3, engine.tables), 3.0, octave)


@inlined
def column_share_bin(engine: Engine, shares: Shares, column: int, octave: float) -> int:
    """Return the bin of a column's share."""
    return log_bin(natural_log(shares.columns[column] + 1e-3, engine.tables), 3.0, octave)


@inlined
def learn_share(shares: Shares, column: int, flag: int) -> None:
    """Count a flag."""
    shares.columns[column] += (float(flag) - shares.columns[column]) * 0.02
    shares.running.row += (float(flag) - shares.running.row) * 0.02
    shares.running.whole += (float(flag) - shares.running.whole) * 0.0005
