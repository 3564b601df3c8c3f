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

from kcomplex.machine.compiled import compiled_in_place, inlined

from ..tables.logistic import natural_log
from .binary_coder import code_integer_evenly
from .bins import log_bin, signed_bin
from .expectations import bound, expect_farther, expect_outside, expect_side, expect_upper
from .linear_prediction import Prediction, predict_rest
from .logistic_mixing import Decision, Engine, mixed_bit, new_mixer
from .scales import (
    Expected,
    Limits,
    Scales,
    begin_row,
    column_tilt,
    end_row,
    expected_scale,
    lately,
    learn,
    row_tilt,
)

FIELDS = ("zero flags", "signs", "magnitudes")
_ZERO, _SIGN, _MAGNITUDE = range(3)


class _Nodes(NamedTuple):
    """Decisions that are told apart, or where families of them begin: exponents in unary, the bits below."""

    zero_flag: int = 0
    sign: int = 1
    exponents: int = 2
    bits: int = 16
    end: int = 144


# A decision that is a constant of its own would have its mixing compiled for itself.
_NODES = _Nodes()
# Below the leading one, so many bits are modelled whatever the exponent; those of large numbers are even after that.
_MODELLED_BITS = 5
# Sets of weights: of bins of scales, and of bins of what is expected, for signs.
_SIGN_SETS = 96
_LIMITS = Limits(scale=0.02, recent=0.05, near=0.1, smallest=-5.8, largest=40.0, octave=-7.0, near_octave=-5.0)
# Values of each context, of signs and of the rest.
_SIGN_BOUNDS = (1, 9, 9, 32, 32, 1024, 32, 36, 36, 1024, 96, 384)
_BOUNDS = (1, 96, 96, 96, 1024, 96, 144, 1024, 96, 576, 768, 576)


class IntegerColumns(NamedTuple):
    """What is known of the row above while its columns are coded.

    Attributes
    ----------
    values
        int64 of shape (3, width + 4): rows in view (current, above, two above; padded by two entries on each side).
    residuals
        float64 of shape (2, width + 4): magnitudes of what entries differ by from what was expected.
    """

    values: NDArray[np.int64]
    residuals: NDArray[np.float64]


class _Around(NamedTuple):
    """What is known around an entry: what is expected, and entries to the left and above."""

    scale: Expected
    centre: float
    tilt: int
    left: int
    second: int
    up: int
    higher: int


def new_integer_columns(width: int, scale: float) -> IntegerColumns:
    """Return the columns of a matrix of which no row is known but its mean magnitude."""
    return IntegerColumns(np.zeros((3, width + 4), np.int64), np.full((2, width + 4), scale))


def new_integer_mixer() -> np.record:
    """Return the mixer of a stream's first integers."""
    bounds, kinds = np.tile(np.array(_BOUNDS), (_NODES.end, 1)), np.full(_NODES.end, _MAGNITUDE)
    kinds[_NODES.zero_flag], kinds[_NODES.sign] = _ZERO, _SIGN
    bounds[_NODES.sign] = _SIGN_BOUNDS
    return new_mixer(bounds, kinds, len(FIELDS), _SIGN_SETS + 32)


@compiled_in_place
def code_integer_rows(
    engine: Engine, scales: Scales, prediction: Prediction, rows: NDArray[np.int64], columns: IntegerColumns
) -> None:
    """Encode rows of a matrix, or fill them with what is decoded.

    Parameters
    ----------
    prediction
        Of the rows; what is expected of the entries follows from those coded before them.
    rows
        int64 of shape (rows, width).
    """
    values, residuals = columns.values, columns.residuals
    width = rows.shape[1]
    for row in range(rows.shape[0]):
        begin_row(engine, scales)
        for column in range(width):
            around = _look_around(engine, scales, float(prediction.expected[row, column]), columns, column)
            value = rows[row, column]
            if mixed_bit(engine, 1 if value != 0 else 0, _tell_zero_flag(engine, scales, around)):
                negative = mixed_bit(engine, 1 if value < 0 else 0, _tell_sign(engine, scales, around, column))
                magnitude = _code_magnitude(engine, scales, abs(value), around, negative)
                value = -magnitude if negative else magnitude
            else:
                value = 0
            rows[row, column] = value
            predict_rest(prediction, row, column, float(value) - around.centre)
            residual = abs(float(value) - around.centre)
            learn(engine, scales, column, float(value), residual, around.scale.per_scale)
            values[0, column + 2] = value
            residuals[0, column + 2] = residual
        end_row(scales)
        for place in range(width + 4):
            values[2, place] = values[1, place]
            values[1, place] = values[0, place]
            values[0, place] = 0
            residuals[1, place] = residuals[0, place]


@inlined
def _look_around(engine: Engine, scales: Scales, centre: float, columns: IntegerColumns, column: int) -> _Around:
    values, residuals = columns.values, columns.residuals
    neighbours = (
        2.0 * residuals[0, column + 1]
        + residuals[0, column]
        + 2.0 * residuals[1, column + 2]
        + residuals[1, column + 1]
        + residuals[1, column + 3]
    ) / 7.0
    scale = expected_scale(engine, scales, column, neighbours, _LIMITS)
    return _Around(
        scale,
        centre,
        signed_bin(centre / (scale.scale + 0.05), 6.0),
        values[0, column + 1],
        values[0, column],
        values[1, column + 2],
        values[2, column + 2],
    )


