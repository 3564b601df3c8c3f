"""The model of integers behind `mix` and `lin`: binary decisions about each entry of a matrix, row by row.

An entry is coded as zero or not, its sign, the magnitude's exponent in unary (``m >= 2**k``?) and the bits below the
leading one. The expected magnitude follows from a running regression on the scales of row, column, neighbours, matrix
and earlier matrices of the same width; around the expected value (see `linear_prediction`) Laplace and normal
distributions of that magnitude give parametric predictions, which are mixed with adaptive ones in contexts of the same
quantities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled

from ..tables.logistic import Tables, mass, natural_log, natural_power, survival
from .binary_coder import Bytes, CoderState, code_bit
from .bins import chance, log_bin, signed_bin
from .logistic_mixing import Mixer, learning_rate, mixed_bit, new_mixer

CONTEXTS = 12
_VALUES = 1300
# Decisions: 0 zero flag, 1 sign, 2.. unary exponent, 16.. bits of the magnitude below the leading one.
_NODES = 144
_UNARY = 2
_BITS = 16
_SIGN_SETS = 96
ZERO, SIGN, MAGNITUDE = 0, 1, 2
FIELDS = ("zero flags", "signs", "magnitudes")
LIMIT = 255


class Columns(NamedTuple):
    """What is known of a matrix's columns and of the rows above while its rows are coded (float64 and int64).

    Attributes
    ----------
    scale, mean, seen, sibling
        Of each column: running mean magnitude of the residual, of the value, rows seen, and the scale at the end of
        the last matrix of this width (0 if there is none).
    values, residuals
        Rows in view (current, above, two above; padded by two entries on each side), and residual magnitudes.
    running
        The matrix's scale, and the scale that a row begins with.
    """

    scale: NDArray[np.float64]
    mean: NDArray[np.float64]
    seen: NDArray[np.float64]
    sibling: NDArray[np.float64]
    values: NDArray[np.int64]
    residuals: NDArray[np.float64]
    running: NDArray[np.float64]


def new_columns(width: int, scale: float, sibling: NDArray[np.float64]) -> Columns:
    """Return the columns of a matrix of which no row is known but its mean magnitude."""
    return Columns(
        scale=np.where(sibling > 0, 0.5 * scale + 0.5 * sibling, scale),
        mean=np.zeros(width),
        seen=np.zeros(width),
        sibling=sibling,
        values=np.zeros((3, width + 4), np.int64),
        residuals=np.full((2, width + 4), scale),
        running=np.full(2, scale),
    )


def new_integer_mixer() -> Mixer:
    """Return the mixer of a stream's first integers."""
    return new_mixer(CONTEXTS, _NODES, _VALUES, _NODES, _SIGN_SETS + 32)


def new_regression() -> NDArray[np.float64]:
    """Return the coefficients of the expected log magnitude: constant, row, column, last eight, neighbours, ..."""
    return np.array([0.0, 0.3, 0.3, 0.15, 0.1, 0.1, 0.05])


@compiled
def _bit_node(exponent: int, prefix: int) -> int:
    """Return the decision about the next bit of a magnitude, told apart by up to five bits before it."""
    if exponent < 5:
        return _BITS + (1 << exponent) - 2 + prefix
    return _BITS + 32 + 16 * (min(exponent, 10) - 5) + min(prefix, 16) - 1


