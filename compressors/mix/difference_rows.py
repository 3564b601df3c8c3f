"""The model behind `mix` and `lin` of entries given others: how far each one is from what is expected of it.

An entry is a place on a line: an integer is its own place, floats are counted in order from zero. What is expected is a
number, made of the given weights and of the linear prediction; it has a nearest place, and an entry is coded by the
number of places between them: none, the side, the number's exponent from the expected one up or down, and the bits
below the leading one as far as they say anything. Flags tell entries that are zero and entries that are as given, where
there are many. Laplace and normal distributions around what is expected tell the probability of each decision, which
is mixed with adaptive ones as in `integer_rows`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled, compiled_in_place, inlined

from ..tables.logistic import natural_log
from .binary_coder import code_integer_evenly
from .bins import BINS, log_bin, signed_bin
from .expectations import Bound, bound, expect_farther, expect_outside, expect_over, expect_side, expect_upper
from .float_rows import LARGEST, Fields, worth
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
)

FIELDS = ("zero flags", "unchanged flags", "signs", "differences", "low bits")
_ZERO, _SAME, _SIDE, _DISTANCE, _LOWER = range(5)


class _Nodes(NamedTuple):
    """Decisions that are told apart, or where families of them begin: exponents and bits by what is expected."""

    zero_flag: int = 0
    zero_sign: int = 1
    same_flag: int = 2
    none_flag: int = 3
    side: int = 4
    exponents: int = 5
    bits: int = 5 + 6 * 24
    end: int = 5 + 6 * 24 + 8 * 8


_NODES = _Nodes()
_SIDE_SETS = 96
# Values of each context.
_FLAG_BOUNDS = (1, 8, 16, 16, 256, 128, 128, BINS, 768, 768, 768, BINS)
_NONE_BOUNDS = (1, BINS, BINS, BINS, 1024, 144, 1152, BINS, BINS, 576, 768, 1024)
_SIDE_BOUNDS = (1, 9, 32, 32, 32, 1024, 1024, 192, 128, 108, 144, 768)
_DISTANCE_BOUNDS = (1, BINS, BINS, BINS, 1024, 144, 1152, BINS, 192, 576, 768, 1024)
# Numbers of places are at most 2**62; bits below the leading one are modelled at most so far down.
_HIGHEST = 62
_DEEPEST = 6
# Bits that tell nothing more than that the number is in a part of its distribution as narrow as this aren't modelled.
_NARROW = 0.03
# Where the places are finer than the differences by so many octaves, none between them isn't worth a flag.
_FINE = 6
_LEAST_GAP = 2.0**-1000
# What was told of an entry: that it is a number, that it isn't as given.
_NUMBER, _MOVED = 1, 2


class Places(NamedTuple):
    """What the places on the line are, and what is told of them.

    Attributes
    ----------
    fields
        Of a float, see `float_rows.Fields`; with no exponent bits the places are integers, `Fields.powers` their unit.
        A flag tells zeros where `Fields.zeros` is positive, and their sign where it is 2.
    same
        Whether a flag tells entries that are the nearest to the given number.
    """

    fields: Fields
    same: bool


class DifferenceColumns(NamedTuple):
    """What is known of a matrix's columns and of the row above, in units of the differences.

    Attributes
    ----------
    nonzero, moved
        How often entries aren't zero; aren't as given.
    differences
        float64 of shape (2, width + 4): current row and the one above, padded by two entries on each side.
    told
        int64 of that shape: what was told of them.
    """

    nonzero: Shares
    moved: Shares
    differences: NDArray[np.float64]
    told: NDArray[np.int64]


class _Around(NamedTuple):
    """What is known around an entry.

    Attributes
    ----------
    known, centre
        What is given; what is expected, the linear prediction added.
    base, low, high
        The place that is nearest to what is expected, and its ends.
    octaves
        How much finer the places are than the differences.
    left, up
        Differences of the entries to the left and above.
    """

    scale: Expected
    known: float
    centre: float
    base: int
    low: float
    high: float
    octaves: int
    left: float
    up: float
    known_bin: int
    fine_bin: int
    part_bin: int
    left_bin: int
    up_bin: int


def new_difference_columns(width: int, scale: float) -> DifferenceColumns:
    """Return the columns of a matrix of which no row is known."""
    return DifferenceColumns(
        nonzero=new_shares(width),
        moved=new_shares(width),
        differences=np.zeros((2, width + 4)),
        told=np.zeros((2, width + 4), np.int64),
    )


def new_difference_mixer() -> np.record:
    """Return the mixer of a stream's first differences."""
    bounds, kinds = np.tile(np.array(_DISTANCE_BOUNDS), (_NODES.end, 1)), np.full(_NODES.end, _DISTANCE)
    bounds[_NODES.zero_flag] = bounds[_NODES.zero_sign] = bounds[_NODES.same_flag] = _FLAG_BOUNDS
    bounds[_NODES.none_flag] = _NONE_BOUNDS
    bounds[_NODES.side] = _SIDE_BOUNDS
    kinds[_NODES.zero_flag], kinds[_NODES.same_flag] = _ZERO, _SAME
    kinds[_NODES.zero_sign] = kinds[_NODES.side] = _SIDE
    return new_mixer(bounds, kinds, len(FIELDS), _SIDE_SETS + 32)