@inlined
def _tell_zero_flag(engine: Engine, scales: Scales, around: _Around) -> Decision:
    """Tell the contexts of whether a value isn't zero."""
    scale = around.scale
    _tell_magnitudes(engine, scales, around, abs(around.tilt - 16))
    low, high = (-0.5 - around.centre) * scale.per_scale, (0.5 - around.centre) * scale.per_scale
    expect_outside(engine, bound(engine, low), bound(engine, high))
    return _NODES.zero_flag, scale.bin, scale.bin


@inlined
def _tell_magnitudes(engine: Engine, scales: Scales, around: _Around, aside: int) -> None:
    """Tell the contexts of magnitudes; ``aside`` is how far, and to which side, zero is from what is expected."""
    scale, slots = around.scale, engine.mixer.slots
    lately_bin = log_bin(natural_log(lately(scales) + 1e-9, engine.tables), 5.0, _LIMITS.octave)
    left, second, up = min(abs(around.left), 11), min(abs(around.second), 7), min(abs(around.up), 11)
    slots[1] = scale.row_bin
    slots[2] = scale.column_bin
    slots[3] = scale.bin
    slots[4] = (scale.row_bin // 3) * 32 + scale.column_bin // 3
    slots[5] = left * 8 + second
    slots[6] = left * 12 + up
    slots[7] = (lately_bin // 3) * 32 + scale.column_bin // 3
    slots[8] = scale.near_bin
    slots[9] = (scale.bin // 2) * 12 + left
    slots[10] = (scale.bin // 4) * 32 + aside
    slots[11] = (scale.bin // 2) * 12 + up


@inlined
def _tell_sign(engine: Engine, scales: Scales, around: _Around, column: int) -> Decision:
    """Tell the contexts of whether a value is negative."""
    scale, slots, tilt = around.scale, engine.mixer.slots, around.tilt
    left, up = _side(around.left), _side(around.up)
    column_bin = signed_bin(column_tilt(scales, column, 0.02), 8.0)
    row_bin = signed_bin(row_tilt(scales, 0.02), 8.0)
    slots[1] = left * 3 + _side(around.second)
    slots[2] = up * 3 + _side(around.higher)
    slots[3] = column_bin
    slots[4] = row_bin
    slots[5] = column_bin * 32 + row_bin
    slots[6] = tilt
    slots[7] = left * 12 + min(abs(around.left), 11)
    slots[8] = up * 12 + min(abs(around.up), 11)
    slots[9] = tilt * 32 + column_bin
    slots[10] = scale.bin
    slots[11] = tilt * 12 + scale.bin // 8
    toward, away = (0.5 + around.centre) * scale.per_scale, (0.5 - around.centre) * scale.per_scale
    expect_side(engine, bound(engine, toward), bound(engine, away))
    return _NODES.sign, tilt, _SIGN_SETS + tilt


@inlined
def _side(value: int) -> int:
    return 1 if value > 0 else (2 if value < 0 else 0)


@inlined
def _code_magnitude(engine: Engine, scales: Scales, magnitude: int, around: _Around, negative: int) -> int:
    """Return a magnitude of at least one."""
    scale = around.scale
    toward = around.centre if negative else -around.centre
    _tell_magnitudes(engine, scales, around, 31 - around.tilt if negative else around.tilt)
    exponent, low, high = 0, 1.0, 2.0
    over_low, over_high = (
        bound(engine, (0.5 + toward) * scale.per_scale),
        bound(engine, (1.5 + toward) * scale.per_scale),
    )
    while exponent < 63:
        expect_farther(engine, over_low, over_high)
        larger = 1 if exponent < 62 and magnitude >= (2 << exponent) else 0
        if mixed_bit(engine, larger, (_NODES.exponents + min(exponent, 13), scale.bin, scale.bin)) == 0:
            break
        exponent += 1
        low, over_low, high = high, over_high, 2.0 * high
        over_high = bound(engine, (high - 0.5 + toward) * scale.per_scale)
    # Were it a constant, what is called with it would be compiled for that too.
    below, prefix = exponent, int(np.int64(1))
    while below > 0 and not (prefix >= 1 << _MODELLED_BITS and exponent > 10):
        below -= 1
        middle = (low + high) / 2.0
        over_middle = bound(engine, (middle - 0.5 + toward) * scale.per_scale)
        expect_upper(engine, over_low, over_middle, over_high)
        bit = mixed_bit(engine, (magnitude >> below) & 1, (_bit_node(exponent, prefix), scale.bin, scale.bin))
        if bit:
            low, over_low = middle, over_middle
        else:
            high, over_high = middle, over_middle
        prefix = 2 * prefix + bit
    engine.mixer.spent[_MAGNITUDE] += below
    rest = magnitude & ((1 << below) - 1)
    return prefix << below | code_integer_evenly(engine.coder, engine.data, rest, below)


@inlined
def _bit_node(exponent: int, prefix: int) -> int:
    """Return the decision about the next bit of a magnitude, told apart by up to five bits before it."""
    if exponent < 5:
        return _NODES.bits + (1 << exponent) - 2 + prefix
    return _NODES.bits + 32 + 16 * (min(exponent, 10) - 5) + min(prefix, 16) - 1