@compiled
def code_integer_rows(
    decoding: bool,
    state: CoderState,
    data: Bytes,
    rows: NDArray[np.int64],
    expected: NDArray[np.float32],
    factors: NDArray[np.float32],
    inverses: NDArray[np.float32],
    columns: Columns,
    regression: NDArray[np.float64],
    mixer: Mixer,
    tables: Tables,
    spent: NDArray[np.float64],
) -> None:
    """Encode rows of a matrix, or fill them with what is decoded.

    Parameters
    ----------
    rows
        int64 of shape (rows, width).
    expected
        float32 of that shape: means known beforehand; what linear prediction adds is added in place.
    factors, inverses
        Linear prediction from the entries to the left, see `linear_prediction.Factors`; of size 0 for none.
    """
    width = rows.shape[1]
    linear = factors.size > 0
    inputs = np.zeros(CONTEXTS + 4, np.int32)
    slots = np.zeros(CONTEXTS, np.int64)
    features = np.ones(7)
    parametric = np.zeros(2)
    scale, mean, seen, sibling = columns.scale, columns.mean, columns.seen, columns.sibling
    current, above, higher = columns.values[0], columns.values[1], columns.values[2]
    residual, residual_above = columns.residuals[0], columns.residuals[1]
    whole, start = columns.running[0], columns.running[1]
    for i in range(rows.shape[0]):
        row, row_seen, row_mean = start, 4.0, 0.0
        last8, last32 = start, start
        rate = learning_rate(mixer)
        for j in range(width):
            value = rows[i, j]
            magnitude = abs(value)
            centre = float(expected[i, j])
            left, second, up = current[j + 1], current[j], above[j + 2]
            neighbours = (
                2.0 * residual[j + 1]
                + residual[j]
                + 2.0 * residual_above[j + 2]
                + residual_above[j + 1]
                + residual_above[j + 3]
            ) / 7.0
            features[1] = natural_log(row + 0.02, tables.log)
            features[2] = natural_log(scale[j] + 0.02, tables.log)
            features[3] = natural_log(last8 + 0.05, tables.log)
            features[4] = natural_log(neighbours + 0.1, tables.log)
            features[5] = natural_log(whole + 0.02, tables.log)
            features[6] = natural_log(sibling[j] + 0.02, tables.log) if sibling[j] > 0.0 else features[5]
            log_scale = 0.0
            for k in range(7):
                log_scale += regression[k] * features[k]
            log_scale = min(max(log_scale, -5.8), 40.0)
            s = natural_power(log_scale, tables.exp)
            per_scale = 1.0 / s
            scale_bin = log_bin(log_scale, 8.0, -7.0)
            row_bin = log_bin(features[1], 6.0, -7.0)
            column_bin = log_bin(features[2], 6.0, -7.0)
            long_bin = log_bin(natural_log(last32 + 1e-9, tables.log), 5.0, -7.0)
            neighbour_bin = log_bin(features[4], 4.0, -5.0)
            near_left, near_second, near_up = min(abs(left), 11), min(abs(second), 7), min(abs(up), 11)
            tilt = signed_bin(centre / (s + 0.05), 6.0)
            stage, node, exponent, below, prefix = 0, 0, 0, 0, 1
            low, high = 0.0, 1e300
            toward = 0.0
            while True:
                if stage == 0:
                    bit = 1 if magnitude > 0 else 0
                    node = 0
                    parametric[0] = 1.0 - mass((-0.5 - centre) * per_scale, (0.5 - centre) * per_scale, tables.laplace)
                    parametric[1] = 1.0 - mass((-0.5 - centre) * per_scale, (0.5 - centre) * per_scale, tables.normal)
                elif stage == 1:
                    bit = 1 if value < 0 else 0
                    node = 1
                    for which in range(2):
                        table = tables.laplace if which == 0 else tables.normal
                        negative = survival((0.5 + centre) * per_scale, table)
                        parametric[which] = chance(negative, negative + survival((0.5 - centre) * per_scale, table))
                elif stage == 2:
                    bit = 1 if exponent < 62 and magnitude >= (2 << exponent) else 0
                    node = _UNARY + min(exponent, 13)
                    for which in range(2):
                        table = tables.laplace if which == 0 else tables.normal
                        parametric[which] = chance(
                            survival((2.0 * low - 0.5 + toward) * per_scale, table),
                            survival((low - 0.5 + toward) * per_scale, table),
                        )
                else:
                    bit = (magnitude >> (below - 1)) & 1
                    node = _bit_node(exponent, prefix)
                    middle = (low + high) / 2.0
                    for which in range(2):
                        table = tables.laplace if which == 0 else tables.normal
                        parametric[which] = chance(
                            mass((middle - 0.5 + toward) * per_scale, (high - 0.5 + toward) * per_scale, table),
                            mass((low - 0.5 + toward) * per_scale, (high - 0.5 + toward) * per_scale, table),
                        )
                quick_slot = scale_bin
                second_set = scale_bin
                slots[0] = 0
                if stage == 1:
                    a = 1 if left > 0 else (2 if left < 0 else 0)
                    b = 1 if second > 0 else (2 if second < 0 else 0)
                    u = 1 if up > 0 else (2 if up < 0 else 0)
                    h = higher[j + 2]
                    h = 1 if h > 0 else (2 if h < 0 else 0)
                    column_tilt = signed_bin(mean[j] / (scale[j] + 0.02), 8.0)
                    row_tilt = signed_bin(row_mean / (row + 0.02), 8.0)
                    slots[1] = a * 3 + b
                    slots[2] = u * 3 + h
                    slots[3] = column_tilt
                    slots[4] = row_tilt
                    slots[5] = column_tilt * 32 + row_tilt
                    slots[6] = tilt
                    slots[7] = a * 12 + near_left + 100
                    slots[8] = u * 12 + near_up + 100
                    slots[9] = tilt * 32 + column_tilt
                    slots[10] = scale_bin
                    slots[11] = tilt * 12 + scale_bin // 8
                    quick_slot = tilt
                    second_set = _SIGN_SETS + tilt
                else:
                    aside = tilt
                    if stage == 0:
                        aside = abs(tilt - 16)
                    elif value < 0:
                        aside = 31 - tilt
                    slots[1] = row_bin
                    slots[2] = column_bin
                    slots[3] = scale_bin
                    slots[4] = (row_bin // 3) * 32 + column_bin // 3
                    slots[5] = near_left * 8 + near_second
                    slots[6] = near_left * 12 + near_up
                    slots[7] = (long_bin // 3) * 32 + column_bin // 3
                    slots[8] = neighbour_bin
                    slots[9] = (scale_bin // 2) * 12 + near_left
                    slots[10] = (scale_bin // 4) * 32 + aside
                    slots[11] = (scale_bin // 2) * 12 + near_up
                bit = mixed_bit(
                    decoding, state, data, bit, parametric, node, slots, quick_slot, node, second_set, rate, LIMIT,
                    inputs, mixer, tables, spent, min(stage, MAGNITUDE),
                )  # fmt: skip
                if stage == 0:
                    if bit == 0:
                        value = 0
                        break
                    stage = 1
                elif stage == 1:
                    stage, exponent, low = 2, 0, 1.0
                    toward = centre if bit else -centre
                    if decoding:
                        value = -1 if bit else 1
                elif stage == 2:
                    if bit:
                        exponent += 1
                        low *= 2.0
                        if exponent < 63:
                            continue
                    if exponent == 0:
                        magnitude = 1
                        break
                    high = 2.0 * low
                    if decoding:
                        magnitude = 1 << exponent
                    stage, below, prefix = 3, exponent, 1
                else:
                    if decoding and bit:
                        magnitude |= 1 << (below - 1)
                    if bit:
                        low = (low + high) / 2.0
                    else:
                        high = (low + high) / 2.0
                    below -= 1
                    if below == 0:
                        break
                    prefix = 2 * prefix + bit
                    if prefix >= 32 and exponent > 10:
                        break
            while below > 0:
                bit = code_bit(decoding, state, data, (magnitude >> (below - 1)) & 1, 32768)
                if decoding and bit:
                    magnitude |= 1 << (below - 1)
                spent[MAGNITUDE] += 1.0
                below -= 1
            if decoding:
                value = magnitude if value > 0 else (-magnitude if value < 0 else 0)
                rows[i, j] = value
            off = float(value) - centre
            if linear:
                step = np.float32(off) * inverses[j]
                begin = j - j % factors.shape[1]
                for k in range(j + 1, min(begin + factors.shape[1], width)):
                    expected[i, k] += factors[j, k - begin] * step
            off = abs(off)
            error = min(off * per_scale - 1.0, 3.0)
            for k in range(7):
                regression[k] += 0.0008 * error * features[k] / (1.0 + abs(features[k]))
            row_seen += 1.0
            weight = 1.0 / row_seen if row_seen < 200.0 else 0.005
            row += (off - row) * weight
            row_mean += (float(value) - row_mean) * weight
            seen[j] += 1.0
            weight = 1.0 / (seen[j] + 2.0) if seen[j] < 120.0 else 0.008
            scale[j] += (off - scale[j]) * weight
            mean[j] += (float(value) - mean[j]) * weight
            last8 += (off - last8) * 0.08
            last32 += (off - last32) * 0.025
            whole += (off - whole) * 0.0005
            current[j + 2] = value
            residual[j + 2] = off
        start = 0.5 * whole + 0.5 * row
        for j in range(width + 4):
            higher[j] = above[j]
            above[j] = current[j]
            current[j] = 0
            residual_above[j] = residual[j]
    columns.running[0], columns.running[1] = whole, start
