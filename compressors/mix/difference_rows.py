"""The model behind `mix` and `lin` of entries given others: how far each one is from what is expected of it.

An entry is a place on a line: an integer is its own place, floats are counted in order from zero. What is expected is a
number, made of the given weights and of the linear prediction; it has a nearest place, and an entry is coded by the
number of places between them: none, the side, the number's exponent from the expected one up or down, and the bits
below the leading one as far as they say anything. Flags tell entries that are zero and entries that are as given, where
there are many. Laplace and normal distributions around what is expected tell the probability of each decision, which
is mixed with adaptive ones as in `mix_integers`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled

from ..tables.logistic import Tables, mass, natural_log, natural_power, survival
from .binary_coder import Bytes, CoderState, code_evenly
from .bins import chance, log_bin, signed_bin
from .float_rows import LARGEST, Fields, worth
from .logistic_mixing import Mixer, learning_rate, mixed_bit, new_mixer

CONTEXTS = 12
_LOWEST = -9.0
_VALUES = 1300
# Decisions: flags and the side, exponents by the expected one and by how far from it, the bits below by both.
_ZERO_FLAG, _ZERO_SIGN, _SAME_FLAG, _NONE_FLAG, _SIDE, _EXPONENTS, _BITS = 0, 1, 2, 3, 4, 5, 5 + 6 * 24
_NODES = _BITS + 8 * 8
_SIDE_SETS = 96
# Numbers of places are at most 2**62; bits below the leading one are modelled at most so far down.
_HIGHEST = 62
_DEEPEST = 6
# Where the places are finer than the differences by so many octaves, none between them isn't worth a flag.
_FINE = 6
_LIMIT = 255
ZERO, SAME, SIDE, DISTANCE, LOWER = range(5)
FIELDS = ("zero flags", "unchanged flags", "signs", "differences", "low bits")


class Places(NamedTuple):
    """What the places on the line are, and what is told of them.

    Attributes
    ----------
    fields
        Of a float, see `mix_floats.Fields`; with no exponent bits the places are integers, `Fields.powers` their unit.
        A flag tells zeros where `Fields.zeros` is positive, and their sign where it is 2.
    same
        Whether a flag tells entries that are the nearest to the given number.
    """

    fields: Fields
    same: bool


class DifferenceColumns(NamedTuple):
    """What is known of a matrix's columns and of the row above, in units of the differences (float64).

    Attributes
    ----------
    scale, mean, seen, sibling
        Of each column: running mean magnitude of the differences, of the differences, rows seen, and the scale at the
        end of the last matrix of this width (0 if there is none).
    nonzero, moved
        Of each column: running share of entries that aren't zero; that aren't as given.
    differences
        Current row and the one above, padded by two entries on each side.
    flags
        What was told of them (int64): 1 not zero, 2 not as given.
    running
        The matrix's scale, the scale that a row begins with, its shares of entries that aren't zero or as given.
    """

    scale: NDArray[np.float64]
    mean: NDArray[np.float64]
    seen: NDArray[np.float64]
    sibling: NDArray[np.float64]
    nonzero: NDArray[np.float64]
    moved: NDArray[np.float64]
    differences: NDArray[np.float64]
    flags: NDArray[np.int64]
    running: NDArray[np.float64]


def new_difference_columns(width: int, scale: float, sibling: NDArray[np.float64]) -> DifferenceColumns:
    """Return the columns of a matrix of which no row is known but its mean magnitude of differences."""
    return DifferenceColumns(
        scale=np.where(sibling > 0, 0.5 * scale + 0.5 * sibling, scale),
        mean=np.zeros(width),
        seen=np.zeros(width),
        sibling=sibling,
        nonzero=np.full(width, 0.5),
        moved=np.full(width, 0.5),
        differences=np.zeros((2, width + 4)),
        flags=np.zeros((2, width + 4), np.int64),
        running=np.array([scale, scale, 0.5, 0.5]),
    )


def new_difference_mixer() -> Mixer:
    """Return the mixer of a stream's first differences."""
    return new_mixer(CONTEXTS, _NODES, _VALUES, _NODES, _SIDE_SETS + 32)


@compiled
def number(place: int, fields: Fields) -> float:
    """Return what a place stands for, in units."""
    if fields.exponent_bits == 0:
        return float(place * fields.powers[0])
    return float(worth(place, fields) if place >= 0 else -worth(-place - 1, fields))


