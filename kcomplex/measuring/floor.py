"""The floor: what a tensor's histogram leaves to be told, field by field; a proxy to set a code's bits beside.

A code that finds structure beyond the histogram (between neighbours, rows, tensors) is below it; one that is above it
hasn't even used the histogram. It pays for no table of values and, but for mantissas, for no frequencies: it bounds
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln

from kcomplex.machine.compiled import compiled
from kcomplex.weights import TensorHandle, Words, dtype_name

# Longer words may be floats with more values than a table can hold; shorter ones never are.
_TABLE_BYTES = 1


@dataclass(frozen=True)
class TensorFloor:
    """One tensor's order-0 bits, of kind ``proxy``.

    Attributes
    ----------
    name, shape, dtype, weights
        The tensor and its number of weights.
    distinct
        Number of distinct words.
    arrangement_bits
        log2 of the number of orders that the tensor's words can stand in: what the shortest code needs, on average,
        for a shuffled tensor. See `arrangement_bits`.
    parts
        Bits by field. For integers and few-valued floats ``zero flags``, ``signs`` and ``magnitudes``; they sum to
        ``arrangement_bits``. For other floats ``zero flags``, ``signs``, ``exponents``, ``mantissas``,
        ``raw mantissa bits`` (the positions, under each exponent, that no frequency makes shorter) and, where rows
        differ in it, ``trailing zeros``: how many lowest bits of a row are all zero, and cost nothing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    distinct: int
    arrangement_bits: float
    parts: Mapping[str, float]

    @property
    def bits(self) -> float:
        """Sum of the parts."""
        return math.fsum(self.parts.values())


def tensor_floor(handle: TensorHandle) -> TensorFloor:
    """Return the floor of a tensor; memory: up to ten times its size, in seconds for 20 million weights.

    Floats count as few-valued where a plain table of their values and the bits to tell which is which are together
    shorter than the fields.
    """
    words = handle.words()
    distinct, counts = np.unique(words, return_counts=True)
    by_word = _word_parts(distinct, counts, handle.dtype)
    arrangement = math.fsum(by_word.values())
    parts = by_word
    if _is_float(handle.dtype) and words.itemsize > _TABLE_BYTES and words.size:
        by_field = _field_parts(words, handle)
        if math.fsum(by_field.values()) < arrangement + 8.0 * distinct.nbytes:
            parts = by_field
    return TensorFloor(
        handle.name, handle.shape, dtype_name(handle.dtype), handle.elements, distinct.size, arrangement, parts
    )


def arrangement_bits(counts: NDArray[np.integer[Any]]) -> float:
    """Return ``log2(N! / (c_1! c_2! ...))``: the bits that tell in which order N symbols of known counts stand.

    Each of these orders is as likely as any other after shuffling. A code has fewer than ``2**(B + 1)`` streams of at
    most B bits, so that the chance of one that is s bits shorter than this number is below ``2**(1 - s)``, whatever
    the code and even if the counts are known to it. (The number of symbols times their empirical entropy is slightly
    larger, and isn't such a bound.)
    """
    # Grouped by count, so that the value doesn't depend on which symbol has which count.
    sizes, repeats = np.unique(counts, return_counts=True)
    nats = gammaln(float(counts.sum()) + 1.0) - math.fsum(repeats * gammaln(sizes + 1.0))
    return max(float(nats) / math.log(2), 0.0)


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _word_parts(distinct: Words, counts: NDArray[np.int64], dtype: torch.dtype) -> dict[str, float]:
    """Return the bits of words by the chain rule: zero or not, then the sign, then the magnitude."""
    signed = (dtype.is_signed or dtype.is_complex) and dtype is not torch.float8_e8m0fnu
    top = distinct.dtype.type(1 << 8 * distinct.itemsize - 1)
    negative = (distinct & top != 0) & signed
    magnitudes = distinct & ~top if _is_float(dtype) and signed else distinct
    zero = magnitudes == 0
    groups = [counts[group] for group in (zero & ~negative, zero & negative, ~zero & ~negative, ~zero & negative)]
    sums = np.array([group.sum() for group in groups])
    return {
        "zero flags": arrangement_bits(np.array([sums[:2].sum(), sums[2:].sum()])),
        "signs": arrangement_bits(sums[:2]) + arrangement_bits(sums[2:]),
        "magnitudes": arrangement_bits(groups[2]) + arrangement_bits(groups[3]),
    }


