"""What the models behind `mix` and `lin` share: memory along a stream, the layout of a matrix, rows in segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Part
from kcomplex.estimators.description import STRUCTURE
from kcomplex.estimators.structure import Reader

from ..tables.logistic import tables
from .binary_coder import (
    Bytes,
    as_bytes,
    finish_decoding,
    finish_encoding,
    require_read,
    start_decoding,
    start_encoding,
)
from .linear_prediction import (
    NO_FACTORS,
    NO_PREDICTION,
    Covariance,
    Matrix,
    Prediction,
    is_predictable,
    plan,
    segments,
)
from .logistic_mixing import Engine, copied
from .scales import new_scales

Integers: TypeAlias = NDArray[np.int64]

# What the first byte of a tensor's stream says: bits of a mode.
PLAIN, MODELLED, TRANSPOSED, LINEAR = 0, 1, 2, 4
# The layout without transposition and prediction.
PLAINLY: list[tuple[int, list[int]]] = [(0, [])]
# Bytes that a weight can take: 49 unary decisions, zero flag, sign and 48 bits, each of at most 16 bits.
_MOST_BYTES = 200
_WEIGHTS_A_CALL = 1 << 16
# The cheapest weight costs one decision of probability 65535/65536.
_MOST_WEIGHTS_A_BYTE = 370_000
# Rows of a matrix that predict themselves are at most so many times longer than there are rows to learn from.
_MOST_PREDICTED = 8
# Layouts whose Gaussian gain is within so many bits a weight of the best are all tried.
_UNCLEAR = 0.08


@dataclass
class Memory:
    """What tensors of a stream leave to those after them.

    Attributes
    ----------
    eager
        Whether the linear prediction is learned in many steps; see `linear_prediction.segments`.
    """

    mixer: np.record
    eager: bool = False
    column_scales: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    covariances: dict[int, Covariance] = field(default_factory=dict)

    def covariance(self, width: int) -> Covariance:
        """Return what a matrix of this width begins with; a copy."""
        known = self.covariances.get(width)
        return Covariance.empty(width) if known is None else known.carried()

    def copy(self) -> Memory:
        """Return a copy for a trial."""
        return Memory(copied(self.mixer), self.eager, dict(self.column_scales), dict(self.covariances))

    def become(self, other: Memory) -> None:
        """Take over what another memory, not used any more, has learned."""
        self.mixer, self.column_scales, self.covariances = other.mixer, other.column_scales, other.covariances

    def scales(self, shape: tuple[int, int], scale: float) -> NDArray[np.float64]:
        """Return the column scales that the last matrix of this width ended with, adapted to a scale; else zeros."""
        known = self.column_scales.get(shape[1]) if shape[0] > 1 else None
        return np.zeros(shape[1]) if known is None else known * scale

    def keep_scales(self, shape: tuple[int, int], scales: NDArray[np.float64], scale: float) -> None:
        """Remember the column scales of a matrix; not those of a single row."""
        if shape[0] > 1:
            self.column_scales[shape[1]] = scales / scale


class RowEncoder:
    """Collects what a kernel writes, call by call."""

    def __init__(self) -> None:
        self.state = start_encoding()
        self._room = np.empty(0, np.uint8)
        self._written = bytearray()

    def room(self, weights: int) -> Bytes:
        """Return room for the most that so many weights can take."""
        if self._room.size < weights * _MOST_BYTES + 16:
            self._room = np.empty(weights * _MOST_BYTES + 16, np.uint8)
        return self._room

    def advance(self) -> None:
        """Keep what was written."""
        self._written += self._room[: self.state.position].tobytes()
        self.state.position = 0

    def finish(self) -> bytes:
        """Return the whole stream."""
        return bytes(self._written) + finish_encoding(self.state, self._room)


class RowDecoder:
    """Lets a kernel read."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.state = start_decoding(data)

    def room(self, weights: int) -> Bytes:
        """Return the bytes of the stream."""
        return self.data

    def advance(self) -> None:
        """Check that the kernel, which advances by itself, isn't beyond the last byte: it would go on for ever."""
        require_read(self.state, self.data)


