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
    shifted = values + (np.uint64(1) << np.uint64(order))
    digits = _bit_length(shifted) - 1
    ends = np.cumsum(digits - order + 1)
    prefixes = np.zeros(int(ends[-1]), np.uint8)
    prefixes[ends - 1] = 1
    planes = [
        ((shifted[digits > place] >> np.uint64(place)) & np.uint64(1)).astype(np.uint8)
        for place in range(int(digits.max()))
    ]
    return bytes([order]) + np.packbits(np.concatenate([prefixes, *planes])).tobytes()


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
    orders = range(min(largest.bit_length(), ((1 << 64) - 1 - largest).bit_length() - 1, _LARGEST_ORDER) + 1)
    sample = values[:: max(1, values.size // _SAMPLE)]
    lengths = [
        2 * int(_bit_length(sample + (np.uint64(1) << np.uint64(order))).sum()) - order * sample.size
        for order in orders
    ]
    return lengths.index(min(lengths))


def _bit_length(values: Integers) -> NDArray[np.intp]:
    return np.searchsorted(_POWERS, values, side="right")
