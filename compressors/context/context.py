"""The fast tight code: integers by adaptive counts in bins of row scale times column scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Coder, Part
from kcomplex.estimators.description import STRUCTURE
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape, Symbols

from ..tables.centring import centre
from ..tables.numbers import eighths_of_octaves, folded, octave_fraction, read_middle, zigzag
from ..tables.words import byte_size, from_bytes, to_bytes
from .magnitude_tokens import MOST_MAGNITUDE, join_tokens, split_tokens
from .model import (
    LARGEST,
    PROBABILITY_BITS,
    SETTINGS,
    ZEROS,
    Histograms,
    Integers,
    code_matrix,
    room,
)

# What the first byte of a stream says: the position of the settings, plus these.
_TRANSPOSED, _TILTED, _TOKENS, _MODELLED = 16, 32, 64, 128
# The direction is tried out on a corner of so many rows and columns, or half as many of a matrix that is short.
_CORNER = 128
# Rows in which column means are looked for.
_SAMPLED_ROWS = 64
# Bits of entropy from which bytes look like noise, and in how many of them.
_FLAT, _FLAT_SAMPLE = 7.992, 1 << 13
# Non-zeros a symbol of the alphabet below which few bins are used.
_FEW = 256
# What a second histogram a bin costs, in bits a symbol of the alphabet, about.
_TILT_PRICE = 30.0
# The cheapest weight costs what a symbol of frequency 2**20 - 1 does.
_MOST_WEIGHTS_A_BYTE = round(8 * math.log(2) * 2**PROBABILITY_BITS)


@dataclass(frozen=True)
class Context(Coder):
    """Codes quantised weights and palette indices tightly at tens of millions a second.

    An integer is coded by how often it occurred among weights of a similar expected magnitude, which follows from the
    running mean magnitudes of row and column. Magnitudes count from zero, the mode or the median. Columns with a
    mean, as embeddings have, may keep histograms of their own. Whether rows or columns are coded first is tried out on
    a corner of the matrix and told in the stream.

    Magnitudes from 512 on are coded by their first three bits; the bits below follow as they are.

    Notes
    -----
    Tensors are coded each by itself, so that they are coded in parallel and can be decoded one by one.
    """

    name: ClassVar[str] = "context"

    def encode(self, symbols: Symbols) -> bytes:
        """Return the stream; see `Coder.encode`."""
        return b"".join(part.data for part in self.encode_parts(symbols))

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return the layout (structure), the payload, and the bits below tokens; or the plain words if shorter."""
        if not symbols.size:
            return []
        plain = [Part("payload", to_bytes(symbols))]
        if max(int(symbols.max()), -int(symbols.min())) >= MOST_MAGNITUDE:
            return plain
        middle = centre(symbols)
        wide: NDArray[np.signedinteger[Any]] = symbols.astype(np.int32 if symbols.dtype.itemsize < 4 else np.int64)
        wide -= middle
        largest = max(int(wide.max()), -int(wide.min()))
        if largest >= MOST_MAGNITUDE:
            return plain
        low_bits = b""
        if largest > LARGEST:
            tokens, low_bits = split_tokens(wide)
        else:
            tokens = wide.astype(np.int16)
        layout = _layout(tokens.reshape(folded(symbols.shape)), _is_flat(symbols))
        if layout is None:
            return plain
        choice, matrix = layout
        flags = choice | (_TOKENS if largest > LARGEST else 0) | _MODELLED
        head, payload, shares = _encode_matrix(matrix, choice)
        head = bytes([flags]) + varint(zigzag(middle)) + head
        if low_bits:
            head += varint(len(payload))
        parts = [Part(STRUCTURE, head), Part("payload", payload, shares), Part("low magnitude bits", low_bits)]
        size = sum(len(part.data) for part in parts)
        return [part for part in parts if part.data] if size < byte_size(symbols.shape, symbols.dtype) else plain

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`."""
        if len(data) >= byte_size(shape, dtype):
            return from_bytes(data, shape, dtype)
        reader = Reader(data)
        flags = reader.take(1)[0]
        choice = flags & ~(_MODELLED | _TOKENS)
        if not flags & _MODELLED or choice & 15 >= len(SETTINGS):
            raise StreamError(f"context: a stream can't begin with {flags}")
        middle = read_middle(reader)
        tokens = _decode_matrix(reader, choice, folded(shape), bool(flags & _TOKENS))
        if choice & _TRANSPOSED:
            tokens = tokens.T
        flat = np.ascontiguousarray(tokens).reshape(-1)
        wide = join_tokens(flat, reader.rest()) if flags & _TOKENS else flat.astype(np.int64)
        if reader.left:
            raise StreamError(f"context: {reader.left} bytes are left over")
        symbols: Symbols = (wide + middle).astype(dtype).reshape(shape)
        return symbols


def _is_flat(symbols: Symbols) -> bool:
    """Return whether bytes occur equally often, all but a thousandth of their entropy, in some 8,000 of them.

    An empirical entropy is too low by half a degree of freedom a symbol (Miller, "Note on the bias of information
    estimates", 1955).
    """
    if symbols.dtype.itemsize > 1:
        return False
    sample = symbols.reshape(-1)[:: max(1, symbols.size // _FLAT_SAMPLE)].view(np.uint8)
    counts = np.bincount(sample)
    counts = counts[counts > 0]
    entropy = math.log2(sample.size) - float(counts @ np.log2(counts)) / sample.size
    return entropy + (counts.size - 1) / (2 * math.log(2) * sample.size) >= _FLAT


def _layout(matrix: Integers, flat: bool) -> tuple[int, Integers] | None:
    """Return the choice of settings, direction and tilt, and the matrix in that direction.

    None of noise: of what is flat, if its corner isn't shorter than its bytes.
    """
    nonzero = np.count_nonzero(matrix)
    smallest, largest = _range(matrix)
    alphabet = largest - smallest + 1
    choice = 0
    if 2 * nonzero < matrix.size:
        choice = 2 if nonzero < _FEW * alphabet else 1
    if min(matrix.shape) > 1:
        side = _CORNER if matrix.size >= 8 * _CORNER**2 else _CORNER // 2
        corner = matrix[:side, :side]
        lengths = [len(_encode_matrix(np.ascontiguousarray(turned), choice)[1]) for turned in (corner, corner.T)]
        if flat and min(lengths) >= corner.size:
            return None
        if lengths[1] < lengths[0]:
            choice |= _TRANSPOSED
            matrix = matrix.T
    matrix = np.ascontiguousarray(matrix)
    if _tilt_gain(matrix) > _TILT_PRICE * alphabet:
        choice |= _TILTED
    return choice, matrix


def _tilt_gain(matrix: Integers) -> float:
    """Return about how many bits the means of columns are worth: of a normal distribution's, by their variance."""
    height, width = matrix.shape
    sample = matrix[:: max(1, height // _SAMPLED_ROWS)].astype(np.float64)
    if len(sample) < 8:
        return 0.0
    power = float(np.square(sample).mean())
    of_means = float(np.square(sample.mean(axis=0)).mean()) - power / len(sample)
    share = min(max(of_means / max(power, 1e-12), 0.0), 0.99)
    return float(-0.5 * math.log2(1.0 - share) * height * width)


def _range(matrix: Integers) -> tuple[int, int]:
    return min(int(matrix.min()), 0), max(int(matrix.max()), 0)


def _encode_matrix(matrix: Integers, choice: int) -> tuple[bytes, bytes, Mapping[str, float] | None]:
    """Return what is told of a matrix, its payload, and the model's bits by what they tell."""
    smallest, largest = _range(matrix)
    if choice & _TILTED:
        largest = max(largest, -smallest)
        smallest = -largest
    scale = min(max(eighths_of_octaves(max(float(np.abs(matrix).mean()), 2.0**-6)), -48), 79)
    head = varint(-smallest) + varint(largest) + bytes([scale + 48])
    if smallest == largest:
        return head, b"", None
    data = np.empty(room(matrix.size), np.uint32)
    used, _, histograms = code_matrix(
        False, matrix, smallest, largest, SETTINGS[choice & 15], bool(choice & _TILTED), _fixed(scale), data
    )
    payload = data[:used].astype(">u4").tobytes().rstrip(b"\0")
    return head, payload, _shares(histograms, matrix.size, 8.0 * len(payload))


def _decode_matrix(reader: Reader, choice: int, shape: tuple[int, int], tokens: bool) -> Integers:
    smallest, largest, scale = -reader.varint(), reader.varint(), reader.take(1)[0] - 48
    if max(-smallest, largest) > LARGEST or scale > 79 or (choice & _TILTED and smallest != -largest):
        raise StreamError("context: the layout of a matrix is corrupted")
    payload = reader.take(reader.varint()) if tokens else reader.rest()
    height, width = shape[::-1] if choice & _TRANSPOSED else shape
    if smallest == largest:
        if payload:
            raise StreamError("context: a constant matrix has no payload")
        return np.zeros((height, width), np.int16)
    if height * width > (len(payload) + 8) * _MOST_WEIGHTS_A_BYTE:
        raise StreamError(f"context: {len(payload)} bytes can't hold {height * width} weights")
    words = -(-len(payload) // 4)
    data = np.zeros(max(words, 2), np.uint32)
    data[:words] = np.frombuffer(payload.ljust(4 * words, b"\0"), ">u4")
    matrix = np.empty((height, width), np.int16)
    used, last, _ = code_matrix(
        True, matrix, smallest, largest, SETTINGS[choice & 15], bool(choice & _TILTED), _fixed(scale), data
    )
    # A decoder has read one word more than an encoder has written.
    position = used - 2
    final = int(data[position - 1]) if 0 < position <= words else 0
    if position < words or final != last or payload.endswith(b"\0"):
        raise StreamError("context: the payload is truncated or corrupted")
    return matrix


def _fixed(eighths: int) -> int:
    """Return a scale in 1/65536."""
    return int(octave_fraction(eighths) * 65536.0)


def _shares(histograms: Histograms, weights: int, bits: float) -> dict[str, float]:
    """Return the bits that zero flags take by how often each bin was zero, a bit a sign, and the rest."""
    seen, zeros = histograms.seen(), histograms.states[:, ZEROS]
    flags = float((_cost(zeros, seen) + _cost(seen - zeros, seen)).sum())
    signs = float(weights - zeros.sum())
    return {"zero flags": flags, "signs": signs, "magnitudes": max(bits - flags - signs, 0.0)}


def _cost(times: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the bits of outcomes that occurred so many times of so many."""
    bits: NDArray[np.float64] = times * (np.log2(np.maximum(of, 1)) - np.log2(np.maximum(times, 1)))
    return bits