def _field_parts(words: Words, handle: TensorHandle) -> dict[str, float]:
    """Return the bits of floats by field: exponents by their histogram, each bit of a mantissa by the exponent."""
    real = handle.dtype.to_real() if handle.dtype.is_complex else handle.dtype
    mantissa_bits = round(-math.log2(torch.finfo(real).eps))
    exponent_bits = 8 * words.itemsize - 1 - mantissa_bits
    rows = handle.shape[0] if len(handle.shape) > 1 else 1
    matrix = words.reshape(rows, -1).view(f"i{words.itemsize}")
    trailing, entries = np.empty(rows, np.int64), np.empty(rows, np.int64)
    _find_trailing_zeros(matrix, exponent_bits, mantissa_bits, trailing, entries)
    telling = _choose_trailing_zeros(trailing, entries)
    signs = np.zeros((2, 2), np.int64)
    exponents = np.zeros(1 << exponent_bits, np.int64)
    ones = np.zeros((1 << exponent_bits, mantissa_bits), np.int64)
    alive = np.zeros((1 << exponent_bits, mantissa_bits), np.int64)
    _count_fields(matrix, exponent_bits, mantissa_bits, trailing, signs, exponents, ones, alive)
    used = exponents > 0
    raw, mantissas = _mantissa_parts(ones[used], alive[used])
    return {
        "zero flags": arrangement_bits(signs.sum(axis=1)),
        "signs": arrangement_bits(signs[0]) + arrangement_bits(signs[1]),
        "exponents": arrangement_bits(exponents),
        "mantissas": mantissas,
        "raw mantissa bits": raw,
        **({"trailing zeros": telling} if telling else {}),
    }


def _choose_trailing_zeros(trailing: NDArray[np.int64], entries: NDArray[np.int64]) -> float:
    """Make every row's number of trailing zeros the least where telling them costs more than it saves.

    Returns the bits that tell them.
    """
    used = entries > 0
    if not used.any():
        return 0.0
    least = int(trailing[used].min())
    cost = arrangement_bits(np.bincount(trailing[used]))
    if cost >= float((entries * (trailing - least))[used].sum()):
        trailing[:] = least
        return 0.0
    return cost


def _mantissa_parts(ones: NDArray[np.int64], alive: NDArray[np.int64]) -> tuple[float, float]:
    """Return the bits of the raw positions of mantissas, and those of the others.

    Under one exponent, a position is raw where an enumerative code (Cover, "Enumerative source encoding", IEEE
    Transactions on Information Theory 19, 1973), the number of ones included, isn't shorter than the bits themselves.

    Parameters
    ----------
    ones, alive
        int64 of shape (exponents, positions), the lowest position first: how many bits are one, and how many are
        above their row's trailing zeros.
    """
    choose = (gammaln(alive + 1.0) - gammaln(ones + 1.0) - gammaln(alive - ones + 1.0)) / math.log(2)
    plain = alive.astype(np.float64)
    modelled = choose + np.log2(alive + 1.0)
    raw = modelled >= plain
    return math.fsum(plain[raw]), math.fsum(modelled[~raw])


@compiled
def _find_trailing_zeros(
    words: NDArray[Any],
    exponent_bits: int,
    mantissa_bits: int,
    trailing: NDArray[np.int64],
    entries: NDArray[np.int64],
) -> None:
    """Fill in, for each row, how many lowest mantissa bits are zero in all entries, and the number of non-zero ones."""
    magnitude = (np.int64(1) << (exponent_bits + mantissa_bits)) - 1
    for i in range(words.shape[0]):
        bits, count = np.int64(0), 0
        for j in range(words.shape[1]):
            word = np.int64(words[i, j])
            bits |= word
            count += 1 if word & magnitude else 0
        zeros = 0
        while zeros < mantissa_bits and not (bits >> zeros) & 1:
            zeros += 1
        trailing[i], entries[i] = zeros, count


@compiled
def _count_fields(
    words: NDArray[Any],
    exponent_bits: int,
    mantissa_bits: int,
    trailing: NDArray[np.int64],
    signs: NDArray[np.int64],
    exponents: NDArray[np.int64],
    ones: NDArray[np.int64],
    alive: NDArray[np.int64],
) -> None:
    """Count words by zero and sign, those that aren't zero by exponent, their mantissas' bits by exponent and position.

    ``alive`` counts the positions above a row's trailing zeros, ``ones`` those of them that are one.
    """
    magnitude = (np.int64(1) << (exponent_bits + mantissa_bits)) - 1
    for i in range(words.shape[0]):
        low = trailing[i]
        for j in range(words.shape[1]):
            word = np.int64(words[i, j])
            negative = (word >> (exponent_bits + mantissa_bits)) & 1
            pattern = word & magnitude
            if pattern == 0:
                signs[0, negative] += 1
                continue
            signs[1, negative] += 1
            exponent = pattern >> mantissa_bits
            exponents[exponent] += 1
            for bit in range(low, mantissa_bits):
                ones[exponent, bit] += (pattern >> bit) & 1
                alive[exponent, bit] += 1
