"""What estimators are: codes with a decoder, code lengths without one, and the stages before them.

An estimator is a frozen dataclass; its fields are its configuration and its ``name`` is what specifications call it.
To add one, subclass the class that fits and register it under the entry-point group ``kcomplex.estimators``:

- `Coder`: integers to bytes and back, lossless. Implement ``encode`` and ``decode``.
- `CodeLength`: a length in bits of integers, without a stream (``ideal`` or ``proxy``). Implement ``length``.
- `Transform`: lossless, turns integers into other integers that a coder does better on (byte planes, palette).
- `Quantiser`: lossy, turns floats into integers and side information.
- `Estimator`: anything else that measures whole weights.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.estimators.description import STRUCTURE, Description, Kind, TensorDescription, Unit
from kcomplex.estimators.spec import full_spec_of, spec_of
from kcomplex.estimators.structure import TensorEntry, encode_structure, join_lengths, split_lengths
from kcomplex.machine.parallel import in_order
from kcomplex.version import VERSION
from kcomplex.weights import (
    TensorHandle,
    Weights,
    dtype_name,
    tensor_from_words,
    word_dtype,
    words_an_element,
    words_of,
)

Symbols: TypeAlias = NDArray[np.integer[Any]]
Shape: TypeAlias = tuple[int, ...]
Layout: TypeAlias = tuple[Shape, np.dtype[np.integer[Any]]]
Progress: TypeAlias = Callable[[TensorHandle], None]
Measured = TypeVar("Measured")

# A lossless coder sees long tensors in pieces of this many words: memory is bounded by the pieces in flight.
CHUNK_WORDS = 1 << 24


class Part(NamedTuple):
    """A piece of a stream under the name that its bits are counted by.

    Attributes
    ----------
    shares
        Where one piece codes several things at once (signs, magnitudes ...): the model's bits for each, by which the
        piece's own bits are divided among those names.
    """

    name: str
    data: bytes
    shares: Mapping[str, float] | None = None

    def bits(self) -> dict[str, float]:
        """Return the piece's bits by name; they sum to eight times its bytes."""
        bits = 8.0 * len(self.data)
        total = math.fsum(self.shares.values()) if self.shares else 0.0
        if not self.shares or total <= 0:
            return {self.name: bits}
        # Multiples of 1/1024 bit, so that sums over any number of pieces stay exact.
        divided = {name: round(1024 * bits * share / total) / 1024 for name, share in self.shares.items()}
        largest = max(divided, key=divided.__getitem__)
        divided[largest] += bits - math.fsum(divided.values())
        return divided


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor's stream, and what its decoder gives back.

    Attributes
    ----------
    parts
        The stream in named parts, in order.
    squared_error
        Sum of squared differences between the tensor and what the decoder gives back.
    exact
        Whether the decoder gives back every bit.
    """

    parts: list[Part]
    squared_error: float = 0.0
    exact: bool = True

    def to_bytes(self) -> bytes:
        """Return the stream."""
        return b"".join(part.data for part in self.parts)


class Estimator(ABC):
    """Turns weights into a description."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """``code``, ``ideal`` or ``proxy``."""

    @property
    def spec(self) -> str:
        """Specification string that builds this estimator again."""
        return spec_of(self)

    @property
    def full_spec(self) -> str:
        """Specification string with every option, defaults included: what a stream names its decoder by."""
        return full_spec_of(self)

    @abstractmethod
    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description of weights.

        Parameters
        ----------
        weights
            What to measure.
        jobs
            Threads to measure tensors with; the result doesn't depend on it.
        progress
            Called after each tensor.
        """


@dataclass(frozen=True)
class TensorLength:
    """One tensor's length in bits by part, and what its decoder (a thought one, for a length) gives back."""

    parts: dict[str, float]
    squared_error: float = 0.0
    exact: bool = True


