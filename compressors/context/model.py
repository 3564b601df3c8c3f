"""The model behind `context`: one adaptive count a weight, in a bin of row scale times column scale.

Every bin keeps a histogram of the integers that fell in it, and a table of probabilities that is made anew from the
histogram after every eighth of its growth, so that a weight costs one look-up and one step of a range coder. The scales
are running mean magnitudes of the row to the left and of the column above. All state is integer: a stream decodes alike
on every machine.

The range coder (Martin, "Range encoding", 1979) keeps a range of 33 to 64 bits, takes probabilities in 1/2**20 and
moves 32 bits at a time; carries run through the words already written.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled, leading_zeros

from ..tables.logistic import exponential

Integers: TypeAlias = NDArray[np.int16]
Words: TypeAlias = NDArray[np.uint32]

# Integers that the model takes, of either sign.
LARGEST = 512
PROBABILITY_BITS = 20
_ONE = 1 << PROBABILITY_BITS
_GUESS_BITS = 10
# Scales are counted in 1/2**16; their logarithms in sixteenths of an octave, bins from 2**-6 to 2**9.
_UNIT_BITS = 16
_LEAST = 64
_OCTAVES_BELOW, _OCTAVES = 6, 15
# A symbol counts 64; a histogram of 16,384 symbols is halved.
_COUNT = 64
_MOST_COUNTED = 1 << 20
_LONGEST_INTERVAL = 1024
# A running mean follows the last so many entries of a row, rows of a column, and weights of the matrix.
_ROW_MEMORY, _COLUMN_MEMORY, _MATRIX_MEMORY = 200, 123, 2048
# A histogram begins as a mixture of Laplace distributions: of so many times the bin's scale, and their shares.
_PRIOR = ((0.25, 0.2), (1.0, 0.6), (4.0, 0.15), (16.0, 0.05))

_U20, _U32 = np.uint64(PROBABILITY_BITS), np.uint64(32)
_U0, _WORD = np.uint64(0), np.uint64(0xFFFFFFFF)
_TOP, _ALL = np.uint64(1 << 32), np.uint64(0xFFFFFFFFFFFFFFFF)
_FULL_WORD = np.uint32(0xFFFFFFFF)
# Columns of `Histograms.states`.
_TOTAL, _SEEN, _INTERVAL, _DUE, ZEROS = range(5)


class Settings(NamedTuple):
    """How a matrix's weights are put in bins, told in its stream.

    Attributes
    ----------
    steps
        Bins an octave of scale.
    product
        Whether a bin is of row scale x column scale / matrix scale, dampened (the power 3/4), rather than of the
        geometric mean of row and column scale.
    prior
        Symbols that a histogram's beginning counts as.
    """

    steps: int
    product: bool
    prior: int


# The position is the choice in streams: append only. For dense, for sparse, and for sparse matrices of few non-zeros.
SETTINGS = (Settings(4, True, 40), Settings(2, False, 20), Settings(1, False, 20))


class Histograms(NamedTuple):
    """What is known of each bin.

    Attributes
    ----------
    counts
        uint32 of shape (bins, alphabet).
    cumulative
        uint32 of shape (bins, alphabet + 1): the probabilities in use, summed up, in 1/2**20; zeros of a bin that
        nothing fell in yet.
    guesses
        uint16 of shape (bins, 1024): the first symbol that a decoder's value may stand for; no columns for an encoder.
    priors
        int32 of shape (bins, alphabet).
    states
        int64 of shape (bins, 5): total of the counts, symbols seen, length of the interval between two tables, symbols
        until the next one, zeros seen.
    """

    counts: NDArray[np.uint32]
    cumulative: NDArray[np.uint32]
    guesses: NDArray[np.uint16]
    priors: NDArray[np.int32]
    states: NDArray[np.int64]

    def seen(self) -> NDArray[np.int64]:
        """Return how many symbols fell in each bin."""
        seen: NDArray[np.int64] = self.states[:, _SEEN] + self.states[:, _INTERVAL] - self.states[:, _DUE]
        return seen


class Columns(NamedTuple):
    """What is known of each column: mean magnitude and mean in 1/65536, logarithm of the first, sign of a tilt."""

    magnitude: NDArray[np.int64]
    mean: NDArray[np.int64]
    logarithm: NDArray[np.int32]
    tilt: NDArray[np.int8]


class Tables(NamedTuple):
    """What the kernel looks up: logarithms of a number's four bits below its first, and rates of running means."""

    logarithms: NDArray[np.int64]
    row_rates: NDArray[np.int64]
    column_rates: NDArray[np.int64]