@inlined
def number(place: int, fields: Fields) -> float:
    """Return what a place stands for, in units."""
    if fields.exponent_bits == 0:
        return float(place * fields.powers[0])
    return float(worth(place, fields) if place >= 0 else -worth(-place - 1, fields))


@inlined
def nearest(value: float, fields: Fields) -> int:
    """Return the place that is nearest to a finite number."""
    if fields.exponent_bits == 0:
        return int(np.floor(min(max(value / fields.powers[0], -1e15), 1e15) + 0.5))
    magnitude = abs(value)
    mantissa, exponent = math.frexp(magnitude)
    field = exponent - 1 - fields.octave
    one = 1 << fields.mantissa_bits
    top = (1 << (fields.exponent_bits + fields.mantissa_bits)) - 1
    if magnitude == 0.0:
        pattern = 0
    elif field < 1:
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


@inlined
def _edge(place: int, fields: Fields) -> float:
    """Return the lower end of what is rounded to a place."""
    return 0.5 * (number(place - 1, fields) + number(place, fields))


@compiled_in_place
def code_difference_rows(
    engine: Engine,
    scales: Scales,
    prediction: Prediction,
    rows: NDArray[np.int64],
    columns: DifferenceColumns,
    given: NDArray[np.float64],
    places: Places,
) -> None:
    """Encode rows of a matrix, or fill them with what is decoded.

    Parameters
    ----------
    prediction
        Of the rows' differences from the means known beforehand, in units.
    rows
        int64 of shape (rows, width): the places.
    given
        float64 of that shape: finite means known beforehand, in units.
    """
    width, fields = rows.shape[1], places.fields
    forget_row_share(columns.nonzero)
    forget_row_share(columns.moved)
    for row in range(rows.shape[0]):
        begin_row(engine, scales)
        begin_row_share(columns.nonzero)
        begin_row_share(columns.moved)
        for column in range(width):
            known = given[row, column]
            centre = known + float(prediction.expected[row, column])
            around = _look_around(engine, scales, known, centre, columns, column, fields)
            place, told = _code_place(engine, scales, rows[row, column], around, columns, column, places)
            rows[row, column] = place
            value = number(place, fields) if told & _NUMBER else centre
            off = _cut_off(value - centre)
            predict_rest(prediction, row, column, off)
            if told & _NUMBER:
                learn(engine, scales, column, _cut_off(value - known), abs(off), around.scale.per_scale)
            columns.differences[0, column + 2] = off
            columns.told[0, column + 2] = told
        end_row(scales)
        for place in range(width + 4):
            columns.differences[1, place] = columns.differences[0, place]
            columns.told[1, place] = columns.told[0, place]


@inlined
def _cut_off(difference: float) -> float:
    return min(max(difference, -LARGEST), LARGEST)