class TensorwiseEstimator(Estimator):
    """An estimator in bits that measures tensor by tensor: a code, or a code length."""

    @property
    def sequential(self) -> bool:
        """Whether a tensor's length depends on the tensors before it; its stream is then decoded after theirs."""
        return False

    def fresh(self) -> TensorwiseEstimator:
        """Return what measures, encodes or decodes the tensors of one stream in order.

        An estimator that learns from tensor to tensor returns a copy with a state of its own; any other, itself.
        """
        return self

    def prepare(self, weights: Weights) -> bytes:
        """Return the side information that all tensors share (one codebook for the whole network); none by default."""
        return b""

    @abstractmethod
    def tensor_length(self, handle: TensorHandle, shared: bytes) -> TensorLength:
        """Return one tensor's length; ``shared`` is what `prepare` returned."""

    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description; see `Estimator.describe`. Codes and ideal lengths pay for the structure."""
        start = time.perf_counter()
        shared = self.prepare(weights)
        measure = partial(self.fresh()._describe_tensor, shared=shared)
        tensors = for_each_tensor(measure, weights, 1 if self.sequential and jobs else jobs, progress)
        parts: dict[str, float] = {}
        if self.kind != "proxy":
            lengths = [int(tensor.value) // 8 for tensor in tensors]
            parts[STRUCTURE] = 8.0 * len(encode_structure(self.full_spec, weights, len(shared), lengths))
        if shared:
            parts["tables"] = 8.0 * len(shared)
        return assemble(self, weights, tensors, parts, start)

    def _describe_tensor(self, handle: TensorHandle, shared: bytes) -> TensorDescription:
        length = self.tensor_length(handle, shared)
        return TensorDescription(
            handle.name,
            handle.shape,
            dtype_name(handle.dtype),
            handle.elements,
            8 * handle.nbytes,
            math.fsum(length.parts.values()),
            length.parts,
            length.squared_error,
            length.exact,
        )


class Code(TensorwiseEstimator):
    """An estimator with a decoder. Its bits are eight times the bytes of the stream (see `measuring.stream`)."""

    @property
    def kind(self) -> Kind:
        """``code``."""
        return "code"

    def fresh(self) -> Code:
        """Return what encodes or decodes the tensors of one stream; see `TensorwiseEstimator.fresh`."""
        return self

    @property
    def divisible(self) -> bool:
        """Whether pieces of a tensor may be coded as tensors of their own: no, where a whole tensor is quantised."""
        return False

    @abstractmethod
    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return one tensor's stream."""

    @abstractmethod
    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor of a stream that `encode_tensor` made.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """

    def decode_entry(self, data: bytes, entry: TensorEntry, shared: bytes) -> torch.Tensor:
        """Return the tensor of an entry in a stream's structure; see `decode_tensor`, which needs no name."""
        return self.decode_tensor(data, entry.dtype, entry.shape, shared)

    def tensor_length(self, handle: TensorHandle, shared: bytes) -> TensorLength:
        """Return the length of the tensor's stream by part."""
        encoded = self.encode_tensor(handle, shared)
        parts = sum_parts(item for part in encoded.parts for item in part.bits().items())
        return TensorLength(parts, encoded.squared_error, encoded.exact)