def code_matrix(
    decoding: bool,
    rows: Integers,
    smallest: int,
    largest: int,
    settings: Settings,
    tilted: bool,
    scale: int,
    data: Words,
) -> tuple[int, int, Histograms]:
    """Encode a matrix, or fill it with what is decoded; return words used, the last word, and the histograms.

    Parameters
    ----------
    rows
        int16 of shape (rows, width), C-contiguous, between `smallest` <= 0 and `largest` >= 0.
    tilted
        Whether columns with a mean have histograms of their own; then `smallest` is ``-largest``.
    scale
        Mean magnitude to begin with, in 1/65536.
    data
        Words to read, or room for `room` words.
    """
    priors = _priors(settings)[:, LARGEST + smallest : LARGEST + largest + 1]
    if tilted:
        priors = np.concatenate([priors, priors])
    bins, alphabet = priors.shape
    histograms = Histograms(
        counts=np.zeros((bins, alphabet), np.uint32),
        cumulative=np.zeros((bins, alphabet + 1), np.uint32),
        guesses=np.zeros((bins, 1 << _GUESS_BITS if decoding else 0), np.uint16),
        priors=np.ascontiguousarray(priors),
        states=np.tile(np.array([0, 0, 1, 1, 0], np.int64), (bins, 1)),
    )
    width = rows.shape[1]
    columns = Columns(
        np.full(width, scale, np.int64), np.zeros(width, np.int64), np.zeros(width, np.int32), np.zeros(width, np.int8)
    )
    used, last = _code_rows(
        decoding, rows, smallest, settings.steps, settings.product, tilted, scale, histograms, columns, _tables(), data
    )
    return used, last, histograms


def room(weights: int) -> int:
    """Return how many words a matrix of so many weights takes at most."""
    return weights * (PROBABILITY_BITS + 1) // 32 + 8


@lru_cache(maxsize=len(SETTINGS))
def _priors(settings: Settings) -> NDArray[np.int32]:
    """Return the counts that histograms begin with, of shape (bins, 2 * LARGEST + 1)."""
    edges = np.arange(LARGEST + 2) - 0.5
    bins = np.arange(_OCTAVES * settings.steps)
    scales = exponential(0.6931471805599453 * ((bins + 0.5) / settings.steps - _OCTAVES_BELOW))
    half = np.zeros((bins.size, LARGEST + 1))
    for factor, share in _PRIOR:
        tails = 0.5 * exponential(-np.minimum(np.maximum(edges, 0.5) / (factor * scales + 0.02)[:, None], 700.0))
        masses = tails[:, :-1] - tails[:, 1:]
        masses[:, 0] = 1.0 - 2.0 * tails[:, 1]
        half += share * masses
    counts = np.rint(half * (settings.prior * _COUNT)).astype(np.int32) + 1
    return np.concatenate([counts[:, :0:-1], counts], axis=1)


