"""The model of floats behind `mix` and `lin`: binary decisions about the fields of each entry of a matrix, row by row.

An entry is coded as zero or not, whether its lowest bits are all zero, its sign, its exponent and the first bits of its
mantissa from the highest down, and the rest of the mantissa as it is. Magnitudes are expected as in `integer_rows`;
Laplace and normal distributions around the expected value tell the probability of each bit of the fields.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled_in_place, inlined

from ..tables.logistic import natural_log
from .binary_coder import code_integer_evenly
from .bins import BINS, log_bin, signed_bin
from .expectations import Bound, bound, expect_over, expect_upper
from .linear_prediction import Prediction, predict_rest
from .logistic_mixing import Decision, Engine, mixed_bit, new_mixer
from .scales import (
    UNIT_LIMITS,
    Expected,
    Scales,
    Shares,
    begin_row,
    begin_row_share,
    column_share_bin,
    column_tilt,
    end_row,
    expect_share,
    expected_scale,
    forget_row_share,
    learn,
    learn_share,
    new_shares,
    row_share_bin,
    row_tilt,
    start_of,
    within,
)

# Bits of the mantissa that are modelled.
MODELLED = 7
FIELDS = ("zero flags", "signs", "exponents", "mantissas", "low mantissa bits")
_ZERO, _SIGN, _EXPONENT, _UPPER, _LOWER = range(5)


class _Nodes(NamedTuple):
    """Decisions that are told apart, or where families of them begin: exponents and mantissas by the bits before."""

    sign: int = 0
    exponents: int = 1
    mantissas: int = 256
    zero_flag: int = 320
    trailing_flag: int = 321
    zero_sign: int = 322
    end: int = 323


_NODES = _Nodes()
# Sets of weights: of bins of scales; of bins of what is expected, for signs; of neighbours, for flags.
_SIGN_SETS = 96
_FLAG_SETS = 128
# Exponents beyond this one count as it in contexts.
_MOST_EXPONENTS = 1300
# Values of each context.
_ZERO_BOUNDS = (1, 8, BINS, BINS, 1024, 256, 256, BINS)
_ZERO_SIGN_BOUNDS = (1, 8, 16, 16, 256, 128, 128, 32)
_TRAILING_BOUNDS = (1, 4, 16, 64, 2, 2, BINS, 768)
_SIGN_BOUNDS = (1, 4, 32, 32, 32, 1024, 1024, 512)
_EXPONENT_BOUNDS = (1, BINS, BINS, BINS, 1024, BINS, 768, 576)
_MANTISSA_BOUNDS = (1, 32, _MOST_EXPONENTS, 512, 768, 2, 16, 256)
# Numbers beyond so many units count as that many in statistics: one broken weight mustn't spoil them.
LARGEST = 1024.0
# Numbers of this octave and beyond are all worth the same.
HIGHEST_OCTAVE = 1001
_HIGHEST = 2.0**HIGHEST_OCTAVE


class FloatColumns(NamedTuple):
    """What is known of a matrix's columns and of the row above, in units of the matrix (float64).

    Attributes
    ----------
    nonzero
        How often entries aren't zero.
    negative_zeros
        Of each column: running share of negative ones among zeros.
    values, residuals
        Current row and the one above, padded by an entry on each side.
    signs, trailing
        Whether their sign bit is set; whether their lowest bits are zero (int64).
    shares
        Of shape (3,): of negative ones among the row's zeros; of trailing zeros in the row and in the matrix.
    """

    nonzero: Shares
    negative_zeros: NDArray[np.float64]
    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    signs: NDArray[np.int64]
    trailing: NDArray[np.int64]
    shares: NDArray[np.float64]


_ROW_NEGATIVE_ZEROS, _ROW_TRAILING, _TRAILING = range(3)


class Fields(NamedTuple):
    """How a float's word is read.

    Attributes
    ----------
    exponent_bits, mantissa_bits
        Widths of the two fields.
    trailing
        Lowest bits of the mantissa about which a flag tells whether they are all zero; 0 for no flag.
    zeros
        1: a flag tells zeros from other words; 2: some zeros are negative; 0: there are none.
    octave
        Exponent of two of a mantissa of one with exponent field zero, relative to the matrix's unit.
    powers
        float64 of shape (2**exponent_bits + 1,): what a mantissa of one is worth at each exponent, in units.
    """

    exponent_bits: int
    mantissa_bits: int
    trailing: int
    zeros: int
    octave: int
    powers: NDArray[np.float64]


class _Around(NamedTuple):
    """What is known around an entry: what is expected, and what stands to the left and above."""

    scale: Expected
    centre: float
    tilt: int
    left: float
    second: float
    up: float


def new_float_columns(width: int, scale: float) -> FloatColumns:
    """Return the columns of a matrix of which no row is known but its mean magnitude."""
    return FloatColumns(
        nonzero=new_shares(width),
        negative_zeros=np.full(width, 0.5),
        values=np.zeros((2, width + 2)),
        residuals=np.full((2, width + 2), scale),
        signs=np.zeros((2, width + 2), np.int64),
        trailing=np.zeros((2, width + 2), np.int64),
        shares=np.array([0.5, 0.05, 0.05]),
    )


def new_float_mixer() -> np.record:
    """Return the mixer of a stream's first floats."""
    bounds, kinds = np.empty((_NODES.end, len(_SIGN_BOUNDS)), np.int64), np.full(_NODES.end, _EXPONENT)
    bounds[: _NODES.mantissas] = _EXPONENT_BOUNDS
    # Exponents of more than eight bits share decisions, this one too.
    bounds[_NODES.sign] = np.maximum(_SIGN_BOUNDS, _EXPONENT_BOUNDS)
    bounds[_NODES.mantissas : _NODES.zero_flag] = _MANTISSA_BOUNDS
    bounds[_NODES.zero_flag] = _ZERO_BOUNDS
    bounds[_NODES.trailing_flag] = _TRAILING_BOUNDS
    bounds[_NODES.zero_sign] = _ZERO_SIGN_BOUNDS
    kinds[_NODES.mantissas : _NODES.zero_flag] = _UPPER
    kinds[_NODES.zero_flag], kinds[_NODES.trailing_flag] = _ZERO, _LOWER
    kinds[_NODES.sign] = kinds[_NODES.zero_sign] = _SIGN
    return new_mixer(bounds, kinds, len(FIELDS), _FLAG_SETS + 32)