class Coder(Code):
    """A lossless code for integers. Subclasses implement `encode` and `decode` and may itemise with `encode_parts`."""

    @property
    def divisible(self) -> bool:
        """True: every word comes back, whatever stands around it."""
        return True

    def fresh(self) -> Coder:
        """Return what encodes or decodes the tensors of one stream; see `TensorwiseEstimator.fresh`."""
        return self

    @abstractmethod
    def encode(self, symbols: Symbols) -> bytes:
        """Return a stream that gives back integers of any NumPy integer dtype and any shape."""

    @abstractmethod
    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers of a stream; shape and dtype are those of what was encoded.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return the stream cut into named parts; joined, they are what `encode` returns."""
        return [Part("payload", self.encode(symbols))]

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the stream of the tensor's words, signed where the tensor is; long tensors are coded in chunks."""
        words = words_of(handle.read()).view(symbol_dtype(handle.dtype))
        return EncodedTensor(self.encode_words(words, word_shape(handle.dtype, handle.shape)))

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor, bit for bit."""
        words = self.decode_words(data, word_shape(dtype, shape), symbol_dtype(dtype))
        return tensor_from_words(words.view(word_dtype(dtype)), dtype, shape)

    def encode_words(self, words: Symbols, shape: Shape) -> list[Part]:
        """Return the parts of flat integers, chunk by chunk; every chunk but the last is preceded by its length."""
        chunks = [self.encode_parts(words[start:stop].reshape(piece)) for start, stop, piece in _chunks(shape)]
        lengths = [sum(len(part.data) for part in chunk) for chunk in chunks[:-1]]
        structure = [Part(STRUCTURE, join_lengths(lengths))] if lengths else []
        return [*structure, *(part for chunk in chunks for part in chunk)]

    def decode_words(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers of `encode_words` in the given shape."""
        if math.prod(shape) <= CHUNK_WORDS:
            return self.decode(data, shape, dtype)
        pieces = split_lengths(data, _chunk_count(shape))
        decoded = [
            self.decode(piece, chunk, dtype) for piece, (_, _, chunk) in zip(pieces, _chunks(shape), strict=True)
        ]
        return np.concatenate([words.reshape(-1) for words in decoded]).reshape(shape)


class CodeLength(TensorwiseEstimator):
    """A length in bits of integers for which no stream is written: ``ideal`` or ``proxy``."""

    @abstractmethod
    def length(self, symbols: Symbols) -> float:
        """Return the length of integers in bits."""

    def tensor_length(self, handle: TensorHandle, shared: bytes) -> TensorLength:
        """Return the length of the tensor's words."""
        words = words_of(handle.read()).view(symbol_dtype(handle.dtype))
        return TensorLength({"payload": self.length(words.reshape(word_shape(handle.dtype, handle.shape)))})