@lru_cache(maxsize=1)
def _tables() -> Tables:
    rows, columns = np.arange(5, _ROW_MEMORY + 1), np.arange(3, _COLUMN_MEMORY + 1)
    # 16 log2(1 + (i + 1/2) / 16), rounded.
    logarithms = np.array([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16], np.int64)
    return Tables(logarithms, 65536 // rows, 65536 // columns)


@compiled
def _logarithm(number: int, table: NDArray[np.int64]) -> int:
    """Return the logarithm of a positive number in sixteenths of an octave."""
    zeros = leading_zeros(number)
    return int(((63 - zeros) << 4) + table[((number << zeros) >> 59) & 15])


@compiled
def _learn(
    counts: NDArray[np.uint32],
    priors: NDArray[np.int32],
    cumulative: NDArray[np.uint32],
    guesses: NDArray[np.uint16],
    state: NDArray[np.int64],
    zero: int,
) -> None:
    """Make a bin's table of probabilities anew from its histogram."""
    alphabet = counts.size
    total = state[_TOTAL]
    if total > _MOST_COUNTED:
        total = 0
        for symbol in range(alphabet):
            counts[symbol] >>= 1
            total += counts[symbol]
        state[_TOTAL] = total
    for symbol in range(alphabet):
        total += priors[symbol]
    per_count = ((_ONE - alphabet) << 32) // total
    position = 0
    for symbol in range(alphabet):
        cumulative[symbol] = position
        position += 1 + (((np.int64(counts[symbol]) + np.int64(priors[symbol])) * per_count) >> 32)
    cumulative[alphabet] = position
    # What rounding left over goes to zero.
    left_over = _ONE - position
    for symbol in range(zero + 1, alphabet + 1):
        cumulative[symbol] += left_over
    symbol = 0
    for guess in range(guesses.size):
        while np.int64(cumulative[symbol + 1]) <= guess << (PROBABILITY_BITS - _GUESS_BITS):
            symbol += 1
        guesses[guess] = symbol


@compiled
def _carry(data: Words, position: int) -> None:
    """Add one to the words before a position."""
    place = position - 1
    while data[place] == _FULL_WORD:
        data[place] = np.uint32(0)
        place -= 1
    data[place] += np.uint32(1)


@compiled
def _code_rows(
    decoding: bool,
    rows: Integers,
    smallest: int,
    steps: int,
    product: bool,
    tilted: bool,
    scale: int,
    histograms: Histograms,
    columns: Columns,
    tables: Tables,
    data: Words,
) -> tuple[int, int]:
    counts, cumulative, guesses = histograms.counts, histograms.cumulative, histograms.guesses
    priors, states = histograms.priors, histograms.states
    height, width = rows.shape
    zero = -smallest
    bins = counts.shape[0] // 2 if tilted else counts.shape[0]
    for column in range(width):
        columns.logarithm[column] = _logarithm(scale, tables.logarithms)
    low, span, view, position = _U0, _ALL, _U0, 0
    if decoding:
        view = np.uint64(data[0]) << _U32 | np.uint64(data[1])
        position = 2
    matrix, start = scale, scale
    factor = 3 * steps if product else 2 * steps
    lowest = 16 * (_UNIT_BITS - _OCTAVES_BELOW)
    for i in range(height):
        row = start
        row_logarithm = _logarithm(row, tables.logarithms)
        # In 1/64 of a bin: the matrix's scale, and the lowest bin's, are taken off.
        offset = 4 * lowest + (2 * _logarithm(matrix, tables.logarithms) if product else 0)
        offset *= -steps
        total = 0
        current = rows[i]
        for j in range(width):
            place = ((row_logarithm + columns.logarithm[j]) * factor + offset) >> 6
            place = max(min(place, bins - 1), 0)
            mirrored = False
            if tilted and columns.tilt[j] != 0:
                place += bins
                mirrored = columns.tilt[j] < 0
            known = cumulative[place]
            # Of most bins, a short matrix needs no table.
            if known[counts.shape[1]] == 0:
                _learn(counts[place], priors[place], known, guesses[place], states[place], zero)
            part = span >> _U20
            if decoding:
                slot = min(int(np.int64(view // part)), _ONE - 1)
                symbol = int(guesses[place, slot >> (PROBABILITY_BITS - _GUESS_BITS)])
                while int(known[symbol + 1]) <= slot:
                    symbol += 1
                value = symbol + smallest
                current[j] = -value if mirrored else value
            else:
                value = int(current[j])
                symbol = (-value if mirrored else value) - smallest
            below = part * np.uint64(known[symbol])
            span = part * np.uint64(known[symbol + 1] - known[symbol])
            bottom = low + below
            if decoding:
                view -= below
            elif bottom < low:
                _carry(data, position)
            low = bottom
            if span < _TOP:
                if decoding:
                    view = view << _U32 | (np.uint64(data[position]) if position < data.size else _U0)
                else:
                    data[position] = np.uint32(low >> _U32)
                position += 1
                low <<= _U32
                span <<= _U32
            counts[place, symbol] += np.uint32(_COUNT)
            state = states[place]
            if symbol == zero:
                state[ZEROS] += 1
            state[_DUE] -= 1
            if state[_DUE] == 0:
                state[_SEEN] += state[_INTERVAL]
                state[_TOTAL] += _COUNT * state[_INTERVAL]
                _learn(counts[place], priors[place], known, guesses[place], state, zero)
                state[_INTERVAL] = max(1, min(state[_SEEN] >> 3, _LONGEST_INTERVAL))
                state[_DUE] = state[_INTERVAL]
            magnitude = abs(value) << _UNIT_BITS
            total += magnitude
            rate = int(tables.row_rates[min(j, tables.row_rates.size - 1)])
            row = max(row + (((magnitude - row) * rate) >> 16), _LEAST)
            row_logarithm = _logarithm(row, tables.logarithms)
        rate = int(tables.column_rates[min(i, tables.column_rates.size - 1)])
        for j in range(width):
            mean = int(columns.magnitude[j])
            mean += (((abs(int(current[j])) << _UNIT_BITS) - mean) * rate) >> 16
            columns.magnitude[j] = mean
            columns.logarithm[j] = _logarithm(max(mean, _LEAST), tables.logarithms)
        if tilted:
            for j in range(width):
                mean = int(columns.mean[j])
                mean += (((int(current[j]) << _UNIT_BITS) - mean) * rate) >> 16
                columns.mean[j] = mean
                tilt = 1 if mean > 0 else -1
                columns.tilt[j] = tilt if 4 * abs(mean) > columns.magnitude[j] else 0
        matrix = max(matrix + (total - matrix * width) // (width + _MATRIX_MEMORY), _LEAST)
        start = max((matrix + row) >> 1, _LEAST)
    # The one word above the range's lower bound with which any further words stay inside it.
    top = low + _WORD
    if top < low and not decoding:
        _carry(data, position)
    last = int(np.int64(top >> _U32))
    if not decoding:
        data[position] = np.uint32(last)
    return position + 1, last