class RowModel(NamedTuple):
    """What codes the rows of a matrix.

    Attributes
    ----------
    kernel
        Called with engine, scales and prediction, the rows, what it knows of columns, and further arguments.
    columns
        Returns what the kernel knows of columns besides their scales, given their number and the matrix's scale.
    names
        What bits are spent on.
    """

    kernel: Callable[..., None]
    columns: Callable[[int, float], Any]
    names: tuple[str, ...]


@dataclass(frozen=True)
class MatrixModel:
    """How one matrix is coded.

    Attributes
    ----------
    scale
        What its entries' magnitudes are expected to be before any is known, in its units.
    arguments
        Returns what the kernel is told besides, of the rows from one index to another.
    numbers
        Returns rows, already coded, as the covariance counts them, given the index of the first.
    """

    rows: RowModel
    scale: float
    arguments: Callable[[int, int], tuple[Any, ...]]
    numbers: Callable[[Integers, int], Matrix]

    def encode(self, memory: Memory, matrix: Integers, choices: list[int]) -> Part:
        """Return the payload of a matrix, of which the memory learns.

        Parameters
        ----------
        choices
            Of the linear prediction for each segment of rows; none without one.
        """
        coder = RowEncoder()
        spent = self._code(coder, memory, matrix, choices)
        return Part("payload", coder.finish(), dict(zip(self.rows.names, spent.tolist(), strict=True)))

    def decode(self, memory: Memory, payload: Bytes, shape: tuple[int, int], choices: list[int]) -> Integers:
        """Return the matrix in a payload.

        Raises
        ------
        StreamError
            The payload isn't that of such a matrix.
        """
        check_size(math.prod(shape), payload.size)
        coder, matrix = RowDecoder(payload), np.empty(shape, np.int64)
        self._code(coder, memory, matrix, choices)
        finish_decoding(coder.state, payload)
        return matrix

    def _code(
        self, coder: RowEncoder | RowDecoder, memory: Memory, matrix: Integers, choices: list[int]
    ) -> NDArray[np.float64]:
        """Code all rows, learning the covariance segment by segment where there are choices; return the bits spent."""
        height, width = matrix.shape
        scales = new_scales(self.scale, memory.scales((height, width), self.scale))
        columns = self.rows.columns(width, self.scale)
        memory.mixer.spent[:] = 0.0
        covariance = memory.covariance(width) if choices else None
        spans = segments(height, covariance.rows > 0, memory.eager) if covariance is not None else [(0, height)]
        for index, (start, stop) in enumerate(spans):
            factors = covariance.factors(choices[index]) if covariance is not None else NO_FACTORS
            for first, last in _calls(start, stop, width):
                rows, room = matrix[first:last], coder.room((last - first) * width)
                engine = Engine(coder.state, room, memory.mixer, tables())
                prediction = Prediction(np.zeros(rows.shape, np.float32), *factors)
                self.rows.kernel(engine, scales, prediction, rows, columns, *self.arguments(first, last))
                coder.advance()
            if covariance is not None:
                covariance.add(self.numbers(matrix[start:stop], start))
        if covariance is not None:
            memory.covariances[width] = covariance
        memory.keep_scales((height, width), scales.columns["scale"], self.scale)
        spent: NDArray[np.float64] = memory.mixer.spent
        return spent


def encode_matrix(
    memory: Memory,
    linear: bool,
    head: tuple[int, bytes],
    matrix: Integers,
    counted: Integers,
    model: Callable[[bool], MatrixModel],
    before: Sequence[Part] = (),
) -> list[Part]:
    """Return mode and head (structure), what comes before, the prediction's choices (tables), and the payload.

    Parameters
    ----------
    linear
        Whether linear prediction is tried.
    head
        Flags besides those of the layout, and what the model is told by.
    counted
        The matrix as the covariance counts it: up to `MOST_COUNTED`.
    model
        Returns the model of the matrix, or of the transposed one.
    """
    flags, told = head
    candidates = layouts(memory, counted) if linear else PLAINLY

    def encode(memory: Memory, mode: int, choices: list[int]) -> list[Part]:
        transposed = bool(mode & TRANSPOSED)
        rows = np.ascontiguousarray(matrix.T if transposed else matrix)
        return [
            Part(STRUCTURE, bytes([mode | flags]) + told),
            *before,
            Part("tables", pack_choices(choices)),
            model(transposed).encode(memory, rows, choices),
        ]

    return shortest(memory, candidates, encode)