@compiled
def nearest(value: float, fields: Fields) -> int:
    """Return the place that is nearest to a finite number."""
    if fields.exponent_bits == 0:
        return int(np.floor(min(max(value / fields.powers[0], -1e15), 1e15) + 0.5))
    magnitude = abs(value)
    mantissa, exponent = math.frexp(magnitude)
    field = exponent - 1 - fields.octave
    one = 1 << fields.mantissa_bits
    top = (1 << (fields.exponent_bits + fields.mantissa_bits)) - 1
    if field < 1 or magnitude == 0.0:
        pattern = int(np.floor(magnitude / fields.powers[1] * one + 0.5))
    elif field >= 1 << fields.exponent_bits:
        pattern = top
    else:
        pattern = min((field << fields.mantissa_bits) + int(np.floor((2.0 * mantissa - 1.0) * one + 0.5)), top)
    return pattern if value >= 0.0 else -pattern - 1


@compiled
def numbers_of(places: NDArray[np.int64], fields: Fields) -> NDArray[np.float64]:
    """Return what the places of a matrix stand for, in units."""
    numbers = np.empty(places.shape)
    for i in range(places.shape[0]):
        for j in range(places.shape[1]):
            numbers[i, j] = number(places[i, j], fields)
    return numbers


@compiled
def nearest_places(numbers: NDArray[np.float64], fields: Fields) -> NDArray[np.int64]:
    """Return the places that are nearest to the finite numbers of a matrix."""
    places = np.empty(numbers.shape, np.int64)
    for i in range(numbers.shape[0]):
        for j in range(numbers.shape[1]):
            places[i, j] = nearest(numbers[i, j], fields)
    return places


@compiled
def _edge(place: int, fields: Fields) -> float:
    """Return the lower end of what is rounded to a place."""
    return 0.5 * (number(place - 1, fields) + number(place, fields))


@compiled
def _edge_beyond(base: int, backwards: bool, steps: int, fields: Fields) -> float:
    """Return the nearer end of what is so many places beyond a base, on one side of it."""
    return _edge(base - steps + 1, fields) if backwards else _edge(base + steps, fields)