@inlined
def _look_around(
    engine: Engine,
    scales: Scales,
    known: float,
    centre: float,
    columns: DifferenceColumns,
    column: int,
    fields: Fields,
) -> _Around:
    differences, tables = columns.differences, engine.tables
    left, up = differences[0, column + 1], differences[1, column + 2]
    neighbours = (
        2.0 * abs(left)
        + abs(differences[0, column])
        + 2.0 * abs(up)
        + abs(differences[1, column + 1])
        + abs(differences[1, column + 3])
    ) / 7.0
    scale = expected_scale(engine, scales, column, neighbours, UNIT_LIMITS)
    base = nearest(centre, fields)
    low, high = _edge(base, fields), _edge(base + 1, fields)
    # Beyond the range of float64, places are worth the same.
    gap = max(high - low, _LEAST_GAP)
    fineness = scale.log - natural_log(gap, tables)
    return _Around(
        scale,
        known,
        centre,
        base,
        low,
        high,
        min(max(int(np.floor(fineness * 1.4426950408889634)), 0), _HIGHEST - 2),
        left,
        up,
        log_bin(natural_log(abs(known) * 0.125 + 1e-3, tables), 3.0, UNIT_LIMITS.octave),
        log_bin(fineness, 4.0, -6.0),
        min(max(int((centre - low) / gap * 16.0), 0), 15),
        int(min(abs(left) * scale.per_scale * 3.0, 11.0)),
        int(min(abs(up) * scale.per_scale * 3.0, 11.0)),
    )


@inlined
def _code_place(
    engine: Engine,
    scales: Scales,
    place: int,
    around: _Around,
    columns: DifferenceColumns,
    column: int,
    places: Places,
) -> tuple[int, int]:
    """Return the place, and what was told of it."""
    unmoved = around.base
    if places.fields.zeros > 0:
        minus = -1 if places.fields.zeros == 2 else 0
        nonzero = 0 if place == 0 or place == minus else 1
        nonzero = mixed_bit(engine, nonzero, _tell_zero_flag(engine, around, columns, column))
        learn_share(columns.nonzero, column, nonzero)
        if nonzero == 0:
            return -mixed_bit(engine, -place, _tell_zero_sign(engine, around)) if minus else 0, _MOVED
    if places.same:
        unmoved = nearest(around.known, places.fields)
        moved = 0 if place == unmoved else 1
        moved = mixed_bit(engine, moved, _tell_same_flag(engine, unmoved, around, columns, column, places.fields))
        learn_share(columns.moved, column, moved)
        if moved == 0:
            return unmoved, _NUMBER
    # Whether the base is out of the question.
    beyond = places.same and unmoved == around.base
    if not beyond and around.octaves < _FINE:
        beyond = True
        if mixed_bit(engine, 0 if place == around.base else 1, _tell_none_flag(engine, around)) == 0:
            return around.base, _NUMBER | _MOVED
    before = 1 if place < around.base else 0
    backwards = mixed_bit(engine, before, _tell_side(engine, scales, around, column, beyond))
    toward = -1 if backwards else 1
    first = around.base + (toward if backwards or beyond else 0)
    _tell_distances(engine, around, backwards)
    count = _code_distance(engine, toward * (place - first) + 1, around, first, toward, places.fields)
    return first + toward * (count - 1), _NUMBER | _MOVED


@inlined
def _near_flags(columns: DifferenceColumns, column: int, which: int) -> int:
    """Return what was told of the entries to the left, above, and left of that to the left."""
    told, shift = columns.told, which >> 1
    left, up, second = told[0, column + 1] & which, told[1, column + 2] & which, told[0, column] & which
    return int((left + 2 * up + 4 * second) >> shift)


