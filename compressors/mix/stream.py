"""One stream of `mix` or `lin`: integers, few-valued floats as integers, other floats by their fields, differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.code import Memory, decode_pieces, encode_pieces
from kcomplex.estimators.coder import Part, size_of
from kcomplex.estimators.description import STRUCTURE
from kcomplex.estimators.differences import ordered_words
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape, Symbols, symbol_dtype, symbol_shape, symbols_of
from kcomplex.weights import tensor_from_words, values_of, word_dtype, words_of

from ..transforms.palette import Palette, index_dtype
from .differences import DifferenceMemory, DifferenceMix, GivenNumbers, have_places, new_difference_memory
from .floats import FORMATS, FloatFormat, FloatMix, new_float_memory
from .integers import LARGEST, IntegerMix, new_integer_memory
from .line import ordinary
from .matrix import Memory as MatrixMemory

# What the first byte of a tensor given another says.
_ALONE, _AS_NUMBERS, _AS_PALETTE = 0, 1, 2
# Squared correlations with what is given below and above which a tensor is coded alone, or given it, without a trial.
_UNLIKE, _ALIKE = 0.005, 0.15
# Floats with so few values, each often enough, are a table and integers.
_MOST_VALUES = 4096
_FEWEST_USES = 4


class MixMemory(Memory):
    """What the tensors of a stream leave to those after them: integers, floats, and differences from given ones."""

    @cached_property
    def integers(self) -> MatrixMemory:
        """What integers leave to each other."""
        return new_integer_memory()

    @cached_property
    def floats(self) -> MatrixMemory:
        """What floats leave to each other."""
        return new_float_memory()

    @cached_property
    def differences(self) -> DifferenceMemory:
        """What differences leave to each other."""
        return new_difference_memory()

    def copy(self) -> MixMemory:
        """Return a memory that knows the same and learns for itself."""
        copy = MixMemory(self.shared)
        copy.__dict__.update({name: part.copy() for name, part in self._parts().items()})
        return copy

    def become(self, other: MixMemory) -> None:
        """Take over what another memory, not used any more, has learned."""
        self.__dict__.update(other._parts())

    def _parts(self) -> dict[str, MatrixMemory]:
        """Return the parts that were used so far."""
        return {name: self.__dict__[name] for name in ("integers", "floats", "differences") if name in self.__dict__}


@dataclass
class MixStream:
    """Codes tensors and integers one after another; the memory learns from each."""

    linear: bool
    memory: MixMemory

    def encode(self, tensor: torch.Tensor) -> list[Part]:
        """Return the stream of a tensor: integers; or a table and integers, or fields, of floats."""
        if tensor.dtype not in FORMATS or not tensor.numel():
            return self.encode_symbols(symbols_of(tensor))
        words = symbols_of(tensor)
        side, (symbols,) = Palette().split(words)
        if symbols is words or not _is_few_valued(symbols, words.itemsize):
            coder = FloatMix(FORMATS[tensor.dtype], self.linear, self.memory.floats)
            return [Part(STRUCTURE, b"\0"), *encode_pieces(words, lambda piece, start: coder.encode_parts(piece))]
        return [Part(STRUCTURE, varint(len(side))), Part("tables", side), *self.encode_symbols(symbols)]

    def decode(self, data: bytes, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
        """Return the tensor, bit for bit."""
        word = word_dtype(dtype)
        if dtype not in FORMATS or not math.prod(shape):
            symbols = self.decode_symbols(data, symbol_shape(dtype, shape), symbol_dtype(dtype))
            return tensor_from_words(symbols.view(word), dtype, shape)
        reader = Reader(data)
        length = reader.varint()
        if not length:
            coder = FloatMix(FORMATS[dtype], self.linear, self.memory.floats)
            words = decode_pieces(
                reader.rest(), shape, word, lambda piece, size, start: coder.decode(piece, size, word)
            )
            return tensor_from_words(words, dtype, shape)
        side = reader.take(length)
        table = _table(side, shape, word)
        return tensor_from_words(self._looked_up(table, reader.rest(), shape), dtype, shape)

    def encode_symbols(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload of integers."""
        coder = IntegerMix(self.linear, self.memory.integers)
        return encode_pieces(symbols, lambda piece, start: coder.encode_parts(piece))

    def decode_symbols(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers of `encode_symbols`."""
        coder = IntegerMix(self.linear, self.memory.integers)
        return decode_pieces(data, shape, dtype, lambda piece, size, start: coder.decode(piece, size, dtype))

    def encode_given(self, tensor: torch.Tensor, known: torch.Tensor) -> list[Part]:
        """Return the stream of a tensor given another one of its shape, or alone."""
        return self._shorter(
            _likeness(tensor, known),
            lambda stream: stream.encode(tensor),
            lambda stream: stream._differences(tensor, known),
        )

    def decode_given(self, data: bytes, dtype: torch.dtype, shape: Shape, known: torch.Tensor) -> torch.Tensor:
        """Return the tensor of `encode_given`."""
        reader, word = Reader(data), word_dtype(dtype)
        form = reader.take(1)[0]
        if form == _ALONE:
            return self.decode(reader.rest(), dtype, shape)
        if not _are_comparable(dtype, known):
            raise StreamError(f"mix: {dtype} has no differences from {known.dtype}")
        if form == _AS_PALETTE and dtype in FORMATS:
            side = reader.take(reader.varint())
            palette = _SortedPalette.of(_table(side, shape, word))
            given = GivenNumbers(values_of(known).reshape(-1), palette.numbers(dtype))
            indices = self._decode_differences(None, given, reader.rest(), shape, palette.ranks.dtype)
            if indices.size and int(indices.max()) >= palette.words.size:
                raise StreamError(f"mix: the index {indices.max()} in a table of {palette.words.size} words")
            return tensor_from_words(palette.words[indices], dtype, shape)
        if form != _AS_NUMBERS:
            raise StreamError(f"mix: a tensor given another can't begin with {form}")
        given, whole = _given_numbers(dtype, known), symbol_shape(dtype, shape)
        if dtype in FORMATS:
            return tensor_from_words(
                self._decode_differences(FORMATS[dtype], given, reader.rest(), whole, word), dtype, shape
            )
        symbols = self._decode_differences(None, given, reader.rest(), whole, symbol_dtype(dtype))
        return tensor_from_words(ordered_words(symbols.view(word), dtype), dtype, shape)

    def encode_symbols_given(self, symbols: Symbols, known: torch.Tensor) -> list[Part]:
        """Return the parts of integers given numbers that they may have been made from, or alone."""
        given = values_of(known).reshape(-1)
        return self._shorter(
            0.0 if known.is_complex() else _correlation(symbols.reshape(-1), given),
            lambda stream: stream.encode_symbols(symbols),
            lambda stream: stream._integer_differences(symbols, GivenNumbers(given)),
        )

    def decode_symbols_given(self, data: bytes, shape: Shape, dtype: np.dtype[Any], known: torch.Tensor) -> Symbols:
        """Return the integers of `encode_symbols_given`."""
        reader = Reader(data)
        form = reader.take(1)[0]
        if form == _ALONE:
            return self.decode_symbols(reader.rest(), shape, dtype)
        if form != _AS_NUMBERS or known.is_complex():
            raise StreamError(f"mix: integers given numbers can't begin with {form}")
        return self._decode_differences(None, GivenNumbers(values_of(known).reshape(-1)), reader.rest(), shape, dtype)

    def _shorter(
        self,
        likeness: float,
        alone: Callable[[MixStream], list[Part]],
        differences: Callable[[MixStream], list[Part] | None],
    ) -> list[Part]:
        """Return the shorter of two encodings, or the one that is so as a matter of course; learn from that alone."""
        if likeness >= _ALIKE:
            only = differences(self)
            if only is not None:
                return only
        if not _UNLIKE < likeness < _ALIKE:
            return [Part(STRUCTURE, bytes([_ALONE])), *alone(self)]
        one, other = (MixStream(self.linear, self.memory.copy()) for _ in range(2))
        trials = [([Part(STRUCTURE, bytes([_ALONE])), *alone(one)], one)]
        parts = differences(other)
        if parts is not None:
            trials.append((parts, other))
        parts, trial = min(trials, key=lambda pair: size_of(pair[0]))
        self.memory.become(trial.memory)
        return parts

    def _differences(self, tensor: torch.Tensor, known: torch.Tensor) -> list[Part] | None:
        """Return the parts of a tensor's differences from another; None where there are no such differences."""
        dtype, shape, words = tensor.dtype, tuple(tensor.shape), words_of(tensor)
        if not _are_comparable(dtype, known):
            return None
        if dtype not in FORMATS:
            symbols = ordered_words(words, dtype).view(symbol_dtype(dtype)).reshape(symbol_shape(dtype, shape))
            return self._integer_differences(symbols, _given_numbers(dtype, known))
        if not have_places(words, FORMATS[dtype]):
            return None
        shaped = words.reshape(shape)
        side, (indices,) = Palette().split(shaped)
        if indices is not shaped and _is_few_valued(indices, words.itemsize):
            palette = _SortedPalette.of(_table(side, shape, words.dtype))
            numbers = palette.numbers(dtype)
            if np.isfinite(numbers).all():
                given = GivenNumbers(values_of(known).reshape(-1), numbers)
                structure = [Part(STRUCTURE, bytes([_AS_PALETTE]) + varint(len(side))), Part("tables", side)]
                return [*structure, *self._encode_differences(None, given, palette.ranks[indices])]
        given = _given_numbers(dtype, known)
        parts = self._encode_differences(FORMATS[dtype], given, shaped)
        return [Part(STRUCTURE, bytes([_AS_NUMBERS])), *parts]

    def _integer_differences(self, symbols: Symbols, given: GivenNumbers) -> list[Part] | None:
        if not symbols.size or max(abs(int(symbols.max())), abs(int(symbols.min()))) >= LARGEST:
            return None
        return [Part(STRUCTURE, bytes([_AS_NUMBERS])), *self._encode_differences(None, given, symbols)]

    def _encode_differences(self, layout: FloatFormat | None, given: GivenNumbers, symbols: Symbols) -> list[Part]:
        coder = DifferenceMix(layout, self.linear, self.memory.differences, given)
        return encode_pieces(symbols, lambda piece, start: coder.encode_parts(piece))

    def _decode_differences(
        self, layout: FloatFormat | None, given: GivenNumbers, data: bytes, shape: Shape, dtype: np.dtype[Any]
    ) -> Symbols:
        if not math.prod(shape):
            raise StreamError("mix: a tensor without weights has no differences")
        coder = DifferenceMix(layout, self.linear, self.memory.differences, given)
        return decode_pieces(data, shape, dtype, lambda piece, size, start: coder.decode(piece, size, dtype))

    def _looked_up(self, table: Symbols, data: bytes, shape: Shape) -> Symbols:
        """Return the words of a table whose positions are coded as integers."""
        indices = self.decode_symbols(data, shape, index_dtype(table.size))
        if indices.size and int(indices.max()) >= table.size:
            raise StreamError(f"mix: the index {indices.max()} in a table of {table.size} words")
        words: Symbols = table[indices]
        return words


def _table(side: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
    """Return the words of a palette.

    Raises
    ------
    StreamError
        It has none.
    """
    words = Palette().table(side, shape, dtype)
    if words is None:
        raise StreamError("mix: the stream lacks the table of its indices")
    return words


class _SortedPalette(NamedTuple):
    """A palette's words in the order of their numbers, and what each former index becomes."""

    words: Symbols
    ranks: Symbols

    @classmethod
    def of(cls, words: Symbols) -> _SortedPalette:
        signed = ordered_words(words, torch.float32).view(f"i{words.itemsize}")
        order = np.argsort(signed, kind="stable")
        ranks = np.empty(words.size, index_dtype(words.size))
        ranks[order] = np.arange(words.size)
        return cls(words[order], ranks)

    def numbers(self, dtype: torch.dtype) -> NDArray[np.float64]:
        # Signalling NaN warns when it is widened.
        with np.errstate(invalid="ignore"):
            return values_of(tensor_from_words(self.words, dtype, (self.words.size,))).astype(np.float64)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _are_comparable(dtype: torch.dtype, known: torch.Tensor) -> bool:
    """Return whether a tensor of a dtype may be told by its differences from another one."""
    alike = dtype in FORMATS or _is_integer(dtype) or known.dtype == dtype
    return alike and known.is_complex() == dtype.is_complex


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