class Transform(ABC):
    """A lossless stage: integers to side information and streams of other integers, and back."""

    name: ClassVar[str]

    @abstractmethod
    def split(self, symbols: Symbols) -> tuple[bytes, list[Symbols]]:
        """Return side information and the streams that the next stage codes."""

    def payload_names(self, streams: int) -> list[str]:
        """Return the name that the payload of each of so many streams is counted under."""
        return ["payload"] * streams

    @abstractmethod
    def layout(self, side: bytes, shape: Shape, dtype: np.dtype[Any]) -> list[Layout]:
        """Return shape and dtype of each stream that `split` gave for symbols of this shape and dtype.

        Raises
        ------
        StreamError
            The side information is corrupted.
        """

    @abstractmethod
    def join(self, side: bytes, streams: list[Symbols], shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the symbols that `split` took apart.

        Raises
        ------
        StreamError
            Side information and streams don't belong together.
        """


@dataclass(frozen=True)
class Quantised:
    """What a quantiser makes of a tensor.

    Attributes
    ----------
    codes
        Integers for the coder, in any shape.
    side
        What the decoder needs besides (scales, flags), as bytes.
    """

    codes: Symbols
    side: bytes = b""


class Quantiser(ABC):
    """A lossy stage: the values of a floating-point tensor to integers and side information.

    Integer and boolean tensors never reach a quantiser: they are coded losslessly.
    """

    name: ClassVar[str]

    @property
    def lossless(self) -> bool:
        """Whether nothing may be lost.

        Then values needn't be finite, and tensors that don't come back bit for bit (a half-precision NaN has more bits
        than its conversion keeps) are coded by the coder alone.
        """
        return False

    def fit(self, tensors: Iterable[TensorHandle]) -> bytes:
        """Return side information that all tensors share, learned from the tensors to be quantised; none by default."""
        return b""

    @abstractmethod
    def quantise(self, values: NDArray[np.floating[Any]], shared: bytes) -> Quantised:
        """Return integers and side information of float32 or float64 values, finite unless `lossless`.

        Raises
        ------
        WeightsError
            The values can't be quantised.
        """

    @abstractmethod
    def layout(self, side: bytes, shape: Shape, dtype: np.dtype[Any], shared: bytes) -> Layout:
        """Return shape and dtype of the codes that values of this shape and dtype were turned into.

        Raises
        ------
        StreamError
            The side information is corrupted.
        """

    @abstractmethod
    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the values that the codes stand for, in the given shape and dtype.

        Raises
        ------
        StreamError
            Codes and side information don't belong together.
        """


def for_each_tensor(
    measure: Callable[[TensorHandle], Measured], weights: Weights, jobs: int, progress: Progress | None
) -> list[Measured]:
    """Return `measure` of every tensor, in order, in parallel threads where ``jobs`` isn't 1."""
    handles = list(weights.values())
    measured = []
    for handle, tensor in zip(handles, in_order(measure, handles, jobs), strict=True):
        measured.append(tensor)
        if progress is not None:
            progress(handle)
    return measured


def assemble(
    estimator: Estimator,
    weights: Weights,
    tensors: list[TensorDescription],
    parts: dict[str, float],
    start: float,
    unit: Unit = "bits",
    value: float | None = None,
) -> Description:
    """Return the description of the whole from its tensors' and its own parts.

    Parameters
    ----------
    parts
        What belongs to no single tensor; the tensors' parts are added.
    start
        `time.perf_counter` at the beginning of the measurement.
    value
        For proxies that aren't a sum over tensors; None sums the parts.
    """
    total = sum_parts([*parts.items(), *(part for tensor in tensors for part in tensor.parts.items())])
    if value is None:
        value = math.fsum(total.values())
    error = sum(tensor.squared_error for tensor in tensors)
    proxy = estimator.kind == "proxy"
    elements = weights.elements
    return Description(
        estimator=estimator.spec,
        kind=estimator.kind,
        unit=unit,
        value=value,
        parts=total,
        tensors=tuple(tensors),
        weights=elements,
        raw_bits=8 * weights.nbytes,
        lossless=None if proxy else all(tensor.exact for tensor in tensors),
        distortion=None if proxy else error / max(elements, 1),
        seconds=time.perf_counter() - start,
        version=VERSION,
        skipped=weights.skipped,
    )


def sum_parts(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the sum of lengths for each part's name."""
    total: dict[str, float] = {}
    for name, bits in parts:
        total[name] = total.get(name, 0.0) + bits
    return total


def _chunk_rows(shape: Shape) -> tuple[int, int]:
    """Return the number of words that are never cut, and how many times that a chunk holds: rows where they fit."""
    row = math.prod(shape[1:])
    return (row, CHUNK_WORDS // row) if row <= CHUNK_WORDS else (1, CHUNK_WORDS)


def _chunk_count(shape: Shape) -> int:
    unit, units = _chunk_rows(shape)
    return -(-math.prod(shape) // (unit * units))


def _chunks(shape: Shape) -> Iterator[tuple[int, int, Shape]]:
    """Yield begin, end and shape of the chunks of words in a shape."""
    size = math.prod(shape)
    if size <= CHUNK_WORDS:
        yield 0, size, shape
        return
    unit, units = _chunk_rows(shape)
    rest = shape[1:] if unit > 1 else ()
    for start in range(0, size, unit * units):
        stop = min(start + unit * units, size)
        yield start, stop, ((stop - start) // unit, *rest)


def symbol_dtype(dtype: torch.dtype) -> np.dtype[np.integer[Any]]:
    """Return the NumPy dtype in which coders see a tensor's words: signed for signed integers, else unsigned."""
    words = word_dtype(dtype)
    signed = dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
    return np.dtype(f"i{words.itemsize}") if signed else words


def word_shape(dtype: torch.dtype, shape: Shape) -> Shape:
    """Return the shape in which coders see a tensor's words: with a last axis of length 2 for complex numbers."""
    return shape if words_an_element(dtype) == 1 else (*shape, words_an_element(dtype))
