"""A universal code for integers whose size nobody knows beforehand: the tables of palettes and models.

The code is the exponential Golomb code (Teuhola, "A compression method for clustered bit-vectors", Information
Processing Letters 7, 1978): the order k sets what sizes are cheap, and larger integers cost two bits a doubling.
Prefixes stand together, then the binary digits, plane by plane, so that both directions are array operations.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.machine.compiled import compiled, leading_zeros

Integers: TypeAlias = NDArray[np.uint64]

_POWERS = np.uint64(1) << np.arange(64, dtype=np.uint64)
_LARGEST_ORDER = 62
# The order is chosen on at most about this many of the integers; any order decodes.
_SAMPLE = 1 << 12


def encode_integers(integers: NDArray[np.unsignedinteger[Any]]) -> bytes:
    """Return the code of non-negative integers below ``2**64 - 1``: the order in a byte, prefixes, digits.

    Without integers, the code is empty. The number of integers isn't part of it.
    """
    values = integers.astype(np.uint64, copy=False)
    if not values.size:
        return b""
    order = _best_order(values)
    data = np.zeros(-(-int(_lengths(values, order, order + 1)[0]) // 8), np.uint8)
    _write(values, order, data)
    return bytes([order]) + data.tobytes()


def encoded_size(integers: Integers) -> int:
    """Return the bytes of what `encode_integers` returns."""
    if not integers.size:
        return 0
    order = _best_order(integers)
    return 1 - (-int(_lengths(integers, order, order + 1)[0]) // 8)


def decode_integers(data: bytes, count: int) -> Integers:
    """Return ``count`` integers from the code that `encode_integers` wrote; memory follows the code's length.

    Raises
    ------
    StreamError
        The code is truncated or corrupted, or holds another number of integers.
    """
    if count == 0 and not data:
        return np.zeros(0, np.uint64)
    if count == 0 or len(data) < 2 or data[0] > _LARGEST_ORDER or count > 8 * len(data):
        raise StreamError(f"a table of {count} integers is corrupted")
    order = data[0]
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=1))
    ends = np.flatnonzero(bits)[:count]
    if ends.size < count:
        raise StreamError(f"a table of {count} integers ends after {ends.size}")
    digits = np.diff(ends, prepend=-1) - 1 + order
    position = int(ends[-1]) + 1
    if digits.max() > 63 or -(-(position + int(digits.sum())) // 8) != len(data) - 1:
        raise StreamError(f"a table of {count} integers hasn't the length that its prefixes say")
    shifted = _POWERS[digits]
    for place in range(int(digits.max())):
        longer = digits > place
        plane = bits[position : position + np.count_nonzero(longer)].astype(np.uint64)
        shifted[longer] |= plane << np.uint64(place)
        position += plane.size
    integers: Integers = shifted - (np.uint64(1) << np.uint64(order))
    return integers


def _best_order(values: Integers) -> int:
    """Return the order that codes a sample of the values shortest, of those with which none exceeds 64 bits."""
    largest = int(values.max())
    orders = min(largest.bit_length(), ((1 << 64) - 1 - largest).bit_length() - 1, _LARGEST_ORDER) + 1
    sample = np.ascontiguousarray(values[:: max(1, values.size // _SAMPLE)])
    return int(np.argmin(_lengths(sample, 0, orders)))


@compiled
def _bit_length(value: np.uint64) -> int:
    return 64 - leading_zeros(int(np.int64(value)))


@compiled
def _lengths(values: Integers, first: int, last: int) -> NDArray[np.int64]:
    """Return the bits that values take with each of some orders."""
    lengths = np.zeros(last - first, np.int64)
    for place in range(lengths.size):
        offset = np.uint64(1) << np.uint64(first + place)
        for value in values:
            lengths[place] += 2 * _bit_length(value + offset) - 1
        lengths[place] -= (first + place) * values.size
    return lengths


@compiled
def _write(values: Integers, order: int, data: NDArray[np.uint8]) -> None:
    """Set the bits of prefixes and digits in zeroed bytes, the highest of a byte first."""
    offset, position, longest = np.uint64(1) << np.uint64(order), -1, 0
    for value in values:
        digits = _bit_length(value + offset) - 1
        position += digits - order + 1
        data[position >> 3] |= np.uint8(128 >> (position & 7))
        longest = max(longest, digits)
    for place in range(longest):
        lowest = np.uint64(1) << np.uint64(place)
        for value in values:
            shifted = value + offset
            if shifted >= lowest << np.uint64(1):
                position += 1
                if shifted & lowest:
                    data[position >> 3] |= np.uint8(128 >> (position & 7))
