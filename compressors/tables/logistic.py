"""Tables of the logistic domain and of the functions that predictions need, the same bits on every machine.

They are made by sums, products and quotients of IEEE 754 alone, element by element: what a library approximates
(``exp``, ``log``, ``erfc``) may differ in the last bit from one to the next, and a decoder mustn't.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import inlined, record

# Stretched probabilities ln(p / (1 - p)) are counted in 1/2048; beyond +-12 a 16-bit probability says no more.
STRETCH_UNIT = 2048
STRETCH_LIMIT = 12 * STRETCH_UNIT
# Survival functions are tabled at steps of 1/64 of the mean magnitude up to 64 of them.
TAIL_STEPS = 64
TAIL_LIMIT = 64
# Scales: natural logarithms of the top twelve bits of a mantissa; powers of e from -20 to 50 in steps of 1/256.
LOG_BITS = 12
EXP_STEPS = 256
EXP_FROM, EXP_TO = -20, 50

_LN2 = 0.6931471805599453
_SQRT_2_OVER_PI = 0.7978845608028654


@lru_cache(maxsize=1)
def tables() -> np.record:
    """Return what the compiled models look up; made once a process.

    stretch
        int32, of a probability in 1/65536: its logit in 1/`STRETCH_UNIT`.
    squash
        int32, of a logit plus `STRETCH_LIMIT`: the probability in 1/65536, from 1 to 65535.
    cost
        float32, of a probability in 1/4096: bits of an event of that probability. Only for statistics.
    laplace, normal
        float64, of t in 1/`TAIL_STEPS`: P(X > t) of the symmetric distribution of mean magnitude one.
    log
        float64, of the top `LOG_BITS` bits of a mantissa: natural logarithm of the number in [1, 2).
    exp
        float64, of (x - `EXP_FROM`) in 1/`EXP_STEPS`: e**x.
    reciprocals
        int64, of a count n below 1024: 65536 / (n + 1.6).
    """
    logits = np.arange(-STRETCH_LIMIT, STRETCH_LIMIT + 1) / STRETCH_UNIT
    probabilities = np.floor(65536.0 / (1.0 + exponential(-logits)) + 0.5).astype(np.int32)
    odds = np.arange(1, 65536) / np.arange(65535, 0, -1)
    stretch = np.zeros(65536, np.int32)
    stretch[1:] = np.rint(logarithm(odds) * STRETCH_UNIT)
    stretch[0] = stretch[1]
    cost = np.zeros(4097, np.float32)
    cost[1:] = -logarithm(np.arange(1, 4097) / 4096.0) / _LN2
    cost[0] = 13.0
    steps = np.arange(TAIL_LIMIT * TAIL_STEPS + 2) / TAIL_STEPS
    return record(
        stretch=stretch,
        squash=np.clip(probabilities, 1, 65535).astype(np.int32),
        cost=cost,
        laplace=0.5 * exponential(-steps),
        normal=_normal_tail(steps * _SQRT_2_OVER_PI),
        log=logarithm(1.0 + (np.arange(1 << LOG_BITS) + 0.5) / (1 << LOG_BITS)),
        exp=exponential(np.arange((EXP_TO - EXP_FROM) * EXP_STEPS + 2) / EXP_STEPS + EXP_FROM),
        reciprocals=655360 // (10 * np.arange(1024) + 16),
    )


def exponential(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return e**x by reduction to |r| <= ln(2) / 2 and the series of Taylor; x within +-700."""
    power = np.rint(x / _LN2)
    reduced = x - power * _LN2
    total = np.ones_like(reduced)
    for term in range(20, 0, -1):
        total = 1.0 + total * reduced / term
    powers: NDArray[np.float64] = np.ldexp(total, power.astype(np.int32))
    return powers


def logarithm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ln(x) of positive x by the exponent and the series of artanh."""
    mantissa, exponent = np.frexp(x)
    ratio = (mantissa - 0.75) / (mantissa + 0.75)
    square = ratio * ratio
    total = np.zeros_like(ratio)
    for term in range(39, 0, -2):
        total = total * square + 1.0 / term
    logarithms: NDArray[np.float64] = 2.0 * ratio * total + (exponent * _LN2 - 0.2876820724517809)
    return logarithms


def _normal_tail(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return P(X > z) of the standard normal at ascending z from 0: Simpson's rule, summed from the far end."""
    step = np.diff(z)
    panels = 8
    total = np.zeros_like(z)
    for panel in range(panels):
        left = z[:-1] + step * panel / panels
        right = z[:-1] + step * (panel + 1) / panels
        middle = (left + right) / 2
        density = _density(left) + 4 * _density(middle) + _density(right)
        total[:-1] += step / panels / 6 * density
    # A running sum from the far end, so that the small tails keep their digits.
    sums: NDArray[np.float64] = np.cumsum(total[::-1])[::-1]
    tails: NDArray[np.float64] = sums / (2 * sums[0])
    return tails


def _density(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return exponential(-np.minimum(z * z / 2, 690.0))


@inlined
def natural_log(x: float, tables: np.record) -> float:
    """Return ln(x) of a positive number within 1.3e-4."""
    mantissa, exponent = math.frexp(x)
    return float(tables.log[int((mantissa - 0.5) * 8192.0)]) + (exponent - 1) * 0.6931471805599453


@inlined
def natural_power(x: float, tables: np.record) -> float:
    """Return e**x within 2e-6 of it; x is cut off at the table's ends."""
    table = tables.exp
    place = (x + 20.0) * 256.0
    if place < 0.0:
        return float(table[0])
    if place >= 17920.0:
        return float(table[17920])
    index = int(place)
    return float(table[index] + (table[index + 1] - table[index]) * (place - index))
