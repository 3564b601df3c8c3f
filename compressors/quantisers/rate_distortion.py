"""Levels chosen so that squared error plus the price of their bits is least, value by value or along a trellis.

A level's price is what an adaptive coder pays for it in the context of its row's and its column's scale. Prices are
learned from the levels of the pass before: a few passes settle on levels that are cheap because they are used. All of
it happens before encoding; a decoder needs none.

References
----------
P. A. Chou, T. Lookabaugh, R. M. Gray: Entropy-constrained vector quantization. IEEE Transactions on Acoustics, Speech
and Signal Processing 37, 1989. T. R. Fischer, M. Wang: Entropy-constrained trellis-coded quantization. IEEE
Transactions on Information Theory 38, 1992.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled

from .trellis import NEXT_STATE, STATES, multiples_of

Floats: TypeAlias = NDArray[np.float64]
Levels: TypeAlias = NDArray[np.int32]
Contexts: TypeAlias = NDArray[np.uint8]

PASSES = 3
# Squared steps a bit, along the operational rate-distortion curve at high rates: 2 ln 2 times the squared error, which
# is a twelfth without a trellis, and was measured with one.
_SLOPE, _TRELLIS_SLOPE = math.log(2) / 6, 0.35
# Reconstructed levels are moved by so many 256ths of a step, less than half a step.
SHIFTS = 256
_LARGEST_SHIFT = 127
# Magnitudes below this have a price each; of those above, a quarter of an octave has one.
_SINGLE_LOG = 6
_SINGLE = 1 << _SINGLE_LOG
_OCTAVES = 26
_BUCKETS = _SINGLE + 4 * _OCTAVES
_CONTEXTS_AN_OCTAVE = 4
_CONTEXTS = 64
# A scale of fewer entries would be a scale of the very value that is to be coded.
_FEWEST_ENTRIES = 8
# Weight of the prices of the whole tensor in those of a context, in levels.
_PRIOR = 4
_VALUES_A_BLOCK = 1 << 15


def choose_levels(scaled: Floats, price: float, *, trellis: bool, contexts: bool) -> tuple[Levels, NDArray[np.int8]]:
    """Return levels, and how far levels of magnitude 1 and above lie from their multiples, in 256ths of a step.

    Parameters
    ----------
    scaled
        Values divided by the step, of any shape, which the levels have too.
    price
        Of a bit, relative to the slope of the rate-distortion curve at high rates: 1 is what theory asks for, 0 minds
        the error alone.
    trellis
        Whether levels stand for the multiples of `trellis`, or for multiples of the step.
    contexts
        Whether prices follow the scales of rows and columns, as the coders do that learn them.
    """
    flat = scaled.reshape(-1)
    levels = np.rint(flat / 2 if trellis else flat).astype(np.int32)
    where = _scale_contexts(scaled) if contexts else np.zeros(flat.size, np.uint8)
    weight = price * (_TRELLIS_SLOPE if trellis else _SLOPE)
    shifts = np.zeros(2, np.int8)
    # Without a price nothing changes after the first pass.
    for _ in range(PASSES if price else 1):
        offsets = np.concatenate([[0.0], shifts / SHIFTS])
        prices = _prices(levels, where)
        if trellis:
            _choose_path(flat, where, prices, weight, offsets, levels, _VALUES_A_BLOCK)
        else:
            _choose_each(flat, where, prices, weight, offsets, levels)
        shifts = _shifts(flat, levels, multiples_of(levels) if trellis else levels.astype(np.int64))
    return levels.reshape(scaled.shape), shifts


def _shifts(scaled: Floats, levels: Levels, multiples: NDArray[np.int64]) -> NDArray[np.int8]:
    """Return the mean distance of values from what levels of magnitude 1, and above, stand for."""
    shifts = np.zeros(2, np.int8)
    sizes = np.abs(levels)
    distances = np.abs(scaled) - np.abs(multiples)
    for place, chosen in enumerate((sizes == 1, sizes > 1)):
        if chosen.any():
            shifts[place] = np.clip(np.rint(SHIFTS * distances[chosen].mean()), -_LARGEST_SHIFT, _LARGEST_SHIFT)
    return shifts


def _scale_contexts(scaled: Floats) -> Contexts:
    """Return, flat, a context for each entry: its row's mean magnitude times its column's, on a scale of octaves."""
    if not scaled.size:
        return np.zeros(0, np.uint8)
    magnitudes = np.abs(scaled.reshape(scaled.shape[0] if scaled.ndim > 1 else 1, -1))
    scale = np.zeros(magnitudes.shape)
    for axis in (0, 1):
        if magnitudes.shape[axis] >= _FEWEST_ENTRIES:
            scale += np.log2(magnitudes.mean(axis=axis, keepdims=True) + np.finfo(np.float64).tiny)
    places = (scale - scale.max()) * _CONTEXTS_AN_OCTAVE + _CONTEXTS - 1
    contexts: Contexts = np.maximum(places, 0).astype(np.uint8).reshape(-1)
    return contexts


def _prices(levels: Levels, contexts: Contexts) -> Floats:
    """Return the bits of a level by context and bucket of its magnitude, sign included."""
    counts = np.zeros((_CONTEXTS, _BUCKETS))
    _count(levels, contexts, counts)
    # How many levels share a bucket, of both signs.
    sizes = np.full(_BUCKETS, 2.0)
    sizes[0] = 1
    sizes[_SINGLE:] = np.repeat(2.0 ** (_SINGLE_LOG - 1 + np.arange(_OCTAVES)), 4)
    prior = counts.sum(axis=0) + 0.05
    smooth = counts + _PRIOR * prior / prior.sum()
    smooth[1:] += counts[:-1] / 4
    smooth[:-1] += counts[1:] / 4
    prices: Floats = np.log2(smooth.sum(axis=1, keepdims=True)) - np.log2(smooth) + np.log2(sizes)
    return prices


@compiled
def _bucket(magnitude: int) -> int:
    if magnitude < _SINGLE:
        return magnitude
    octave = _SINGLE_LOG
    while magnitude >> (octave + 1):
        octave += 1
    return _SINGLE + 4 * (octave - _SINGLE_LOG) + ((magnitude >> (octave - 2)) & 3)


@compiled
def _count(levels: Levels, contexts: Contexts, counts: Floats) -> None:
    for index in range(levels.size):
        counts[contexts[index], _bucket(abs(levels[index]))] += 1.0


@compiled
def _choose_each(
    scaled: Floats, contexts: Contexts, prices: Floats, weight: float, offsets: Floats, levels: Levels
) -> None:
    for index in range(scaled.size):
        size = abs(scaled[index])
        price = prices[contexts[index]]
        best, least = 0, size * size + weight * price[0]
        nearest = int(size + 0.5)
        for magnitude in range(max(nearest - 1, 1), nearest + 2):
            miss = size - (magnitude + offsets[min(magnitude, 2)])
            cost = miss * miss + weight * price[_bucket(magnitude)]
            if cost < least:
                best, least = magnitude, cost
        levels[index] = best if scaled[index] > 0 else -best


@compiled
def _choose_path(
    scaled: Floats, contexts: Contexts, prices: Floats, weight: float, offsets: Floats, levels: Levels, segment: int
) -> None:
    """Find the cheapest path by the algorithm of Viterbi, settled after every segment."""
    totals, extended = np.full(STATES, np.inf), np.empty(STATES)
    totals[0] = 0.0
    costs = np.empty(4)
    # By grid and parity, the best level; by state, the state before and the parity that led here.
    choices, arrivals = np.empty((segment, 4), np.int32), np.empty((segment, STATES), np.int8)
    for start in range(0, scaled.size, segment):
        stop = min(start + segment, scaled.size)
        for index in range(start, stop):
            _branch(abs(scaled[index]), prices[contexts[index]], weight, offsets, costs, choices[index - start])
            extended[:] = np.inf
            for state in range(STATES):
                for parity in range(2):
                    after = NEXT_STATE[state, parity]
                    cost = totals[state] + costs[2 * (state & 1) + parity]
                    if cost < extended[after]:
                        extended[after] = cost
                        arrivals[index - start, after] = 2 * state + parity
            totals[:] = extended
        last = int(np.argmin(totals))
        state = last
        for index in range(stop - 1, start - 1, -1):
            arrival = arrivals[index - start, state]
            state = arrival >> 1
            magnitude = choices[index - start, 2 * (state & 1) + (arrival & 1)]
            levels[index] = magnitude if scaled[index] > 0 else -magnitude
        totals[:] = np.inf
        totals[last] = 0.0


@compiled
def _branch(size: float, price: Floats, weight: float, offsets: Floats, costs: Floats, choices: Levels) -> None:
    """Set the least cost of a level of either grid and parity, and the level's magnitude."""
    for odd in range(2):
        costs[2 * odd], choices[2 * odd] = size * size + weight * price[0], 0
        costs[2 * odd + 1] = np.inf
        low = int((size + odd) / 2)
        for magnitude in range(max(low - 1, 1), low + 2):
            miss = size - (2 * magnitude - odd + offsets[min(magnitude, 2)])
            cost = miss * miss + weight * price[_bucket(magnitude)]
            place = 2 * odd + (magnitude & 1)
            if cost < costs[place]:
                costs[place], choices[place] = cost, magnitude
