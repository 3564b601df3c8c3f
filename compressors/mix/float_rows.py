"""The model of floats behind `mix` and `lin`: binary decisions about the fields of each entry of a matrix, row by row.

An entry is coded as zero or not, whether its lowest bits are all zero, its sign, its exponent and the first bits of its
mantissa from the highest down, and the rest of the mantissa as it is. Magnitudes are expected as in `mix_integers`;
Laplace and normal distributions around the expected value tell the probability of each bit of the fields.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled

from ..tables.logistic import Tables, mass, natural_log, natural_power, survival
from .binary_coder import Bytes, CoderState, code_evenly
from .bins import chance, log_bin, signed_bin
from .logistic_mixing import Mixer, learning_rate, mixed_bit, new_mixer

# Bits of the mantissa that are modelled.
MODELLED = 7
CONTEXTS = 8
# Octave of the lowest bin of scales.
_LOWEST = -9.0
_VALUES = 1300
# Decisions: 0 sign, 1.. exponent by the bits before, 256.. mantissa by the bits before, then two flags.
_MANTISSA = 256
_ZERO_FLAG, _TRAILING_FLAG, _ZERO_SIGN = 320, 321, 322
_NODES = 323
_SIGN_SETS = 96
_FLAG_SETS = 128
FIELDS = ("zero flags", "signs", "exponents", "mantissas", "low mantissa bits")
_ZERO, _SIGN, _EXPONENT, _UPPER, _LOWER = range(5)
_LIMIT = 255
# Numbers beyond so many units count as that many in statistics: one broken weight mustn't spoil them.
LARGEST = 1024.0


class FloatColumns(NamedTuple):
    """What is known of a matrix's columns and of the rows above, in units of the matrix (float64).

    Attributes
    ----------
    scale, mean, seen, sibling
        Of each column: running mean magnitude of the residual, of the value, non-zero entries seen, and the scale at
        the end of the last matrix of this width (0 if there is none).
    density, negative_zeros
        Of each column: running share of non-zero entries; of negative ones among zeros.
    values, residuals
        Current row and the one above, padded by an entry on each side.
    signs, trailing
        Whether their sign bit is set; whether their lowest bits are zero (int64).
    running
        The matrix's scale, the scale that a row begins with, its share of non-zero entries and of trailing zeros.
    """

    scale: NDArray[np.float64]
    mean: NDArray[np.float64]
    seen: NDArray[np.float64]
    sibling: NDArray[np.float64]
    density: NDArray[np.float64]
    negative_zeros: NDArray[np.float64]
    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    signs: NDArray[np.int64]
    trailing: NDArray[np.int64]
    running: NDArray[np.float64]


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


def new_float_columns(width: int, scale: float, sibling: NDArray[np.float64]) -> FloatColumns:
    """Return the columns of a matrix of which no row is known but its mean magnitude."""
    return FloatColumns(
        scale=np.where(sibling > 0, 0.5 * scale + 0.5 * sibling, scale),
        mean=np.zeros(width),
        seen=np.zeros(width),
        sibling=sibling,
        density=np.full(width, 0.5),
        negative_zeros=np.full(width, 0.5),
        values=np.zeros((2, width + 2)),
        residuals=np.full((2, width + 2), scale),
        signs=np.zeros((2, width + 2), np.int64),
        trailing=np.zeros((2, width + 2), np.int64),
        running=np.array([scale, scale, 0.5, 0.05]),
    )


def new_float_mixer() -> Mixer:
    """Return the mixer of a stream's first floats."""
    return new_mixer(CONTEXTS, _NODES, _VALUES, _NODES, _FLAG_SETS + 32)


@compiled
def worth(pattern: int, fields: Fields) -> float:
    """Return the magnitude, in units, of exponent and mantissa bits."""
    exponent = pattern >> fields.mantissa_bits
    if exponent > 1 << fields.exponent_bits:
        exponent = 1 << fields.exponent_bits
    part = float(pattern & ((1 << fields.mantissa_bits) - 1)) / float(1 << fields.mantissa_bits)
    return float(part * fields.powers[1] if exponent == 0 else (1.0 + part) * fields.powers[exponent])