@inlined
def _tell_flags(engine: Engine, near: int, shares: Shares, column: int, bin: int) -> None:
    """Tell most contexts of a flag: what was told of entries near it, shares of row and column, and one more."""
    slots = engine.mixer.slots
    row_share = row_share_bin(engine, shares, UNIT_LIMITS.octave) // 2
    column_share = column_share_bin(engine, shares, column, UNIT_LIMITS.octave) // 2
    slots[1] = near
    slots[2] = row_share
    slots[3] = column_share
    slots[4] = row_share * 16 + column_share
    slots[5] = near * 16 + column_share
    slots[6] = near * 16 + row_share
    slots[7] = bin
    slots[8] = bin * 8 + near
    slots[9] = (bin // 2) * 16 + row_share
    slots[10] = (bin // 2) * 16 + column_share


@inlined
def _tell_zero_flag(engine: Engine, around: _Around, columns: DifferenceColumns, column: int) -> Decision:
    """Tell the contexts of whether an entry isn't zero."""
    near = _near_flags(columns, column, _NUMBER)
    expect_share(engine, columns.nonzero, column)
    _tell_flags(engine, near, columns.nonzero, column, around.known_bin)
    engine.mixer.slots[11] = around.scale.bin
    return _NODES.zero_flag, around.known_bin, near


@inlined
def _tell_zero_sign(engine: Engine, around: _Around) -> Decision:
    """Tell the contexts of whether a zero is negative."""
    near = 1 if around.known < 0.0 else 0
    engine.mixer.parametric[0] = engine.mixer.parametric[1] = 0.5
    engine.mixer.slots[1:] = near
    return _NODES.zero_sign, near, near


@inlined
def _tell_same_flag(
    engine: Engine, unmoved: int, around: _Around, columns: DifferenceColumns, column: int, fields: Fields
) -> Decision:
    """Tell the contexts of whether an entry isn't as given."""
    near = _near_flags(columns, column, _MOVED)
    low, high = _edge(unmoved, fields) - around.centre, _edge(unmoved + 1, fields) - around.centre
    per_scale = around.scale.per_scale
    expect_outside(engine, bound(engine, low * per_scale), bound(engine, high * per_scale))
    outside = engine.mixer.parametric[0]
    expect_share(engine, columns.moved, column)
    engine.mixer.parametric[1] = outside
    _tell_flags(engine, near, columns.moved, column, around.fine_bin)
    engine.mixer.slots[11] = around.known_bin
    return _NODES.same_flag, around.fine_bin, near


@inlined
def _tell_none_flag(engine: Engine, around: _Around) -> Decision:
    """Tell the contexts of whether a place isn't the nearest to what is expected."""
    scale, slots = around.scale, engine.mixer.slots
    low, high = around.low - around.centre, around.high - around.centre
    expect_outside(engine, bound(engine, low * scale.per_scale), bound(engine, high * scale.per_scale))
    _tell_scales(engine, around)
    slots[6] = around.fine_bin * 12 + around.part_bin // 2
    slots[8] = around.known_bin
    slots[10] = (around.fine_bin // 2) * 16 + around.part_bin
    return _NODES.none_flag, around.fine_bin, around.fine_bin


@inlined
def _tell_scales(engine: Engine, around: _Around) -> None:
    """Tell the contexts that flags and distances have in common."""
    scale, slots = around.scale, engine.mixer.slots
    slots[1] = scale.bin
    slots[2] = scale.row_bin
    slots[3] = scale.column_bin
    slots[4] = (scale.row_bin // 3) * 32 + scale.column_bin // 3
    slots[5] = around.left_bin * 12 + around.up_bin
    slots[7] = around.fine_bin
    slots[9] = (scale.bin // 2) * 12 + around.left_bin
    slots[11] = (around.fine_bin // 3) * 32 + scale.near_bin // 3


@inlined
def _tell_side(engine: Engine, scales: Scales, around: _Around, column: int, beyond: bool) -> Decision:
    """Tell the contexts of whether a place is before the base; ``beyond`` tells that it isn't the base itself."""
    scale, slots, part_bin = around.scale, engine.mixer.slots, around.part_bin
    column_bin = signed_bin(column_tilt(scales, column, 1e-6), 8.0)
    row_bin = signed_bin(row_tilt(scales, 1e-6), 8.0)
    tilt = _tilt(around)
    near = _side(around.left) * 3 + _side(around.up)
    grown = _grown(around)
    if beyond:
        under, over = around.centre - around.low, around.high - around.centre
        expect_side(engine, bound(engine, under * scale.per_scale), bound(engine, over * scale.per_scale))
    else:
        expect_over(engine, bound(engine, (around.centre - around.low) * scale.per_scale))
    slots[1] = near
    slots[2] = column_bin
    slots[3] = row_bin
    slots[4] = tilt
    slots[5] = column_bin * 32 + row_bin
    slots[6] = tilt * 32 + column_bin
    slots[7] = grown
    slots[8] = part_bin * 8 + min(around.octaves, 7)
    slots[9] = near * 12 + around.left_bin
    slots[10] = near * 16 + part_bin
    slots[11] = (grown // 4) * 16 + part_bin
    return _NODES.side, part_bin, _SIDE_SETS + part_bin


@inlined
def _side(difference: float) -> int:
    return 0 if difference == 0.0 else (1 if difference < 0.0 else 2)


@inlined
def _tilt(around: _Around) -> int:
    """Return how far what is expected is from what is given."""
    return signed_bin((around.centre - around.known) * around.scale.per_scale, 6.0)


@inlined
def _grown(around: _Around) -> int:
    """Return how large the given number is, with its sign."""
    return around.known_bin * 2 + (1 if around.known < 0.0 else 0)


@inlined
def _tell_distances(engine: Engine, around: _Around, backwards: int) -> None:
    """Tell the contexts of the number of places, seen from its side."""
    scale, slots = around.scale, engine.mixer.slots
    grown, part_bin, tilt = _grown(around), around.part_bin, _tilt(around)
    _tell_scales(engine, around)
    slots[6] = around.fine_bin * 12 + (15 - part_bin if backwards else part_bin) // 2
    slots[8] = grown ^ 1 if backwards else grown
    slots[10] = (scale.bin // 4) * 32 + (31 - tilt if backwards else tilt)


@inlined
def _code_distance(engine: Engine, count: int, around: _Around, first: int, toward: int, fields: Fields) -> int:
    """Return which place it is from the first one on, in one direction; the first is 1."""
    begin = around.octaves if around.octaves >= 2 else 1
    exponent = _code_distance_exponent(engine, count, begin, around, first, toward, fields)
    reached, below, prefix = 1 << exponent, exponent, 1
    low = _end(engine, around, first, toward, reached, fields)
    high = _end(engine, around, first, toward, 2 * reached, fields)
    apart = min(max(exponent - begin + 3, 0), 7)
    while below > 0 and exponent - below < _DEEPEST:
        half = 1 << (below - 1)
        if high.distance - low.distance < _NARROW:
            break
        middle = _end(engine, around, first, toward, reached + half, fields)
        expect_upper(engine, low, middle, high)
        node = _NODES.bits + apart * 8 + min(prefix, 7)
        bit = 1 if (count - reached) & half else 0
        bit = mixed_bit(engine, bit, (node, around.fine_bin, around.fine_bin))
        if bit:
            reached, low = reached + half, middle
        else:
            high = middle
        prefix = 2 * prefix + bit
        below -= 1
    engine.mixer.spent[_LOWER] += below
    rest = (count - reached) & ((1 << below) - 1)
    return reached + code_integer_evenly(engine.coder, engine.data, rest, below)


@inlined
def _code_distance_exponent(
    engine: Engine, count: int, begin: int, around: _Around, first: int, toward: int, fields: Fields
) -> int:
    """Return the exponent of a number of places, looked for from the expected one up or down."""
    family = min(around.octaves, 5)
    exponent, floor, ceiling = begin, 0, -1
    while True:
        low = _end(engine, around, first, toward, 1 << floor, fields)
        middle = _end(engine, around, first, toward, 1 << exponent, fields)
        if ceiling < 0:
            expect_farther(engine, low, middle)
        else:
            expect_upper(engine, low, middle, _end(engine, around, first, toward, 1 << ceiling, fields))
        node = _NODES.exponents + family * 24 + min(max(exponent - begin + 12, 0), 23)
        bit = 1 if count >= 1 << exponent else 0
        if mixed_bit(engine, bit, (node, around.fine_bin, around.fine_bin)):
            floor = exponent
            if ceiling >= 0 or exponent == _HIGHEST:
                return floor
            exponent += 1
        else:
            ceiling = exponent
            if exponent == floor + 1 or exponent - 1 <= 0:
                return floor
            exponent -= 1


@inlined
def _end(engine: Engine, around: _Around, first: int, toward: int, count: int, fields: Fields) -> Bound:
    """Return how far the nearer end of a place, counted from the first one on, is from what is expected, in scales."""
    place = first - (count - 1) + 1 if toward < 0 else first + (count - 1)
    return bound(engine, (_edge(place, fields) - around.centre) * float(toward) * around.scale.per_scale)
