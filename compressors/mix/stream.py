"""The coder of one stream of `mix` or `lin`: integers, few-valued floats as integers, other floats by their fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.description import STRUCTURE
from kcomplex.estimators.estimator import Coder, EncodedTensor, Part, Shape, Symbols, symbol_dtype, word_shape
from kcomplex.estimators.given import ordered_words
from kcomplex.estimators.structure import Reader, varint
from kcomplex.weights import TensorHandle, tensor_from_words, values_of, word_dtype, words_of

from ..transforms.palette import Palette
from .differences import (
    DifferenceMemory,
    DifferenceMix,
    GivenNumbers,
    new_difference_memory,
)
from .floats import FORMATS, FloatFormat, FloatMix, new_float_memory
from .integers import LARGEST, IntegerMix, new_integer_memory
from .line import ordinary
from .matrix import Memory

# What the first byte of a tensor given another says.
_ALONE, _AS_NUMBERS, _AS_PALETTE = 0, 1, 2
# Squared correlations with what is given below and above which a tensor is coded alone, or given it, without a trial.
_UNLIKE, _ALIKE = 0.005, 0.15
# Floats with so few values, each often enough, are a table and integers.
_MOST_VALUES = 4096
_FEWEST_USES = 4


@dataclass(frozen=True)
class LearningMix(Coder):
    """The coder of one stream; see `kcomplex.compressors.mix.mix.Mix`."""

    linear: bool
    memory: Memory = field(default_factory=new_integer_memory)
    name: ClassVar[str] = "learning_mix"

    @property
    def sequential(self) -> bool:
        """True: tensors learn from those before them."""
        return True

    @cached_property
    def floats(self) -> Memory:
        """What tensors of floats leave to each other."""
        return new_float_memory()

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the stream of a tensor: integers; or a table and integers, or fields, of floats."""
        if handle.dtype not in FORMATS or not handle.elements:
            return super().encode_tensor(handle, shared)
        words = words_of(handle.read())
        side, (symbols,) = Palette().split(words)
        if symbols is words or not _is_few_valued(symbols, words.itemsize):
            coder = FloatMix(FORMATS[handle.dtype], self.linear, self.floats)
            return EncodedTensor([Part(STRUCTURE, b"\0"), *coder.encode_words(words, handle.shape)])
        parts = [Part(STRUCTURE, varint(len(side))), Part("tables", side)]
        return EncodedTensor(parts + self.encode_words(symbols, handle.shape))

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor, bit for bit."""
        if dtype not in FORMATS or not math.prod(shape):
            return super().decode_tensor(data, dtype, shape, shared)
        reader, word = Reader(data), word_dtype(dtype)
        length = reader.varint()
        if not length:
            coder = FloatMix(FORMATS[dtype], self.linear, self.floats)
            return tensor_from_words(coder.decode_words(reader.rest(), shape, word), dtype, shape)
        side = reader.take(length)
        ((_, indices),) = Palette().layout(side, shape, word)
        symbols = self.decode_words(reader.rest(), shape, indices)
        return tensor_from_words(Palette().join(side, [symbols], shape, word), dtype, shape)

    @cached_property
    def differences(self) -> DifferenceMemory:
        """What tensors given others leave to each other."""
        return new_difference_memory()

    def takes_given(self) -> bool:
        """Return True; see `RelativeCode`."""
        return True

    def encode_given(self, handle: TensorHandle, known: torch.Tensor, shared: bytes) -> EncodedTensor:
        """Return the stream of a tensor given another, or alone; see `RelativeCode.encode_given`."""
        tensor = handle.read()
        return EncodedTensor(
            self._shorter(
                _likeness(tensor, known),
                lambda coder: coder.encode_tensor(handle, shared).parts,
                lambda coder: coder._differences(tensor, known),
            )
        )

    def decode_given(
        self, data: bytes, dtype: torch.dtype, shape: Shape, known: torch.Tensor, shared: bytes
    ) -> torch.Tensor:
        """Return the tensor; see `RelativeCode.decode_given`."""
        reader, word = Reader(data), word_dtype(dtype)
        form = reader.take(1)[0]
        if form == _ALONE:
            return self.decode_tensor(reader.rest(), dtype, shape, shared)
        if form == _AS_PALETTE and dtype in FORMATS:
            side = reader.take(reader.varint())
            palette = _SortedPalette.of(side, shape, word)
            given = GivenNumbers(values_of(known).reshape(-1), palette.numbers(dtype))
            indices = self._difference(None, given).decode_words(reader.rest(), shape, palette.indices)
            if indices.size and int(indices.max()) >= palette.words.size:
                raise StreamError(f"mix: the index {indices.max()} in a table of {palette.words.size} words")
            return tensor_from_words(palette.words[indices], dtype, shape)
        if form != _AS_NUMBERS:
            raise StreamError(f"mix: a tensor given another can't begin with {form}")
        coder = self._difference(FORMATS.get(dtype), _given_numbers(dtype, known))
        symbol, whole = symbol_dtype(dtype), word_shape(dtype, shape)
        words = coder.decode_words(reader.rest(), whole, word if dtype in FORMATS else symbol).view(word)
        return tensor_from_words(words if dtype in FORMATS else ordered_words(words, dtype), dtype, shape)

    def encode_words_given(self, words: Symbols, shape: Shape, known: torch.Tensor) -> list[Part]:
        """Return the parts of integers given numbers, or alone; see `RelativeCoder.encode_words_given`."""
        given = values_of(known).reshape(-1)
        return self._shorter(
            0.0 if known.is_complex() else _correlation(words.reshape(-1), given),
            lambda coder: coder.encode_words(words, shape),
            lambda coder: coder._integer_differences(words, shape, GivenNumbers(given)),
        )

    def decode_words_given(self, data: bytes, shape: Shape, dtype: np.dtype[Any], known: torch.Tensor) -> Symbols:
        """Return the integers; see `RelativeCoder.decode_words_given`."""
        reader = Reader(data)
        form = reader.take(1)[0]
        if form == _ALONE:
            return self.decode_words(reader.rest(), shape, dtype)
        if form != _AS_NUMBERS:
            raise StreamError(f"mix: integers given numbers can't begin with {form}")
        return self._difference(None, GivenNumbers(values_of(known).reshape(-1))).decode_words(
            reader.rest(), shape, dtype
        )

    def _difference(self, layout: FloatFormat | None, given: GivenNumbers) -> DifferenceMix:
        return DifferenceMix(layout, self.linear, self.differences, given)

    def _shorter(
        self,
        likeness: float,
        alone: Callable[[LearningMix], list[Part]],
        differences: Callable[[LearningMix], list[Part] | None],
    ) -> list[Part]:
        """Return the shorter of two encodings, or the one that is so as a matter of course; learn from that alone."""
        if likeness >= _ALIKE:
            only = differences(self)
            if only is not None:
                return only
        if not _UNLIKE < likeness < _ALIKE:
            return [Part(STRUCTURE, bytes([_ALONE])), *alone(self)]
        one, other = self._copy(), self._copy()
        trials = [([Part(STRUCTURE, bytes([_ALONE])), *alone(one)], one)]
        parts = differences(other)
        if parts is not None:
            trials.append((parts, other))
        parts, trial = min(trials, key=lambda pair: sum(len(part.data) for part in pair[0]))
        for own, learned in zip(self._memories(), trial._memories(), strict=True):
            own.become(learned)
        return parts

    def _copy(self) -> LearningMix:
        copy = LearningMix(self.linear)
        for own, learned in zip(copy._memories(), self._memories(), strict=True):
            own.become(learned.copy())
        return copy

    def _memories(self) -> tuple[Memory, Memory, Memory]:
        return self.memory, self.floats, self.differences

    def _differences(self, tensor: torch.Tensor, known: torch.Tensor) -> list[Part] | None:
        """Return the parts of a tensor's differences from another; None where there are no such differences."""
        dtype, shape, words = tensor.dtype, tuple(tensor.shape), words_of(tensor)
        if known.is_complex() != tensor.is_complex():
            return None
        if dtype not in FORMATS:
            if not _is_integer(dtype) and known.dtype != dtype:
                return None
            symbols = ordered_words(words, dtype).view(symbol_dtype(dtype))
            return self._integer_differences(symbols, word_shape(dtype, shape), _given_numbers(dtype, known))
        if dtype is torch.float64 and ((words << np.uint64(1)) >> np.uint64(63)).any():
            return None
        side, (indices,) = Palette().split(words)
        if indices is not words and _is_few_valued(indices, words.itemsize):
            palette = _SortedPalette.of(side, shape, words.dtype)
            numbers = palette.numbers(dtype)
            if np.isfinite(numbers).all():
                coder = self._difference(None, GivenNumbers(values_of(known).reshape(-1), numbers))
                structure = [Part(STRUCTURE, bytes([_AS_PALETTE]) + varint(len(side))), Part("tables", side)]
                return [*structure, *coder.encode_words(palette.ranks[indices], shape)]
        coder = self._difference(FORMATS[dtype], _given_numbers(dtype, known))
        return [Part(STRUCTURE, bytes([_AS_NUMBERS])), *coder.encode_words(words, shape)]

    def _integer_differences(self, symbols: Symbols, shape: Shape, given: GivenNumbers) -> list[Part] | None:
        if not symbols.size or max(abs(int(symbols.max())), abs(int(symbols.min()))) >= LARGEST:
            return None
        return [Part(STRUCTURE, bytes([_AS_NUMBERS])), *self._difference(None, given).encode_words(symbols, shape)]

    @property
    def integers(self) -> IntegerMix:
        """The coder of integers."""
        return IntegerMix(self.linear, self.memory)

    def encode(self, symbols: Symbols) -> bytes:
        """Return the stream; see `Coder.encode`."""
        return self.integers.encode(symbols)

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        return self.integers.encode_parts(symbols)

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`."""
        return self.integers.decode(data, shape, dtype)


class _SortedPalette(NamedTuple):
    """A palette's words in the order of their numbers; their indices' dtype, and what each former index becomes."""

    words: Symbols
    indices: np.dtype[Any]
    ranks: Symbols

    @classmethod
    def of(cls, side: bytes, shape: Shape, dtype: np.dtype[Any]) -> _SortedPalette:
        words = Palette().table(side, shape, dtype)
        if words is None:
            raise StreamError("mix: the stream lacks the table of its indices")
        ((_, indices),) = Palette().layout(side, shape, dtype)
        signed = ordered_words(words, torch.float32).view(f"i{dtype.itemsize}")
        order = np.argsort(signed, kind="stable")
        ranks = np.empty(words.size, indices)
        ranks[order] = np.arange(words.size)
        return cls(words[order], indices, ranks)

    def numbers(self, dtype: torch.dtype) -> NDArray[np.float64]:
        return values_of(tensor_from_words(self.words, dtype, (self.words.size,))).astype(np.float64)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _given_numbers(dtype: torch.dtype, known: torch.Tensor) -> GivenNumbers:
    """Return what is given for a tensor of a dtype: numbers, or places in order for those that have none here."""
    if dtype in FORMATS or _is_integer(dtype):
        return GivenNumbers(values_of(known).reshape(-1))
    return GivenNumbers(ordered_words(words_of(known), dtype).astype(np.float64))


def _likeness(tensor: torch.Tensor, known: torch.Tensor) -> float:
    if tensor.is_complex() or known.is_complex():
        return _ALIKE if tensor.dtype == known.dtype else 0.0
    return _correlation(values_of(tensor).reshape(-1), values_of(known).reshape(-1))


def _correlation(one: NDArray[np.number[Any]], other: NDArray[np.number[Any]]) -> float:
    """Return the square of the correlation of two vectors around zero, but for outliers."""
    # Signalling NaN warns when it is widened.
    with np.errstate(invalid="ignore"):
        first, second = one.astype(np.float64), other.astype(np.float64)
    used = ordinary(first) & ordinary(second)
    first, second = first[used], second[used]
    powers = float(first @ first) * float(second @ second)
    return float(first @ second) ** 2 / powers if math.isfinite(powers) and powers > 0 else 0.0


def _is_few_valued(indices: Symbols, word_bytes: int) -> bool:
    """Return whether floats are better coded by their indices: few values, all but the commonest used often enough."""
    counts = np.bincount(indices.reshape(-1))
    used = indices.size - int(counts.max())
    return counts.size <= min(_MOST_VALUES, 1 << 4 * word_bytes, 1 + used // _FEWEST_USES)