@compiled
def code_float_rows(
    decoding: bool,
    state: CoderState,
    data: Bytes,
    rows: NDArray[np.int64],
    expected: NDArray[np.float32],
    factors: NDArray[np.float32],
    inverses: NDArray[np.float32],
    fields: Fields,
    columns: FloatColumns,
    regression: NDArray[np.float64],
    mixer: Mixer,
    tables: Tables,
    spent: NDArray[np.float64],
) -> None:
    """Encode rows of a matrix, or fill them with what is decoded.

    Parameters
    ----------
    rows
        int64 of shape (rows, width): the words.
    expected
        float32 of that shape: means known beforehand, in units; what linear prediction adds is added in place.
    factors, inverses
        Linear prediction from the entries to the left, see `linear_prediction.Factors`; of size 0 for none.
    """
    width = rows.shape[1]
    linear = factors.size > 0
    total = fields.exponent_bits + fields.mantissa_bits
    modelled = min(MODELLED, fields.mantissa_bits)
    lower = fields.mantissa_bits - modelled
    inputs = np.zeros(CONTEXTS + 4, np.int32)
    slots = np.zeros(CONTEXTS, np.int64)
    features = np.ones(7)
    parametric = np.zeros(2)
    scale, mean, seen, sibling, density = columns.scale, columns.mean, columns.seen, columns.sibling, columns.density
    current, above = columns.values[0], columns.values[1]
    residual, residual_above = columns.residuals[0], columns.residuals[1]
    sign, sign_above = columns.signs[0], columns.signs[1]
    trailing, trailing_above = columns.trailing[0], columns.trailing[1]
    whole, start, row_density, row_trailing = columns.running[0], columns.running[1], columns.running[2], 0.0
    for i in range(rows.shape[0]):
        row, row_seen, row_mean = start, 4.0, 0.0
        last8, row_negative_zeros = start, 0.5
        row_density = 0.5 * row_density + 0.5 * columns.running[2]
        row_trailing = columns.running[3]
        rate = learning_rate(mixer)
        for j in range(width):
            word = rows[i, j]
            negative = (word >> total) & 1
            pattern = word & ((1 << total) - 1)
            centre = float(expected[i, j])
            left, up = current[j], above[j + 1]
            second = current[j - 1] if j > 0 else 0.0
            neighbours = (2.0 * residual[j] + 2.0 * residual_above[j + 1] + residual_above[j]) / 5.0
            features[1] = natural_log(row + 1e-3, tables.log)
            features[2] = natural_log(scale[j] + 1e-3, tables.log)
            features[3] = natural_log(last8 + 1e-3, tables.log)
            features[4] = natural_log(neighbours + 1e-2, tables.log)
            features[5] = natural_log(whole + 1e-3, tables.log)
            features[6] = natural_log(sibling[j] + 1e-3, tables.log) if sibling[j] > 0.0 else features[5]
            log_scale = 0.0
            for k in range(7):
                log_scale += regression[k] * features[k]
            log_scale = min(max(log_scale, -9.2), 8.0)
            s = natural_power(log_scale, tables.exp)
            per_scale = 1.0 / s
            scale_bin = log_bin(log_scale, 8.0, _LOWEST)
            nonzero = 1
            if fields.zeros > 0:
                near = (1 if left != 0.0 else 0) + (2 if up != 0.0 else 0) + (4 if second != 0.0 else 0)
                likely = min(max(0.5 * (density[j] + row_density), 0.0005), 0.9995)
                parametric[0] = likely
                parametric[1] = min(max(density[j] * row_density / (columns.running[2] + 1e-4), 0.0005), 0.9995)
                row_bin = log_bin(natural_log(row_density + 1e-3, tables.log), 3.0, _LOWEST)
                column_bin = log_bin(natural_log(density[j] + 1e-3, tables.log), 3.0, _LOWEST)
                slots[0] = 0
                slots[1] = near
                slots[2] = row_bin
                slots[3] = column_bin
                slots[4] = row_bin * 32 + column_bin
                slots[5] = near * 32 + column_bin
                slots[6] = near * 32 + row_bin
                slots[7] = log_bin(natural_log(parametric[1], tables.log), 8.0, _LOWEST)
                nonzero = mixed_bit(
                    decoding, state, data, min(pattern, 1), parametric, _ZERO_FLAG, slots, column_bin, _ZERO_FLAG,
                    _FLAG_SETS + near, rate, _LIMIT, inputs, mixer, tables, spent, _ZERO,
                )  # fmt: skip
                row_density += (float(nonzero) - row_density) * 0.02
                density[j] += (float(nonzero) - density[j]) * 0.02
                columns.running[2] += (float(nonzero) - columns.running[2]) * 0.0005
            value = 0.0
            off = abs(centre)
            flag = 0
            if nonzero == 0:
                if fields.zeros == 2:
                    parametric[0] = 0.5 * (columns.negative_zeros[j] + row_negative_zeros)
                    parametric[1] = columns.negative_zeros[j]
                    near = sign[j] + 2 * sign_above[j + 1] + 4 * sign_above[j + 2]
                    column_bin, row_bin = int(columns.negative_zeros[j] * 15.9), int(row_negative_zeros * 15.9)
                    slots[0] = 0
                    slots[1] = near
                    slots[2] = column_bin
                    slots[3] = row_bin
                    slots[4] = column_bin * 16 + row_bin
                    slots[5] = column_bin * 8 + near
                    slots[6] = row_bin * 8 + near
                    slots[7] = signed_bin(mean[j] / (scale[j] + 1e-6), 8.0)
                    negative = mixed_bit(
                        decoding, state, data, negative, parametric, _ZERO_SIGN, slots, near, _ZERO_SIGN,
                        _FLAG_SETS + 12 + near, rate, _LIMIT, inputs, mixer, tables, spent, _SIGN,
                    )  # fmt: skip
                    row_negative_zeros += (float(negative) - row_negative_zeros) * 0.03
                    columns.negative_zeros[j] += (float(negative) - columns.negative_zeros[j]) * 0.03
                else:
                    negative = 0
                if decoding:
                    rows[i, j] = negative << total
                residual[j + 1] = s
            else:
                if fields.trailing > 0:
                    flag = 1 if word & ((1 << fields.trailing) - 1) == 0 else 0
                    near = trailing[j] + 2 * trailing_above[j + 1]
                    share = int(row_trailing * 15.0)
                    parametric[0] = parametric[1] = min(max(row_trailing, 0.0005), 0.9995)
                    slots[0] = 0
                    slots[1] = near
                    slots[2] = share
                    slots[3] = near * 16 + share
                    slots[4] = trailing[j]
                    slots[5] = trailing_above[j + 1]
                    slots[6] = scale_bin
                    slots[7] = share * 96 // 2 + scale_bin // 2
                    flag = mixed_bit(
                        decoding, state, data, flag, parametric, _TRAILING_FLAG, slots, near, _TRAILING_FLAG,
                        _FLAG_SETS + 8 + near, rate, _LIMIT, inputs, mixer, tables, spent, _LOWER,
                    )  # fmt: skip
                    row_trailing += (float(flag) - row_trailing) * 0.1
                    columns.running[3] += (float(flag) - columns.running[3]) * 0.001
                row_bin = log_bin(features[1], 6.0, _LOWEST)
                column_bin = log_bin(features[2], 6.0, _LOWEST)
                neighbour_bin = log_bin(features[4], 4.0, _LOWEST)
                tilt = signed_bin(centre * per_scale, 6.0)
                column_tilt = signed_bin(mean[j] / (scale[j] + 1e-6), 8.0)
                row_tilt = signed_bin(row_mean / (row + 1e-6), 8.0)
                for which in range(2):
                    parametric[which] = survival(centre * per_scale, tables.laplace if which == 0 else tables.normal)
                slots[0] = 0
                slots[1] = (1 if left < 0.0 else 0) * 2 + (1 if up < 0.0 else 0)
                slots[2] = column_tilt
                slots[3] = row_tilt
                slots[4] = tilt
                slots[5] = tilt * 32 + column_tilt
                slots[6] = column_tilt * 32 + row_tilt
                slots[7] = tilt * 16 + scale_bin // 6
                negative = mixed_bit(
                    decoding, state, data, negative, parametric, 0, slots, tilt, 0,
                    _SIGN_SETS + tilt, rate, _LIMIT, inputs, mixer, tables, spent, _SIGN,
                )  # fmt: skip
                toward = centre if negative else -centre
                aside = 31 - tilt if negative else tilt
                nearest = int(np.floor(log_scale * 1.4426950408889634)) - fields.octave
                known = 0
                low, high = 0.0, 1e30
                for place in range(fields.exponent_bits + modelled):
                    shift = total - 1 - place
                    base = known << (shift + 1)
                    low = worth(base, fields)
                    middle = worth(base + (1 << shift), fields)
                    high = worth(base + (2 << shift), fields)
                    for which in range(2):
                        table = tables.laplace if which == 0 else tables.normal
                        upper = mass((middle + toward) * per_scale, (high + toward) * per_scale, table)
                        parametric[which] = chance(
                            upper, mass((low + toward) * per_scale, (high + toward) * per_scale, table)
                        )
                    slots[0] = 0
                    if place < fields.exponent_bits:
                        node = ((1 << place) | known) & 255
                        slots[1] = scale_bin
                        slots[2] = row_bin
                        slots[3] = column_bin
                        slots[4] = (row_bin // 3) * 32 + column_bin // 3
                        slots[5] = neighbour_bin
                        slots[6] = (scale_bin // 4) * 32 + aside
                        slots[7] = (scale_bin // 2) * 12 + min(neighbour_bin // 8, 11)
                    else:
                        depth = place - fields.exponent_bits
                        prefix = (1 << depth) | (known & ((1 << depth) - 1))
                        node = _MANTISSA + min(prefix, 63)
                        exponent = known >> depth
                        apart = min(max(exponent - nearest + 10, 0), 15)
                        slots[1] = apart * 2 + flag
                        slots[2] = min(exponent, 1299)
                        slots[3] = apart * 32 + aside
                        slots[4] = (scale_bin // 2) * 16 + apart
                        slots[5] = flag
                        slots[6] = apart
                        slots[7] = (aside // 2) * 16 + apart
                    bit = mixed_bit(
                        decoding, state, data, (pattern >> shift) & 1, parametric, node, slots, scale_bin, node,
                        scale_bin, rate, _LIMIT, inputs, mixer, tables, spent,
                        _EXPONENT if place < fields.exponent_bits else _UPPER,
                    )  # fmt: skip
                    known = 2 * known + bit
                hidden = lower - fields.trailing if flag else lower
                rest = (pattern & ((1 << lower) - 1)) >> (lower - hidden)
                left_over = hidden
                while left_over > 0:
                    taken = min(left_over, 16)
                    piece = (rest >> (left_over - taken)) & ((1 << taken) - 1)
                    piece = code_evenly(decoding, state, data, piece, taken)
                    if decoding:
                        known = known << taken | piece
                    left_over -= taken
                spent[_LOWER] += hidden
                if decoding:
                    pattern = known << (lower - hidden)
                    rows[i, j] = negative << total | pattern
                value = min(worth(pattern, fields), LARGEST)
                if negative:
                    value = -value
                off = abs(value - centre)
                residual[j + 1] = off
                error = min(off * per_scale - 1.0, 3.0)
                for k in range(7):
                    regression[k] += 0.0008 * error * features[k] / (1.0 + abs(features[k]))
                row_seen += 1.0
                weight = 1.0 / row_seen if row_seen < 200.0 else 0.005
                row += (off - row) * weight
                row_mean += (value - row_mean) * weight
                seen[j] += 1.0
                weight = 1.0 / (seen[j] + 2.0) if seen[j] < 120.0 else 0.008
                scale[j] += (off - scale[j]) * weight
                mean[j] += (value - mean[j]) * weight
                last8 += (off - last8) * 0.08
                whole += (off - whole) * 0.0005
            if linear:
                step = np.float32(value - centre) * inverses[j]
                begin = j - j % factors.shape[1]
                for k in range(j + 1, min(begin + factors.shape[1], width)):
                    expected[i, k] += factors[j, k - begin] * step
            current[j + 1] = value
            sign[j + 1] = negative
            trailing[j + 1] = flag
        start = 0.5 * whole + 0.5 * row
        for j in range(width + 2):
            above[j] = current[j]
            residual_above[j] = residual[j]
            sign_above[j] = sign[j]
            trailing_above[j] = trailing[j]
        current[0] = 0.0
        residual[0] = start
        sign[0] = 0
        trailing[0] = trailing[width]
    columns.running[0], columns.running[1] = whole, start
