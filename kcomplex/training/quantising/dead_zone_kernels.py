"""Compiled loops of the dead-zone quantiser for the CPU: each passes over the weights as few times as it can."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled

Floats: TypeAlias = NDArray[np.floating[Any]]

# Bits of a float that one pass of the selection sorts by.
_DIGIT = 11
_LANES = 64


@compiled
def order_statistics(words: NDArray[np.unsignedinteger[Any]], lower: int, found: Any) -> None:
    """Write two neighbouring order statistics and the maximum of the magnitudes of every row.

    Parameters
    ----------
    words
        Bit patterns of float32 or float64 of shape (rows, n), n > 0; signs don't count, and NaN is the largest.
    lower
        Rank of the first statistic, from 0; the other is the next one, or the same at the end.
    found
        Of shape (rows, 3) and the words' dtype: statistic, next one, maximum, as bit patterns.
    """
    rows, length = words.shape
    top = 8 * words.itemsize - 1
    counts = np.zeros(1 << _DIGIT, dtype=np.int64)
    scratch = np.empty(length, dtype=words.dtype)
    one = words.dtype.type(1)
    mask = words.dtype.type((one << words.dtype.type(top)) - one)
    for row in range(rows):
        rank, left = lower, length
        shift = top
        first = True
        # Each pass keeps those that agree with the statistic in one digit more, from the most significant one on.
        while shift > 0 and (first or left > 1):
            width = min(_DIGIT, shift)
            shift -= width
            digits = (1 << width) - 1
            counts[: digits + 1] = 0
            if first:
                for i in range(length):
                    counts[((words[row, i] & mask) >> words.dtype.type(shift)) & words.dtype.type(digits)] += 1
            else:
                for i in range(left):
                    counts[(scratch[i] >> words.dtype.type(shift)) & words.dtype.type(digits)] += 1
            digit = 0
            while rank >= counts[digit]:
                rank -= counts[digit]
                digit += 1
            kept = 0
            size = length if first else left
            for i in range(size):
                word = words[row, i] & mask if first else scratch[i]
                if (word >> words.dtype.type(shift)) & words.dtype.type(digits) == digit:
                    scratch[kept] = word
                    kept += 1
            left = kept
            first = False
        low = scratch[0]
        upto = 0
        beyond, largest = mask, low
        for i in range(length):
            word = words[row, i] & mask
            upto += word <= low
            beyond = min(beyond, word) if word > low else beyond
            largest = max(largest, word)
        found[row, 0] = low
        found[row, 1] = low if upto > lower + 1 or upto == length else beyond
        found[row, 2] = largest


@compiled
def levels(words: Any, kind: Any, held: Floats, quantile: float, openness: float, top: float, columns: Floats) -> None:
    """Write the levels of every row.

    Parameters
    ----------
    words, kind
        See `order_statistics`, and an empty array of their float dtype.
    held
        Top levels of shape (rows, 1) in place of quantiles, or an empty array.
    quantile, openness, top
        Of the magnitudes, in [0, 1]; of the dead zone, in [0, 1]; largest symbol.
    columns
        Of shape (rows, 4) and the float dtype: top level, width of the dead zone, step, shift.
    """
    rows, length = words.shape
    position = quantile * (length - 1)
    lower = int(np.floor(position))
    found = np.empty((rows, 3), dtype=words.dtype)
    if not len(held):
        order_statistics(words, lower, found)
    values = found.view(kind.dtype)
    relative = np.finfo(kind.dtype).eps
    for row in range(rows):
        if len(held):
            absmax = held[row, 0] * 1.0
        else:
            low, high, largest = values[row, 0], values[row, 1], values[row, 2]
            absmax = low + (position - lower) * (high - low)
            absmax = largest * 1.0 if absmax == 0 else absmax
        dead_zone = 2 * absmax * (1 - openness)
        # Widened in proportion, so that the widest dead zone leaves a step. Where all is zero any step will do.
        step = (absmax * (1 + relative) - dead_zone / 2) / (top - 0.5)
        step = 1.0 if step == 0 else step
        columns[row, 0] = absmax
        columns[row, 1] = dead_zone
        columns[row, 2] = step
        columns[row, 3] = (dead_zone - step) / 2


@compiled
def quantise(weights: Floats, columns: Floats, top: float, values: Floats) -> None:
    """Write the values of the levels nearest to the weights.

    Parameters
    ----------
    weights, values
        Of shape (rows, n), of one dtype, which is that of the levels too.
    columns, top
        See `levels`.
    """
    rows, length = weights.shape
    kind = weights.dtype.type
    most, nothing = kind(top), kind(0)
    for row in range(rows):
        width, offset = columns[row, 2], columns[row, 3]
        for i in range(length):
            weight = weights[row, i]
            symbol = (abs(weight) - offset) / width
            # In this form NaN stays NaN.
            symbol = nothing if symbol < nothing else symbol
            symbol = np.rint(most if symbol > most else symbol)
            level = symbol * width + (offset if symbol > nothing else nothing)
            level = -level if weight < nothing else level
            # Neither exact zeros nor negative ones that fell into the dead zone have a sign.
            values[row, i] = nothing if symbol == nothing or weight == nothing else level


@compiled
def quantise_anew(
    words: Any,
    weights: Floats,
    held: Floats,
    quantile: float,
    openness: float,
    top: float,
    columns: Floats,
    values: Floats,
) -> None:
    """Write `levels` and the values that `quantise` makes of them."""
    levels(words, weights[:0], held, quantile, openness, top, columns)
    quantise(weights, columns, top, values)


@compiled
def slopes(weights: Floats, gradient: Floats, columns: Floats, top: float) -> tuple[float, float]:
    """Return the gradients of the loss in the openness of the dead zone and in the largest symbol Q.

    Parameters
    ----------
    weights, gradient
        Of shape (rows, n).
    columns, top
        See `levels`.

    Notes
    -----
    With round, clamp and relu passed straight through, e = sign(symbol) - sign(w) and r the signed position, at most Q:
    dw^/dd = e/2 - (symbol - r - e/2)/(2Q - 1), dw^/dQ = -(a - d/2)(symbol - r - e/2)/(Q - 1/2)^2, and dd = -2a dp.
    Both are sums of two terms, over the dead weights (``-g sign(w) / 2``) and over the rounding errors
    (``g sign(w) (symbol - r)``).
    """
    rows, length = weights.shape
    kind = weights.dtype.type
    most, nothing, one = kind(top), kind(0), kind(1)
    # Several partial sums side by side, in a fixed order, let the processor do several additions at once.
    partial = np.zeros((2, _LANES))
    dead = np.zeros(_LANES, dtype=weights.dtype)
    rounding = np.zeros(_LANES, dtype=weights.dtype)
    to_openness, to_top = 0.0, 0.0
    share = 1 / (2 * top - 1)
    for row in range(rows):
        width, offset = columns[row, 2], columns[row, 3]
        partial[:] = 0
        for start in range(0, length, _LANES):
            lanes = min(_LANES, length - start)
            if lanes < _LANES:
                dead[:] = 0
                rounding[:] = 0
            for lane in range(lanes):
                weight = weights[row, start + lane]
                position = (abs(weight) - offset) / width
                position = nothing if position < nothing else position
                position = most if position > most else position
                symbol = np.rint(position)
                sign = -one if weight < nothing else (one if weight > nothing else nothing)
                outward = gradient[row, start + lane] * sign
                dead[lane] = outward if symbol == nothing else nothing
                rounding[lane] = outward * (symbol - position)
            for lane in range(_LANES):
                partial[0, lane] += dead[lane]
                partial[1, lane] += rounding[lane]
        of_dead, of_rounding = -partial[0].sum() / 2, partial[1].sum()
        absmax, dead_zone = columns[row, 0], columns[row, 1]
        to_openness -= 2 * absmax * ((1 + share) * of_dead - share * of_rounding)
        to_top -= (absmax - dead_zone / 2) / (top - 0.5) ** 2 * (of_rounding - of_dead)
    return to_openness, to_top
