"""What `mix` and `lin` learn along a stream of tensors, and the layout in which each tensor's bytes tell it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.compressors.binary_coder import (
    POSITION,
    Bytes,
    CoderState,
    as_bytes,
    finish_decoding,
    finish_encoding,
    start_decoding,
    start_encoding,
)
from kcomplex.compressors.linear_prediction import (
    NO_FACTORS,
    NO_PREDICTION,
    Covariance,
    blocks,
    is_predictable,
    plan,
)
from kcomplex.compressors.logistic import exponential, tables
from kcomplex.compressors.logistic_mixing import Mixer
from kcomplex.compressors.mix_integers import FIELDS, code_integer_rows, new_columns, new_integer_mixer, new_regression
from kcomplex.compressors.words import from_bytes, to_bytes
from kcomplex.description import STRUCTURE
from kcomplex.errors import StreamError
from kcomplex.estimator import Coder, Part, Shape, Symbols
from kcomplex.structure import Reader, varint

Integers: TypeAlias = NDArray[np.int64]

_PLAIN, _MODELLED = 0, 1
_TRANSPOSED, _LINEAR = 2, 4
# Integers are modelled up to this magnitude.
_LARGEST = 1 << 48
# Vectors, and matrices with longer rows than this, are coded in rows of `_FOLD`.
_WIDEST = 1 << 16
_FOLD = 1024
# Bytes that a weight can take: 49 unary decisions, zero flag, sign and 48 bits, each of at most 16 bits.
_MOST_BYTES = 200
_WEIGHTS_A_CALL = 1 << 16
# The cheapest weight costs one decision of probability 65535/65536.
_MOST_WEIGHTS_A_BYTE = 370_000
# Rows of a matrix that predict themselves are at most so many times longer than there are rows to learn from.
_MOST_PREDICTED = 8
_SAMPLE = 1 << 16
_EIGHTHS = exponential(np.arange(8.0) * (0.6931471805599453 / 8))


@dataclass
class Memory:
    """What tensors of a stream leave to those after them."""

    mixer: Mixer = field(default_factory=new_integer_mixer)
    regression: NDArray[np.float64] = field(default_factory=new_regression)
    column_scales: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    covariances: dict[int, Covariance] = field(default_factory=dict)

    def covariance(self, width: int) -> Covariance:
        """Return what a matrix of this width begins with; a copy."""
        known = self.covariances.get(width)
        return Covariance.empty(width) if known is None else known.carried()

    def block_count(self, height: int, width: int) -> int:
        """Return how many blocks of rows of a matrix are predicted each with a choice of its own."""
        return sum(1 for _ in blocks(height, width in self.covariances))


@dataclass(frozen=True)
class LearningMix(Coder):
    """The coder of one stream; see `kcomplex.compressors.mix.Mix`."""

    linear: bool
    memory: Memory = field(default_factory=Memory)
    name: ClassVar[str] = "learning_mix"

    def encode(self, symbols: Symbols) -> bytes:
        """Return the stream; see `Coder.encode`."""
        return b"".join(part.data for part in self.encode_parts(symbols))

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        if not symbols.size:
            return []
        centre = _centre(symbols)
        values = symbols.astype(np.int64) - np.int64(centre)
        largest = max(int(values.max()), -int(values.min()))
        if largest >= _LARGEST:
            return [Part(STRUCTURE, bytes([_PLAIN])), Part("payload", to_bytes(symbols))]
        matrix = values.reshape(_folded(symbols.shape))
        scale = _scale_index(matrix)
        mode, choices = self._layout(matrix, largest, _scale(scale))
        if mode & _TRANSPOSED:
            matrix = np.ascontiguousarray(matrix.T)
        spent, encoder = np.zeros(len(FIELDS)), _Encoder()
        self._code(matrix, scale, choices, encoder, spent)
        return [
            Part(STRUCTURE, bytes([mode]) + varint(_zigzag(centre)) + varint(scale + 64)),
            Part("tables", _pack_choices(choices)),
            Part("payload", encoder.finish(), dict(zip(FIELDS, spent.tolist(), strict=True))),
        ]

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`."""
        size = math.prod(shape)
        reader = Reader(data)
        if not size:
            return from_bytes(data, shape, dtype)
        mode = reader.take(1)[0]
        if mode == _PLAIN:
            return from_bytes(reader.rest(), shape, dtype)
        if not mode & _MODELLED or mode > _MODELLED + _TRANSPOSED + _LINEAR:
            raise StreamError(f"{self.name}: a tensor can't begin with {mode}")
        centre = _unzigzag(reader.varint())
        scale = reader.varint() - 64
        if scale > 383:
            raise StreamError(f"{self.name}: a scale of {scale} eighths of an octave")
        height, width = _folded(shape)
        if mode & _TRANSPOSED:
            height, width = width, height
        choices = _read_choices(reader, self.memory.block_count(height, width)) if mode & _LINEAR else []
        payload = as_bytes(reader.rest())
        if size > (payload.size + 16) * _MOST_WEIGHTS_A_BYTE:
            raise StreamError(f"{self.name}: {payload.size} bytes can't hold {size} integers")
        values = np.empty((height, width), np.int64)
        state = start_decoding(payload)
        self._code(values, scale, choices, _Decoder(payload, state), np.zeros(len(FIELDS)))
        finish_decoding(state, payload)
        if mode & _TRANSPOSED:
            values = values.T
        symbols: Symbols = (values.reshape(shape) + np.int64(centre)).astype(dtype)
        return symbols

    def _layout(self, matrix: Integers, largest: int, scale: float) -> tuple[int, list[int]]:
        """Return whether to transpose and predict (as a mode), and the choices of the prediction."""
        if not self.linear or not is_predictable(matrix.shape, largest):
            return _MODELLED, []
        plans = []
        for mode, rows in ((_MODELLED, matrix), (_MODELLED | _TRANSPOSED, matrix.T)):
            if is_predictable(rows.shape, largest) and rows.shape[1] <= _MOST_PREDICTED * rows.shape[0]:
                covariance = self.memory.covariance(rows.shape[1])
                choices, gain = plan(rows.astype(np.float64), covariance, 1.0 / scale)
                plans.append((gain - 4.0 * len(choices), mode, choices))
        if not plans or max(plans)[0] <= 0:
            return _MODELLED, []
        _, mode, choices = max(plans)
        return mode | _LINEAR, choices

    def _code(
        self,
        matrix: Integers,
        scale_index: int,
        choices: list[int],
        coder: _Encoder | _Decoder,
        spent: NDArray[np.float64],
    ) -> None:
        memory, (height, width), scale = self.memory, matrix.shape, _scale(scale_index)
        shared = height > 1
        known = memory.column_scales.get(width) if shared else None
        columns = new_columns(width, scale, np.zeros(width) if known is None else known * scale)
        covariance = memory.covariance(width) if choices else None
        for index, (start, stop) in enumerate(_blocks(height, width, covariance)):
            factors = covariance.factors(choices[index]) if covariance is not None else NO_FACTORS
            for first in range(start, stop, rows_a_call := max(1, _WEIGHTS_A_CALL // width)):
                rows = matrix[first : min(first + rows_a_call, stop)]
                code_integer_rows(
                    coder.decoding,
                    coder.state,
                    coder.room(rows.size),
                    rows,
                    np.zeros(rows.shape, np.float32),
                    *factors,
                    columns,
                    memory.regression,
                    memory.mixer,
                    tables(),
                    spent,
                )
                coder.advance()
            if covariance is not None:
                covariance.add(matrix[start:stop].astype(np.float64), 1.0 / scale)
        if shared:
            memory.column_scales[width] = columns.scale / scale
        if covariance is not None:
            memory.covariances[width] = covariance


class _Encoder:
    """Collects what the kernel writes, call by call."""

    decoding = False

    def __init__(self) -> None:
        self.state: CoderState = start_encoding()
        self._room = np.empty(0, np.uint8)
        self._written = bytearray()

    def room(self, weights: int) -> Bytes:
        """Return room for the most that so many weights can take."""
        if self._room.size < weights * _MOST_BYTES + 16:
            self._room = np.empty(weights * _MOST_BYTES + 16, np.uint8)
        return self._room

    def advance(self) -> None:
        """Keep what was written."""
        self._written += self._room[: int(self.state[POSITION])].tobytes()
        self.state[POSITION] = 0

    def finish(self) -> bytes:
        """Return the whole stream."""
        return bytes(self._written) + finish_encoding(self.state, self._room)


@dataclass(frozen=True)
class _Decoder:
    """Lets the kernel read."""

    data: Bytes
    state: CoderState
    decoding: ClassVar[bool] = True

    def room(self, weights: int) -> Bytes:
        """Return the bytes of the stream."""
        return self.data

    def advance(self) -> None:
        """Nothing: the kernel advances by itself."""


def _blocks(height: int, width: int, covariance: Covariance | None) -> Iterator[tuple[int, int]]:
    if covariance is None:
        return iter([(0, height)])
    return blocks(height, covariance.rows > 0)


def _folded(shape: Shape) -> tuple[int, int]:
    """Return the rows and columns in which a tensor is coded: its first dimension by the others.

    Vectors, and matrices with longer rows than 65536, are cut in the longest rows of at most 1024 that divide them.
    """
    size = math.prod(shape)
    if len(shape) > 1 and shape[0] > 1 and size // shape[0] <= _WIDEST:
        return shape[0], size // shape[0]
    if size <= _FOLD:
        return 1, size
    width = next(width for width in range(_FOLD, 0, -1) if size % width == 0)
    return size // width, width


def _centre(symbols: Symbols) -> int:
    """Return what magnitudes are counted from: zero, the mode or the median, whichever they are least far from."""
    step = max(1, symbols.size // _SAMPLE)
    sample = symbols.reshape(-1)[::step].astype(np.int64)
    words, counts = np.unique(sample, return_counts=True)
    candidates = [int(words[np.argmax(counts)]), int(words[np.searchsorted(2 * np.cumsum(counts), sample.size)])]
    if words[0] <= 0 <= words[-1]:
        candidates.insert(0, 0)
    return min(candidates, key=lambda centre: float(np.log2(1.0 + np.abs(words - float(centre))) @ counts))


def _scale_index(matrix: Integers) -> int:
    """Return the mean magnitude as eighths of an octave, -64 to 127 * 3."""
    mean = float(np.abs(matrix).mean())
    return int(np.clip(np.rint(8 * np.log2(max(mean, 2.0**-8))), -64, 383))


def _scale(index: int) -> float:
    return float(np.ldexp(_EIGHTHS[index % 8], index // 8))


def _pack_choices(choices: list[int]) -> bytes:
    """Return two choices a byte."""
    padded = [*choices, 0] if len(choices) % 2 else choices
    return bytes(first | second << 4 for first, second in zip(padded[::2], padded[1::2], strict=True))


def _read_choices(reader: Reader, count: int) -> list[int]:
    packed = reader.take((count + 1) // 2)
    choices = [choice for byte in packed for choice in (byte & 15, byte >> 4)][:count]
    if max(choices, default=0) > NO_PREDICTION:
        raise StreamError("lin: the stream names a prediction that doesn't exist")
    return choices


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _unzigzag(code: int) -> int:
    return code // 2 if code % 2 == 0 else -(code + 1) // 2
