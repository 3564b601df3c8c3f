"""A range coder of binary decisions: 64-bit range, 16-bit probabilities, no carries.

The bounds shrink to a decision's share of the range; bytes on which both bounds agree are written. With 64 bits between
them, what rounding costs can't be measured (below 2**-40 bits a decision but in vanishingly rare ranges).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.machine.compiled import compiled_in_place, inlined

CoderState: TypeAlias = NDArray[np.uint64]
Bytes: TypeAlias = NDArray[np.uint8]

_LOW, _HIGH, _CODE, POSITION = 0, 1, 2, 3
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_U0, _U1, _U8, _U16, _U56 = np.uint64(0), np.uint64(1), np.uint64(8), np.uint64(16), np.uint64(56)
_BYTE, _FRACTION = np.uint64(0xFF), np.uint64(0xFFFF)


def start_encoding() -> CoderState:
    """Return the state of an encoder that has written nothing: low, high, (unused), bytes written."""
    return np.array([0, _ALL, 0, 0], np.uint64)


def start_decoding(data: Bytes) -> CoderState:
    """Return the state of a decoder: low, high, the eight bytes in view, bytes taken."""
    view = int.from_bytes(data[:8].tobytes().ljust(8, b"\0"), "big")
    return np.array([0, _ALL, view, 8], np.uint64)


@compiled_in_place
def code_bit(decoding: bool, state: CoderState, data: Bytes, bit: int, probability: int) -> int:
    """Return the bit that was decoded, or that was encoded.

    Parameters
    ----------
    decoding
        Whether to read ``bit`` from the data instead of writing it.
    state, data
        Coder and its bytes; an encoder needs room for nine more.
    probability
        That the bit is one, in 1/65536; 1 to 65535.
    """
    low, high = state[_LOW], state[_HIGH]
    span, share = high - low, np.uint64(probability)
    middle = low + (span >> _U16) * share + (((span & _FRACTION) * share) >> _U16)
    if decoding:
        bit = 1 if state[_CODE] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + _U1
    _shift(decoding, state, data, low, high)
    return bit


@compiled_in_place
def code_evenly(decoding: bool, state: CoderState, data: Bytes, value: int, bits: int) -> int:
    """Return an integer of up to 16 bits that was decoded, or that was encoded, all of them being equally probable."""
    low, high = state[_LOW], state[_HIGH]
    share = (high - low) >> np.uint64(bits)
    if share < _FRACTION:
        # Hardly ever: the bounds are too near to each other for parts of equal size.
        known = 0
        for place in range(bits - 1, -1, -1):
            known = 2 * known + code_bit(decoding, state, data, (value >> place) & 1, 32768)
        return known
    if decoding:
        part = np.int64((state[_CODE] - low) // share)
        value = min(int(part), (1 << bits) - 1)
    low += share * np.uint64(value)
    _shift(decoding, state, data, low, low + share - _U1)
    return value


@inlined
def code_integer_evenly(decoding: bool, state: CoderState, data: Bytes, value: int, bits: int) -> int:
    """Return an integer of up to 63 bits as `code_evenly` does, from the highest bits down."""
    known = 0
    while bits > 0:
        taken = min(bits, 16)
        bits -= taken
        known = known << taken | code_evenly(decoding, state, data, (value >> bits) & ((1 << taken) - 1), taken)
    return known


@inlined
def _shift(decoding: bool, state: CoderState, data: Bytes, low: np.uint64, high: np.uint64) -> None:
    """Write (or read over) the bytes on which both bounds agree."""
    while ((low ^ high) >> _U56) == _U0:
        position = np.int64(state[POSITION])
        if decoding:
            following = np.uint64(data[position]) if position < data.size else _U0
            state[_CODE] = (state[_CODE] << _U8) | following
        else:
            data[position] = np.uint8(high >> _U56)
        state[POSITION] = np.uint64(position + 1)
        low = low << _U8
        high = (high << _U8) | _BYTE
    state[_LOW], state[_HIGH] = low, high


def finish_encoding(state: CoderState, data: Bytes) -> bytes:
    """Return all bytes of the stream: those written, and the fewest that tell the last range from its neighbours."""
    return data[: int(state[POSITION])].tobytes() + _tail(int(state[_LOW]), int(state[_HIGH]))


def require_read(state: CoderState, data: Bytes) -> None:
    """Check that no more bytes were read than there are.

    Raises
    ------
    StreamError
        There were.
    """
    if int(state[POSITION]) - 8 > data.size:
        raise StreamError("the binary decisions of the stream don't end where its bytes end: it is corrupted")


def finish_decoding(state: CoderState, data: Bytes) -> None:
    """Check that the bytes are those that an encoder of the decoded decisions writes, no more and no fewer.

    Damaged bytes are as a rule the stream of other decisions: it is for checksums to find that out.

    Raises
    ------
    StreamError
        They aren't.
    """
    require_read(state, data)
    written = int(state[POSITION]) - 8
    if data[written:].tobytes() != _tail(int(state[_LOW]), int(state[_HIGH])):
        raise StreamError("the binary decisions of the stream don't end where its bytes end: it is corrupted")


def _tail(low: int, high: int) -> bytes:
    for size in range(9):
        unit = 1 << (64 - 8 * size)
        value = -(-low // unit) * unit
        if value <= high:
            # Zeros follow a stream by definition.
            return value.to_bytes(8, "big")[:size].rstrip(b"\0") if size else b""
    raise AssertionError("eight bytes name every value")


def as_bytes(data: bytes) -> Bytes:
    """Return the array that a decoder reads; writable, so that one compiled kernel serves both directions."""
    return np.frombuffer(bytearray(data), np.uint8)