@inlined
def worth(pattern: int, fields: Fields) -> float:
    """Return the magnitude, in units, of exponent and mantissa bits; never less for a larger pattern."""
    exponent = pattern >> fields.mantissa_bits
    if exponent > 1 << fields.exponent_bits:
        exponent = 1 << fields.exponent_bits
    part = float(pattern & ((1 << fields.mantissa_bits) - 1)) / float(1 << fields.mantissa_bits)
    return float(min(part * fields.powers[1] if exponent == 0 else (1.0 + part) * fields.powers[exponent], _HIGHEST))


@compiled_in_place
def code_float_rows(
    engine: Engine,
    scales: Scales,
    prediction: Prediction,
    rows: NDArray[np.int64],
    columns: FloatColumns,
    fields: Fields,
) -> None:
    """Encode rows of a matrix, or fill them with what is decoded.

    Parameters
    ----------
    prediction
        Of the rows, in units; what is expected of the entries follows from those coded before them.
    rows
        int64 of shape (rows, width): the words.
    """
    total = fields.exponent_bits + fields.mantissa_bits
    width = rows.shape[1]
    forget_row_share(columns.nonzero)
    for row in range(rows.shape[0]):
        begin_row(engine, scales)
        begin_row_share(columns.nonzero)
        columns.shares[_ROW_NEGATIVE_ZEROS] = 0.5
        columns.shares[_ROW_TRAILING] = columns.shares[_TRAILING]
        for column in range(width):
            word = rows[row, column]
            negative, pattern = (word >> total) & 1, word & ((1 << total) - 1)
            around = _look_around(engine, scales, float(prediction.expected[row, column]), columns, column)
            value, trailing, residual = 0.0, 0, around.scale.scale
            nonzero = 1
            if fields.zeros > 0:
                nonzero = mixed_bit(engine, min(pattern, 1), _tell_zero_flag(engine, around, columns, column))
                learn_share(columns.nonzero, column, nonzero)
            if nonzero == 0:
                pattern, negative = 0, negative if fields.zeros == 2 else 0
                if fields.zeros == 2:
                    negative = mixed_bit(engine, negative, _tell_zero_sign(engine, scales, columns, column))
                    _learn_zero_sign(columns, column, negative)
            else:
                if fields.trailing > 0:
                    trailing = 1 if word & ((1 << fields.trailing) - 1) == 0 else 0
                    trailing = mixed_bit(engine, trailing, _tell_trailing_flag(engine, around, columns, column))
                    columns.shares[_ROW_TRAILING] += (float(trailing) - columns.shares[_ROW_TRAILING]) * 0.1
                    columns.shares[_TRAILING] += (float(trailing) - columns.shares[_TRAILING]) * 0.001
                negative = mixed_bit(engine, negative, _tell_sign(engine, scales, around, column))
                upper = _code_upper_bits(engine, pattern, around, negative, trailing, fields)
                pattern = _code_lower_bits(engine, pattern, upper, trailing, fields)
                value = min(worth(pattern, fields), LARGEST)
                value = -value if negative else value
                residual = abs(value - around.centre)
                learn(engine, scales, column, value, residual, around.scale.per_scale)
            rows[row, column] = negative << total | pattern
            predict_rest(prediction, row, column, value - around.centre)
            columns.values[0, column + 1] = value
            columns.residuals[0, column + 1] = residual
            columns.signs[0, column + 1] = negative
            columns.trailing[0, column + 1] = trailing
        end_row(scales)
        _end_row(columns, start_of(scales))


