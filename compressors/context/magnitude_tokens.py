"""Integers of any magnitude as small ones and bits: what a model tells from each other, and what follows as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.machine.compiled import compiled

# Magnitudes below 256 are their own tokens; from there on a token tells the exponent and the next two bits.
MOST_MAGNITUDE = 1 << 48
_EXACT_BITS = 8
_EXACT = 1 << _EXACT_BITS
_LARGEST_TOKEN = _EXACT + 4 * (47 - _EXACT_BITS) + 3


def split_tokens(integers: NDArray[np.signedinteger[Any]]) -> tuple[NDArray[np.int16], bytes]:
    """Return the token of each integer, in its shape, and the bits below the tokens, the highest bit first.

    Parameters
    ----------
    integers
        Of magnitudes below 2**48.
    """
    magnitudes = np.abs(integers.astype(np.int64))
    tokens = magnitudes.astype(np.int16)
    large = magnitudes >= _EXACT
    values = magnitudes[large]
    exponents = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
    tokens[large] = _EXACT + 4 * (exponents - _EXACT_BITS) + ((values >> (exponents - 2)) & 3)
    np.negative(tokens, out=tokens, where=integers < 0)
    widths = exponents - 2
    data = np.zeros(-(-int(widths.sum()) // 8), np.uint8)
    _pack(values, widths, data)
    return tokens, data.tobytes()


def join_tokens(tokens: NDArray[np.int16], data: bytes) -> NDArray[np.int64]:
    """Return the integers of tokens and bits below them, in the tokens' shape.

    Raises
    ------
    StreamError
        A token doesn't exist, or there are more or fewer bits than tokens ask for.
    """
    magnitudes = np.abs(tokens.astype(np.int64))
    if magnitudes.size and int(magnitudes.max()) > _LARGEST_TOKEN:
        raise StreamError(f"a token of magnitude {int(magnitudes.max())} doesn't exist")
    large = magnitudes >= _EXACT
    steps = magnitudes[large] - _EXACT
    widths = (steps >> 2) + _EXACT_BITS - 2
    total = int(widths.sum())
    bits = np.frombuffer(data, np.uint8)
    if bits.size != -(-total // 8) or (total % 8 and int(bits[-1]) & ((1 << (8 - total % 8)) - 1)):
        raise StreamError(f"{bits.size} bytes where {total} bits below tokens are expected")
    values = ((steps & 3) + 4) << widths
    _unpack(values, widths, bits)
    magnitudes[large] = values
    return np.where(tokens < 0, -magnitudes, magnitudes)


@compiled
def _pack(values: NDArray[np.int64], widths: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
    position = 0
    for index in range(values.size):
        for place in range(widths[index] - 1, -1, -1):
            bit = (values[index] >> place) & 1
            data[position >> 3] |= np.uint8(bit << (7 - (position & 7)))
            position += 1


@compiled
def _unpack(values: NDArray[np.int64], widths: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
    position = 0
    for index in range(values.size):
        for place in range(widths[index] - 1, -1, -1):
            bit = np.int64((data[position >> 3] >> np.uint8(7 - (position & 7))) & 1)
            values[index] |= bit << place
            position += 1