def decode_matrix(
    reader: Reader, memory: Memory, mode: int, shape: tuple[int, int], model: Callable[[bool], MatrixModel]
) -> Integers:
    """Return the matrix whose mode, head and what comes before the choices are already read.

    Raises
    ------
    StreamError
        Choices or payload aren't those of such a matrix.
    """
    transposed = bool(mode & TRANSPOSED)
    coded = (shape[1], shape[0]) if transposed else shape
    choices = read_choices(reader, memory, coded) if mode & LINEAR else []
    matrix = model(transposed).decode(memory, as_bytes(reader.rest()), coded, choices)
    return matrix.T if transposed else matrix


def layouts(memory: Memory, matrix: Integers) -> list[tuple[int, list[int]]]:
    """Return the layouts that may be the shortest: bits of a mode, and the choices of the prediction.

    What a Gaussian code gains decides where it is clear; other models gain less, and less evenly.
    """
    found: list[tuple[float, int, list[int]]] = [(0.0, 0, [])]
    if is_predictable(matrix.shape):
        for mode, rows in ((LINEAR, matrix), (LINEAR | TRANSPOSED, matrix.T)):
            if is_predictable(rows.shape) and rows.shape[1] <= _MOST_PREDICTED * rows.shape[0]:
                choices, gain = plan(rows.astype(np.float64), memory.covariance(rows.shape[1]), memory.eager)
                if gain > 4.0 * len(choices):
                    found.append((gain / matrix.size, mode, choices))
    best = max(gain for gain, _, _ in found)
    return [(mode, choices) for gain, mode, choices in found if best - gain < _UNCLEAR]


def shortest(
    memory: Memory,
    candidates: list[tuple[int, list[int]]],
    encode: Callable[[Memory, int, list[int]], list[Part]],
) -> list[Part]:
    """Return the shortest of several encodings; the memory learns from that one alone."""
    if len(candidates) == 1:
        return encode(memory, *candidates[0])
    trials = []
    for mode, choices in candidates:
        trial = memory.copy()
        trials.append((encode(trial, mode, choices), trial))
    parts, trial = min(trials, key=lambda pair: sum(len(part.data) for part in pair[0]))
    memory.become(trial)
    return parts


def pack_choices(choices: list[int]) -> bytes:
    """Return two choices a byte."""
    padded = [*choices, 0] if len(choices) % 2 else choices
    return bytes(first | second << 4 for first, second in zip(padded[::2], padded[1::2], strict=True))


def read_choices(reader: Reader, memory: Memory, shape: tuple[int, int]) -> list[int]:
    """Return the choices of each segment of a matrix, as `pack_choices` wrote them.

    Raises
    ------
    StreamError
        There are too few, or one that doesn't exist.
    """
    height, width = shape
    count = sum(1 for _ in segments(height, width in memory.covariances, memory.eager))
    packed = reader.take((count + 1) // 2)
    choices = [choice for byte in packed for choice in (byte & 15, byte >> 4)][:count]
    if max(choices, default=0) > NO_PREDICTION:
        raise StreamError("lin: the stream names a prediction that doesn't exist")
    return choices


def check_size(size: int, payload: int) -> None:
    """Check that so many weights may be in so many bytes.

    Raises
    ------
    StreamError
        There are more than any stream of that length holds.
    """
    if size > (payload + 16) * _MOST_WEIGHTS_A_BYTE:
        raise StreamError(f"{payload} bytes can't hold {size} weights")


def _calls(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    rows = max(1, _WEIGHTS_A_CALL // width)
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)