@inlined
def _end_row(columns: FloatColumns, start: float) -> None:
    """Let the current row become the one above."""
    width = columns.values.shape[1]
    for place in range(width):
        columns.values[1, place] = columns.values[0, place]
        columns.residuals[1, place] = columns.residuals[0, place]
        columns.signs[1, place] = columns.signs[0, place]
        columns.trailing[1, place] = columns.trailing[0, place]
    columns.values[0, 0] = 0.0
    columns.residuals[0, 0] = start
    columns.signs[0, 0] = 0
    columns.trailing[0, 0] = columns.trailing[0, width - 2]


@inlined
def _look_around(engine: Engine, scales: Scales, centre: float, columns: FloatColumns, column: int) -> _Around:
    values, residuals = columns.values, columns.residuals
    neighbours = (2.0 * residuals[0, column] + 2.0 * residuals[1, column + 1] + residuals[1, column]) / 5.0
    scale = expected_scale(engine, scales, column, neighbours, UNIT_LIMITS)
    return _Around(
        scale,
        centre,
        signed_bin(centre * scale.per_scale, 6.0),
        values[0, column],
        values[0, column - 1] if column > 0 else 0.0,
        values[1, column + 1],
    )


@inlined
def _tell_zero_flag(engine: Engine, around: _Around, columns: FloatColumns, column: int) -> Decision:
    """Tell the contexts of whether an entry isn't zero."""
    slots, octave = engine.mixer.slots, UNIT_LIMITS.octave
    near = (1 if around.left != 0.0 else 0) + (2 if around.up != 0.0 else 0) + (4 if around.second != 0.0 else 0)
    expect_share(engine, columns.nonzero, column)
    row_bin = row_share_bin(engine, columns.nonzero, octave)
    column_bin = column_share_bin(engine, columns.nonzero, column, octave)
    slots[1] = near
    slots[2] = row_bin
    slots[3] = column_bin
    slots[4] = row_bin * 32 + column_bin
    slots[5] = near * 32 + column_bin
    slots[6] = near * 32 + row_bin
    slots[7] = log_bin(natural_log(engine.mixer.parametric[1], engine.tables), 8.0, octave)
    return _NODES.zero_flag, column_bin, _FLAG_SETS + near


@inlined
def _tell_zero_sign(engine: Engine, scales: Scales, columns: FloatColumns, column: int) -> Decision:
    """Tell the contexts of whether a zero is negative."""
    slots = engine.mixer.slots
    of_row, of_column = columns.shares[_ROW_NEGATIVE_ZEROS], columns.negative_zeros[column]
    engine.mixer.parametric[0] = 0.5 * (of_column + of_row)
    engine.mixer.parametric[1] = of_column
    near = columns.signs[0, column] + 2 * columns.signs[1, column + 1] + 4 * columns.signs[1, column + 2]
    column_bin, row_bin = int(of_column * 15.9), int(of_row * 15.9)
    slots[1] = near
    slots[2] = column_bin
    slots[3] = row_bin
    slots[4] = column_bin * 16 + row_bin
    slots[5] = column_bin * 8 + near
    slots[6] = row_bin * 8 + near
    slots[7] = signed_bin(column_tilt(scales, column, 1e-6), 8.0)
    return _NODES.zero_sign, near, _FLAG_SETS + 12 + near


@inlined
def _learn_zero_sign(columns: FloatColumns, column: int, negative: int) -> None:
    shares, of_columns = columns.shares, columns.negative_zeros
    shares[_ROW_NEGATIVE_ZEROS] += (float(negative) - shares[_ROW_NEGATIVE_ZEROS]) * 0.03
    of_columns[column] += (float(negative) - of_columns[column]) * 0.03