@compiled
def code_difference_rows(
    decoding: bool,
    state: CoderState,
    data: Bytes,
    rows: NDArray[np.int64],
    expected: NDArray[np.float32],
    factors: NDArray[np.float32],
    inverses: NDArray[np.float32],
    given: NDArray[np.float64],
    places: Places,
    columns: DifferenceColumns,
    regression: NDArray[np.float64],
    mixer: Mixer,
    tables: Tables,
    spent: NDArray[np.float64],
) -> None:
    """Encode rows of a matrix, or fill them with what is decoded.

    Parameters
    ----------
    rows
        int64 of shape (rows, width): the places.
    expected
        float32 of that shape, zeros: room for what linear prediction adds to the means.
    factors, inverses
        Linear prediction from the entries to the left, see `linear_prediction.Factors`; of size 0 for none.
    given
        float64 of that shape: finite means known beforehand, in units.
    """
    width = rows.shape[1]
    linear = factors.size > 0
    fields = places.fields
    minus = -1 if fields.zeros == 2 else 0
    inputs = np.zeros(CONTEXTS + 4, np.int32)
    slots = np.zeros(CONTEXTS, np.int64)
    features = np.ones(7)
    parametric = np.zeros(2)
    scale, mean, seen, sibling = columns.scale, columns.mean, columns.seen, columns.sibling
    nonzero, moved = columns.nonzero, columns.moved
    current, above = columns.differences[0], columns.differences[1]
    flags, flags_above = columns.flags[0], columns.flags[1]
    whole, start = columns.running[0], columns.running[1]
    row_nonzero, row_moved = columns.running[2], columns.running[3]
    for i in range(rows.shape[0]):
        row, row_seen, row_mean, last8 = start, 4.0, 0.0, start
        row_nonzero = 0.5 * row_nonzero + 0.5 * columns.running[2]
        row_moved = 0.5 * row_moved + 0.5 * columns.running[3]
        rate = learning_rate(mixer)
        for j in range(width):
            place = rows[i, j]
            known = given[i, j]
            centre = known + float(expected[i, j])
            left, second, up = current[j + 1], current[j], above[j + 2]
            neighbours = (2.0 * abs(left) + abs(second) + 2.0 * abs(up) + abs(above[j + 1]) + abs(above[j + 3])) / 7.0
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
            row_bin = log_bin(features[1], 6.0, _LOWEST)
            column_bin = log_bin(features[2], 6.0, _LOWEST)
            neighbour_bin = log_bin(features[4], 4.0, _LOWEST)
            known_bin = log_bin(natural_log(abs(known) * 0.125 + 1e-3, tables.log), 3.0, _LOWEST)
            near_left = int(min(abs(left) * per_scale * 3.0, 11.0))
            near_up = int(min(abs(up) * per_scale * 3.0, 11.0))
            base = nearest(centre, fields)
            low, high = _edge(base, fields), _edge(base + 1, fields)
            fineness = log_scale - natural_log(high - low, tables.log)
            fine_bin = log_bin(fineness, 4.0, -6.0)
            octaves = min(max(int(np.floor(fineness * 1.4426950408889634)), 0), _HIGHEST - 2)
            part_bin = min(max(int((centre - low) / (high - low) * 16.0), 0), 15)
            slots[0] = 0
            told, coded, beyond = 3, False, 0
            if fields.zeros > 0:
                near = (flags[j + 1] & 1) + 2 * (flags_above[j + 2] & 1) + 4 * (flags[j] & 1)
                row_share = log_bin(natural_log(row_nonzero + 1e-3, tables.log), 3.0, _LOWEST) // 2
                column_share = log_bin(natural_log(nonzero[j] + 1e-3, tables.log), 3.0, _LOWEST) // 2
                parametric[0] = min(max(0.5 * (nonzero[j] + row_nonzero), 0.0005), 0.9995)
                parametric[1] = min(max(nonzero[j] * row_nonzero / (columns.running[2] + 1e-4), 0.0005), 0.9995)
                slots[1] = near
                slots[2] = row_share
                slots[3] = column_share
                slots[4] = row_share * 16 + column_share
                slots[5] = near * 16 + column_share
                slots[6] = near * 16 + row_share
                slots[7] = known_bin
                slots[8] = known_bin * 8 + near
                slots[9] = (known_bin // 2) * 16 + row_share
                slots[10] = (known_bin // 2) * 16 + column_share
                slots[11] = scale_bin
                bit = mixed_bit(
                    decoding, state, data, 0 if place == 0 or place == minus else 1, parametric, _ZERO_FLAG, slots,
                    known_bin, _ZERO_FLAG, near, rate, _LIMIT, inputs, mixer, tables, spent, ZERO,
                )  # fmt: skip
                row_nonzero += (float(bit) - row_nonzero) * 0.02
                nonzero[j] += (float(bit) - nonzero[j]) * 0.02
                columns.running[2] += (float(bit) - columns.running[2]) * 0.0005
                if bit == 0:
                    told, coded = 2, True
                    if fields.zeros == 2:
                        parametric[0] = parametric[1] = 0.5
                        near = 1 if known < 0.0 else 0
                        slots[1:] = near
                        place = -mixed_bit(
                            decoding, state, data, 1 if place == minus else 0, parametric, _ZERO_SIGN, slots, near,
                            _ZERO_SIGN, near, rate, _LIMIT, inputs, mixer, tables, spent, SIDE,
                        )  # fmt: skip
                    else:
                        place = 0
            unmoved = base
            if places.same and not coded:
                unmoved = nearest(known, fields)
                near = (flags[j + 1] >> 1) + 2 * (flags_above[j + 2] >> 1) + 4 * (flags[j] >> 1)
                row_share = log_bin(natural_log(row_moved + 1e-3, tables.log), 3.0, _LOWEST) // 2
                column_share = log_bin(natural_log(moved[j] + 1e-3, tables.log), 3.0, _LOWEST) // 2
                parametric[0] = min(max(0.5 * (moved[j] + row_moved), 0.0005), 0.9995)
                parametric[1] = 1.0 - mass(
                    (_edge(unmoved, fields) - centre) * per_scale, (_edge(unmoved + 1, fields) - centre) * per_scale,
                    tables.laplace,
                )  # fmt: skip
                slots[1] = near
                slots[2] = row_share
                slots[3] = column_share
                slots[4] = row_share * 16 + column_share
                slots[5] = near * 16 + column_share
                slots[6] = near * 16 + row_share
                slots[7] = fine_bin
                slots[8] = fine_bin * 8 + near
                slots[9] = (fine_bin // 2) * 16 + row_share
                slots[10] = (fine_bin // 2) * 16 + column_share
                slots[11] = known_bin
                bit = mixed_bit(
                    decoding, state, data, 0 if place == unmoved else 1, parametric, _SAME_FLAG, slots, fine_bin,
                    _SAME_FLAG, near, rate, _LIMIT, inputs, mixer, tables, spent, SAME,
                )  # fmt: skip
                row_moved += (float(bit) - row_moved) * 0.02
                moved[j] += (float(bit) - moved[j]) * 0.02
                columns.running[3] += (float(bit) - columns.running[3]) * 0.0005
                if bit == 0:
                    told, coded, place = 1, True, unmoved
            if not coded:
                for which in range(2):
                    table = tables.laplace if which == 0 else tables.normal
                    parametric[which] = 1.0 - mass((low - centre) * per_scale, (high - centre) * per_scale, table)
                slots[1] = scale_bin
                slots[2] = row_bin
                slots[3] = column_bin
                slots[4] = (row_bin // 3) * 32 + column_bin // 3
                slots[5] = near_left * 12 + near_up
                slots[6] = fine_bin * 12 + part_bin // 2
                slots[7] = fine_bin
                slots[8] = known_bin
                slots[9] = (scale_bin // 2) * 12 + near_left
                slots[10] = (fine_bin // 2) * 16 + part_bin
                slots[11] = (fine_bin // 3) * 32 + neighbour_bin // 3
                if places.same and unmoved == base:
                    beyond = 1
                elif octaves < _FINE:
                    beyond = 1
                    bit = mixed_bit(
                        decoding, state, data, 0 if place == base else 1, parametric, _NONE_FLAG, slots, fine_bin,
                        _NONE_FLAG, fine_bin, rate, _LIMIT, inputs, mixer, tables, spent, DISTANCE,
                    )  # fmt: skip
                    if bit == 0:
                        coded, place = True, base
            if not coded:
                column_tilt = signed_bin(mean[j] / (scale[j] + 1e-6), 8.0)
                row_tilt = signed_bin(row_mean / (row + 1e-6), 8.0)
                tilt = signed_bin((centre - known) * per_scale, 6.0)
                near_signs = (0 if left == 0.0 else (1 if left < 0.0 else 2)) * 3 + (
                    0 if up == 0.0 else (1 if up < 0.0 else 2)
                )
                grown = known_bin * 2 + (1 if known < 0.0 else 0)
                for which in range(2):
                    table = tables.laplace if which == 0 else tables.normal
                    under = survival((centre - low) * per_scale, table)
                    over = survival((high - centre) * per_scale, table) if beyond else 1.0 - under
                    parametric[which] = chance(under, under + over)
                slots[1] = near_signs
                slots[2] = column_tilt
                slots[3] = row_tilt
                slots[4] = tilt
                slots[5] = column_tilt * 32 + row_tilt
                slots[6] = tilt * 32 + column_tilt
                slots[7] = grown
                slots[8] = part_bin * 8 + min(octaves, 7)
                slots[9] = near_signs * 12 + near_left
                slots[10] = near_signs * 16 + part_bin
                slots[11] = (grown // 4) * 16 + part_bin
                side = mixed_bit(
                    decoding, state, data, 1 if place < base else 0, parametric, _SIDE, slots, part_bin, _SIDE,
                    _SIDE_SETS + part_bin, rate, _LIMIT, inputs, mixer, tables, spent, SIDE,
                )  # fmt: skip
                backwards = side == 1
                first = base - 1 if backwards else base + beyond
                count = (first - place if backwards else place - first) + 1
                toward = -1.0 if backwards else 1.0
                family = min(octaves, 5)
                begin = octaves if octaves >= 2 else 1
                slots[1] = scale_bin
                slots[2] = row_bin
                slots[3] = column_bin
                slots[4] = (row_bin // 3) * 32 + column_bin // 3
                slots[5] = near_left * 12 + near_up
                slots[6] = fine_bin * 12 + (15 - part_bin if backwards else part_bin) // 2
                slots[7] = fine_bin
                slots[8] = grown if not backwards else grown ^ 1
                slots[9] = (scale_bin // 2) * 12 + near_left
                slots[10] = (scale_bin // 4) * 32 + (31 - tilt if backwards else tilt)
                slots[11] = (fine_bin // 3) * 32 + neighbour_bin // 3
                exponent, floor, ceiling = begin, 0, -1
                while True:
                    lower = (_edge_beyond(first, backwards, (1 << floor) - 1, fields) - centre) * toward * per_scale
                    middle = (_edge_beyond(first, backwards, (1 << exponent) - 1, fields) - centre) * toward * per_scale
                    for which in range(2):
                        table = tables.laplace if which == 0 else tables.normal
                        if ceiling < 0:
                            parametric[which] = chance(survival(middle, table), survival(lower, table))
                        else:
                            upper = (
                                (_edge_beyond(first, backwards, (1 << ceiling) - 1, fields) - centre)
                                * toward * per_scale
                            )  # fmt: skip
                            parametric[which] = chance(mass(middle, upper, table), mass(lower, upper, table))
                    node = _EXPONENTS + family * 24 + min(max(exponent - begin + 12, 0), 23)
                    bit = mixed_bit(
                        decoding, state, data, 1 if count >= 1 << exponent else 0, parametric, node, slots, fine_bin,
                        node, fine_bin, rate, _LIMIT, inputs, mixer, tables, spent, DISTANCE,
                    )  # fmt: skip
                    if bit:
                        floor = exponent
                        if ceiling >= 0 or exponent == _HIGHEST:
                            break
                        exponent += 1
                    else:
                        ceiling = exponent
                        if exponent == floor + 1 or exponent - 1 <= 0:
                            break
                        exponent -= 1
                reached = 1 << floor
                below = floor
                prefix = 1
                apart = min(max(floor - begin + 3, 0), 7)
                while below > 0 and floor - below < _DEEPEST:
                    half = 1 << (below - 1)
                    lower = (_edge_beyond(first, backwards, reached - 1, fields) - centre) * toward * per_scale
                    middle = (_edge_beyond(first, backwards, reached + half - 1, fields) - centre) * toward * per_scale
                    upper = (
                        (_edge_beyond(first, backwards, reached + 2 * half - 1, fields) - centre) * toward * per_scale
                    )
                    if upper - lower < 0.03:
                        break
                    for which in range(2):
                        table = tables.laplace if which == 0 else tables.normal
                        parametric[which] = chance(mass(middle, upper, table), mass(lower, upper, table))
                    node = _BITS + apart * 8 + min(prefix, 7)
                    bit = mixed_bit(
                        decoding, state, data, 1 if (count - reached) & half else 0, parametric, node, slots, fine_bin,
                        node, fine_bin, rate, _LIMIT, inputs, mixer, tables, spent, DISTANCE,
                    )  # fmt: skip
                    if bit:
                        reached += half
                    prefix = 2 * prefix + bit
                    below -= 1
                spent[LOWER] += below
                while below > 0:
                    taken = min(below, 16)
                    below -= taken
                    piece = code_evenly(decoding, state, data, ((count - reached) >> below) & ((1 << taken) - 1), taken)
                    reached += piece << below
                if decoding:
                    place = first - (reached - 1) if backwards else first + (reached - 1)
            if decoding:
                rows[i, j] = place
            value = number(place, fields) if told & 1 else centre
            off = min(max(value - centre, -LARGEST), LARGEST)
            difference = min(max(value - known, -LARGEST), LARGEST)
            if linear:
                step = np.float32(off) * inverses[j]
                from_column = j - j % factors.shape[1]
                for k in range(j + 1, min(from_column + factors.shape[1], width)):
                    expected[i, k] += factors[j, k - from_column] * step
            size = abs(off)
            if told & 1:
                error = min(size * per_scale - 1.0, 3.0)
                for k in range(7):
                    regression[k] += 0.0008 * error * features[k] / (1.0 + abs(features[k]))
                row_seen += 1.0
                weight = 1.0 / row_seen if row_seen < 200.0 else 0.005
                row += (size - row) * weight
                row_mean += (difference - row_mean) * weight
                seen[j] += 1.0
                weight = 1.0 / (seen[j] + 2.0) if seen[j] < 120.0 else 0.008
                scale[j] += (size - scale[j]) * weight
                mean[j] += (difference - mean[j]) * weight
                last8 += (size - last8) * 0.08
                whole += (size - whole) * 0.0005
            current[j + 2] = off
            flags[j + 2] = told
        start = 0.5 * whole + 0.5 * row
        for j in range(width + 4):
            above[j] = current[j]
            flags_above[j] = flags[j]
    columns.running[0], columns.running[1] = whole, start
