"""A range coder of binary decisions: 64-bit range, 16-bit probabilities, no carries.

The bounds shrink to a decision's share of the range; bytes on which both bounds agree are written. With 64 bits between
them, what rounding costs can't be measured (below 2**-40 bits a decision but in vanishingly rare ranges).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.machine.compiled import called, compiled_in_place, inlined, record

Bytes: TypeAlias = NDArray[np.uint8]

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_U0, _U1, _U8, _U16, _U56 = np.uint64(0), np.uint64(1), np.uint64(8), np.uint64(16), np.uint64(56)
_BYTE, _FRACTION = np.uint64(0xFF), np.uint64(0xFFFF)


def start_encoding() -> np.record:
    """Return an encoder that has written nothing; its position is how many bytes it has written."""
    return record(decoding=False, low=_U0, high=_ALL, code=_U0, position=0)


def start_decoding(data: Bytes) -> np.record:
    """Return a decoder; its code is the eight bytes in view, its position how many bytes it has taken."""
    view = int.from_bytes(data[:8].tobytes().ljust(8, b"\0"), "big")
    return record(decoding=True, low=_U0, high=_ALL, code=np.uint64(view), position=8)


@compiled_in_place
def code_bit(coder: np.record, data: Bytes, bit: int, probability: int) -> int:
    """Return the bit that was decoded, or that was encoded.

    Parameters
    ----------
    coder, data
        Encoder or decoder, and its bytes; an encoder needs room for nine more.
    probability
        That the bit is one, in 1/65536; 1 to 65535.
    """
    low, high = coder.low, coder.high
    span, share = high - low, np.uint64(probability)
    middle = low + (span >> _U16) * share + (((span & _FRACTION) * share) >> _U16)
    if coder.decoding:
        bit = 1 if coder.code <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + _U1
    _shift(coder, data, low, high)
    return bit


@compiled_in_place
def code_evenly(coder: np.record, data: Bytes, value: int, bits: int) -> int:
    """Return an integer of up to 16 bits that was decoded, or that was encoded, all of them being equally probable."""
    low, high = coder.low, coder.high
    share = (high - low) >> np.uint64(bits)
    if share < _FRACTION:
        # Hardly ever: the bounds are too near to each other for parts of equal size.
        known = 0
        for place in range(bits - 1, -1, -1):
            known = 2 * known + code_bit(coder, data, (value >> place) & 1, int(np.int32(32768)))
        return known
    if coder.decoding:
        part = np.int64((coder.code - low) // share)
        value = min(int(part), (1 << bits) - 1)
    low += share * np.uint64(value)
    _shift(coder, data, low, low + share - _U1)
    return value


@called
def code_integer_evenly(coder: np.record, data: Bytes, value: int, bits: int) -> int:
    """Return an integer of up to 63 bits as `code_evenly` does, from the highest bits down."""
    known = 0
    while bits > 0:
        taken = min(bits, 16)
        bits -= taken
        known = known << taken | code_evenly(coder, data, (value >> bits) & ((1 << taken) - 1), taken)
    return known


@inlined
def _shift(coder: np.record, data: Bytes, low: np.uint64, high: np.uint64) -> None:
    """Write (or read over) the bytes on which both bounds agree."""
    while ((low ^ high) >> _U56) == _U0:
        position = coder.position
        if coder.decoding:
            following = np.uint64(data[position]) if position < data.size else _U0
            coder.code = (coder.code << _U8) | following
        else:
            data[position] = np.uint8(high >> _U56)
        coder.position = position + 1
        low = low << _U8
        high = (high << _U8) | _BYTE
    coder.low, coder.high = low, high


def finish_encoding(coder: np.record, data: Bytes) -> bytes:
    """Return all bytes of the stream: those written, and the fewest that tell the last range from its neighbours."""
    return data[: coder.position].tobytes() + _tail(int(coder.low), int(coder.high))


def require_read(coder: np.record, data: Bytes) -> None:
    """Check that no more bytes were read than there are.

    Raises
    ------
    StreamError
        There were.
    """
    if coder.position - 8 > data.size:
        raise StreamError("the binary decisions of the stream don't end where its bytes end: it is corrupted")


def finish_decoding(coder: np.record, data: Bytes) -> None:
    """Check that the bytes are those that an encoder of the decoded decisions writes, no more and no fewer.

    Damaged bytes are as a rule the stream of other decisions: it is for checksums to find that out.

    Raises
    ------
    StreamError
        They aren't.
    """
    require_read(coder, data)
    written = coder.position - 8
    if data[written:].tobytes() != _tail(int(coder.low), int(coder.high)):
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