@inlined
def _tell_trailing_flag(engine: Engine, around: _Around, columns: FloatColumns, column: int) -> Decision:
    """Tell the contexts of whether the lowest bits are all zero."""
    slots, shares = engine.mixer.slots, columns.shares
    left, up = columns.trailing[0, column], columns.trailing[1, column + 1]
    near = left + 2 * up
    share = int(shares[_ROW_TRAILING] * 15.0)
    engine.mixer.parametric[0] = engine.mixer.parametric[1] = within(shares[_ROW_TRAILING])
    slots[1] = near
    slots[2] = share
    slots[3] = near * 16 + share
    slots[4] = left
    slots[5] = up
    slots[6] = around.scale.bin
    slots[7] = share * (BINS // 2) + around.scale.bin // 2
    return _NODES.trailing_flag, near, _FLAG_SETS + 8 + near


@inlined
def _tell_sign(engine: Engine, scales: Scales, around: _Around, column: int) -> Decision:
    """Tell the contexts of whether a value is negative."""
    slots, tilt = engine.mixer.slots, around.tilt
    column_bin = signed_bin(column_tilt(scales, column, 1e-6), 8.0)
    row_bin = signed_bin(row_tilt(scales, 1e-6), 8.0)
    slots[1] = (2 if around.left < 0.0 else 0) + (1 if around.up < 0.0 else 0)
    slots[2] = column_bin
    slots[3] = row_bin
    slots[4] = tilt
    slots[5] = tilt * 32 + column_bin
    slots[6] = column_bin * 32 + row_bin
    slots[7] = tilt * 16 + around.scale.bin // 6
    expect_over(engine, bound(engine, around.centre * around.scale.per_scale))
    return _NODES.sign, tilt, _SIGN_SETS + tilt


@inlined
def _beyond(engine: Engine, pattern: int, around: _Around, toward: float, fields: Fields) -> Bound:
    """Return the bound at a magnitude."""
    return bound(engine, (worth(pattern, fields) + toward) * around.scale.per_scale)


@inlined
def _code_upper_bits(
    engine: Engine, pattern: int, around: _Around, negative: int, trailing: int, fields: Fields
) -> int:
    """Return the exponent field and the bits of the mantissa that are modelled."""
    bin, total = around.scale.bin, fields.exponent_bits + fields.mantissa_bits
    # How far zero is from what is expected, on the side of the sign, and the bin of that.
    toward = around.centre if negative else -around.centre
    aside = 31 - around.tilt if negative else around.tilt
    _tell_exponent(engine, around, aside)
    # Were it a constant, what is called with it would be compiled for that too.
    known = int(np.int64(0))
    low, high = bound(engine, toward * around.scale.per_scale), _beyond(engine, 1 << total, around, toward, fields)
    for place in range(fields.exponent_bits + min(MODELLED, fields.mantissa_bits)):
        depth, shift = place - fields.exponent_bits, total - 1 - place
        node = ((1 << place) | known) & (_NODES.mantissas - 1)
        if depth == 0:
            _tell_mantissa(engine, known, around, aside, trailing, fields)
        if depth >= 0:
            node = (1 << depth) | (known & ((1 << depth) - 1))
            node = _NODES.mantissas + min(node, _NODES.zero_flag - _NODES.mantissas - 1)
        middle = _beyond(engine, (2 * known + 1) << shift, around, toward, fields)
        expect_upper(engine, low, middle, high)
        bit = mixed_bit(engine, (pattern >> shift) & 1, (node, bin, bin))
        if bit:
            low = middle
        else:
            high = middle
        known = 2 * known + bit
    return known


@inlined
def _tell_exponent(engine: Engine, around: _Around, aside: int) -> None:
    scale, slots = around.scale, engine.mixer.slots
    slots[1] = scale.bin
    slots[2] = scale.row_bin
    slots[3] = scale.column_bin
    slots[4] = (scale.row_bin // 3) * 32 + scale.column_bin // 3
    slots[5] = scale.near_bin
    slots[6] = (scale.bin // 4) * 32 + aside
    slots[7] = (scale.bin // 2) * 12 + min(scale.near_bin // 8, 11)


@inlined
def _tell_mantissa(engine: Engine, exponent: int, around: _Around, aside: int, trailing: int, fields: Fields) -> None:
    scale, slots = around.scale, engine.mixer.slots
    nearest = int(np.floor(scale.log * 1.4426950408889634)) - fields.octave
    apart = min(max(exponent - nearest + 10, 0), 15)
    slots[1] = apart * 2 + trailing
    slots[2] = min(exponent, _MOST_EXPONENTS - 1)
    slots[3] = apart * 32 + aside
    slots[4] = (scale.bin // 2) * 16 + apart
    slots[5] = trailing
    slots[6] = apart
    slots[7] = (aside // 2) * 16 + apart


@inlined
def _code_lower_bits(engine: Engine, pattern: int, upper: int, trailing: int, fields: Fields) -> int:
    """Return all bits below the sign: the upper ones, known already, and those that are told as they are."""
    lower = fields.mantissa_bits - min(MODELLED, fields.mantissa_bits)
    zeros = fields.trailing if trailing else 0
    rest = (pattern & ((1 << lower) - 1)) >> zeros
    rest = code_integer_evenly(engine.coder, engine.data, rest, lower - zeros)
    engine.mixer.spent[_LOWER] += lower - zeros
    return (upper << (lower - zeros) | rest) << zeros
