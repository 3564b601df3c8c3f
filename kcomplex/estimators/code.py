"""Codes: estimators with a decoder, which learn along a stream in a memory of its own."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Coder, Part, size_of
from kcomplex.estimators.description import STRUCTURE, Description, GivenMatch, Kind
from kcomplex.estimators.differences import from_word_differences, word_differences
from kcomplex.estimators.duplicates import Distinct, distinct_weights
from kcomplex.estimators.estimator import Estimator, Progress, TensorLength, describe_lengths, sum_parts
from kcomplex.estimators.pieces import handles_of, piece_count, piece_limit
from kcomplex.estimators.spec import full_spec_of, spec_of
from kcomplex.estimators.structure import TensorEntry, encode_structure, entries_of, join_lengths, split_lengths
from kcomplex.estimators.symbols import Shape, Symbols, chunk_count, chunks, symbol_dtype, symbol_shape, symbols_of
from kcomplex.machine.closing import Closing
from kcomplex.machine.parallel import in_order, thread_count
from kcomplex.weights import TensorHandle, Weights, dtype_name, tensor_from_words, word_dtype

Result = TypeVar("Result")
Taken = TypeVar("Taken")

# What the first byte of a tensor's stream says, where a coder is given a tensor that it has no use of its own for.
_PLAIN, _DIFFERENCE = 0, 1


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
    choice
        What the decoder is told besides, 0 to 255: kept in the structure, where what is alike costs next to nothing.
    """

    parts: list[Part]
    squared_error: float = 0.0
    exact: bool = True
    choice: int = 0

    @property
    def size(self) -> int:
        """Bytes of the stream."""
        return size_of(self.parts)

    def to_bytes(self) -> bytes:
        """Return the stream."""
        return b"".join(part.data for part in self.parts)


class Outcome(NamedTuple):
    """What came of encoding weights with a code.

    Attributes
    ----------
    bits, structure_bits
        Of the whole stream, and of its structure.
    choices
        What the code chose, for every tensor (or piece) whose stream isn't empty.
    """

    bits: float
    structure_bits: float
    choices: tuple[int, ...]


class Memory(Closing):
    """What a code has learned so far along one stream. This one learns nothing.

    Attributes
    ----------
    shared
        Side information that all tensors of the stream share.
    given
        Which tensors other weights are given for, where an encoder has some.
    """

    given: GivenMatch | None = None

    def __init__(self, shared: bytes = b"") -> None:
        self.shared = shared

    def copy(self) -> Memory:
        """Return a memory that knows the same and learns for itself."""
        return self

    def close(self) -> None:
        """Close what was opened for the stream."""


class Code(Estimator):
    """An estimator with a decoder. Its bits are eight times the bytes of the stream (see `measuring.stream`)."""

    @property
    def kind(self) -> Kind:
        """``code``."""
        return "code"

    @property
    def sequential(self) -> bool:
        """Whether a tensor's stream depends on the tensors before it, and is decoded after theirs."""
        return False

    def divides(self, shared: bytes) -> bool:
        """Return whether pieces of a long tensor are coded as tensors of their own."""
        return False

    @property
    def takes_known(self) -> bool:
        """Whether `encode` has a use for a tensor that is given."""
        return False

    def prepare(self, weights: Weights) -> bytes:
        """Return the side information that all tensors share (one codebook for the whole network); none by default."""
        return b""

    def memory(self, shared: bytes) -> Memory:
        """Return the memory of a new stream; ``shared`` is what `prepare` returned."""
        return Memory(shared)

    def begin(self, weights: Weights, distinct: Distinct) -> Memory:
        """Return the memory of a new stream of weights, with and without those that are the same as an earlier one."""
        return self.memory(self.prepare(distinct.weights))

    def stream_spec(self, memory: Memory) -> str:
        """Return what a stream names its decoder by: every option, whatever the defaults of its version."""
        return self.full_spec

    def rivals(self, outcome: Outcome) -> tuple[Code, ...]:
        """Return codes with the same decoder that may be shorter on the whole, after what came of this one.

        The shortest stream of them all is taken. None by default.
        """
        return ()

    def for_pieces(self, handle: TensorHandle) -> Code:
        """Return the code of a long tensor's pieces, which may depend on the whole of it; by default this one."""
        return self

    @abstractmethod
    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return one tensor's stream.

        Parameters
        ----------
        memory
            Learns from the tensor.
        known
            A tensor of the same shape, and any dtype, that the decoder will be given too; None for none.
        """

    @abstractmethod
    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tensor of a stream that `encode` made with an equal memory and the same known tensor.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """

    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description of the shortest stream; see `Estimator.describe`. Codes pay for the structure."""
        start = time.perf_counter()
        distinct = distinct_weights(weights, self.quantises)

        def described(code: Code) -> tuple[Description, Outcome]:
            # Whoever watches sees each tensor once.
            return code._described(weights, distinct, jobs, progress if code is self else None)

        return replace(shortest(self, described), seconds=time.perf_counter() - start)

    def _described(
        self, weights: Weights, distinct: Distinct, jobs: int, progress: Progress | None
    ) -> tuple[Description, Outcome]:
        lengths: dict[str, TensorLength] = {}
        with Encoding(self, weights, distinct) as encoding:
            for handle, length in encoding.pieces(_counted, jobs):
                before = lengths.get(handle.name)
                lengths[handle.name] = length if before is None else before + length
                if progress is not None:
                    progress(handle)
        parts = {STRUCTURE: 8.0 * len(encoding.structure()), "tables": 8.0 * len(encoding.shared)}
        description = describe_lengths(self, weights, distinct.originals, lengths, parts)
        description = replace(description, given=encoding.given)
        return description, encoding.outcome(description.value, description.parts[STRUCTURE])


def _counted(encoded: EncodedTensor) -> TensorLength:
    parts = sum_parts(item for part in encoded.parts for item in part.bits().items())
    return TensorLength(parts, encoded.squared_error, encoded.exact)


class Encoding(Closing):
    """What a code makes of weights, piece by piece, none of which it keeps.

    Attributes
    ----------
    shared, given
        As of the code's `Memory`.
    limit
        Weights a piece; 0 for whole tensors.
    """

    def __init__(self, code: Code, weights: Weights, distinct: Distinct) -> None:
        self._code, self._weights, self._distinct = code, weights, distinct
        self._memory = code.begin(weights, distinct)
        self.shared, self.given = self._memory.shared, self._memory.given
        self.limit = piece_limit(code.divides(self.shared))
        self._streams: dict[str, list[tuple[int, int]]] = {name: [] for name in distinct.weights}

    def pieces(self, take: Callable[[EncodedTensor], Taken], jobs: int = 1) -> Iterator[tuple[TensorHandle, Taken]]:
        """Yield every piece of the distinct tensors, in order, with what is taken of its stream.

        Parameters
        ----------
        jobs
            Threads; a code that learns from tensor to tensor uses one.
        """

        def encoded(item: tuple[Code, TensorHandle]) -> tuple[TensorHandle, tuple[int, int], Taken]:
            code, piece = item
            made = code.encode(piece, self._memory)
            return piece, (made.size, made.choice), take(made)

        threads = thread_count(jobs)
        for piece, stream, taken in in_order(encoded, self._wanted(), 1 if self._code.sequential else threads):
            self._streams[piece.name].append(stream)
            yield piece, taken

    def _wanted(self) -> Iterator[tuple[Code, TensorHandle]]:
        for handle in self._distinct.weights.values():
            yield from divided(self._code, handle, self.limit)

    @property
    def spec(self) -> str:
        """What the stream names its decoder by, once all is encoded."""
        return self._code.stream_spec(self._memory)

    def entries(self) -> list[TensorEntry]:
        """Return the entries of all tensors, once all is encoded."""
        return entries_of(self._weights, self._distinct.originals, self._streams)

    def structure(self) -> bytes:
        """Return the structure's bytes, once all is encoded."""
        return encode_structure(self.spec, len(self.shared), self.entries())

    def outcome(self, bits: float, structure_bits: float) -> Outcome:
        """Return what came of it, given the bits of the whole stream and of its structure."""
        choices = (choice for told in self._streams.values() for length, choice in told if length)
        return Outcome(bits, structure_bits, tuple(choices))

    def close(self) -> None:
        """Close what the code opened."""
        self._memory.close()


def divided(code: Code, handle: TensorHandle, limit: int) -> Iterator[tuple[Code, TensorHandle]]:
    """Yield each piece of a tensor, with the code that it is coded by."""
    if piece_count(handle.shape, limit) > 1:
        code = code.for_pieces(handle)
    return ((code, piece) for piece in handles_of(handle, limit))


class OtherEncoder(Code):
    """A code that writes streams of another one, in its own way: that one decodes them, and gives them its name."""

    @property
    @abstractmethod
    def decoder(self) -> Code:
        """The other code."""

    @property
    def spec(self) -> str:
        """The decoder's."""
        return self.decoder.spec

    @property
    def full_spec(self) -> str:
        """The decoder's."""
        return self.decoder.full_spec

    @property
    def sequential(self) -> bool:
        """Whether the decoder is."""
        return self.decoder.sequential

    def quantises(self, handle: TensorHandle) -> bool:
        """Return whether the decoder's encoder does."""
        return self.decoder.quantises(handle)

    def divides(self, shared: bytes) -> bool:
        """Return whether the decoder does."""
        return self.decoder.divides(shared)

    @property
    def takes_known(self) -> bool:
        """Whether the decoder does."""
        return self.decoder.takes_known

    def prepare(self, weights: Weights) -> bytes:
        """Return the side information that the decoder makes."""
        return self.decoder.prepare(weights)

    def memory(self, shared: bytes) -> Memory:
        """Return the decoder's memory."""
        return self.decoder.memory(shared)

    def stream_spec(self, memory: Memory) -> str:
        """Return what the decoder's streams say."""
        return self.decoder.stream_spec(memory)

    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what the decoder does."""
        return self.decoder.decode(entry, data, memory, known)


class SymbolCode(Code):
    """A lossless code of integers, and of tensors by their words. It can stand behind transforms and quantisers.

    Given a tensor of the same dtype, the differences of their words are coded where that is shorter, unless the code
    has a use of its own for what is known.
    """

    def divides(self, shared: bytes) -> bool:
        """Return True: every word comes back, whatever stands around it."""
        return True

    @property
    def takes_known(self) -> bool:
        """True: differences of words can always be coded."""
        return True

    @property
    def predicts(self) -> bool:
        """Whether `encode_symbols` has a use for numbers that are known."""
        return False

    @abstractmethod
    def encode_symbols(self, symbols: Symbols, memory: Memory, known: torch.Tensor | None = None) -> list[Part]:
        """Return the parts of integers.

        Parameters
        ----------
        memory
            Learns from them.
        known
            Numbers of the same shape that the integers may have been made from; None for none, or where the code
            doesn't `predict`.
        """

    @abstractmethod
    def decode_symbols(
        self, data: bytes, shape: Shape, dtype: np.dtype[Any], memory: Memory, known: torch.Tensor | None = None
    ) -> Symbols:
        """Return the integers of `encode_symbols` in their shape and dtype.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return the stream of the tensor's words, signed where the tensor is; see `Code.encode`."""
        tensor = handle.read()
        if known is None:
            return EncodedTensor(self.encode_symbols(symbols_of(tensor), memory))
        found = []
        if known.dtype == handle.dtype:
            steps = word_differences(tensor, known).reshape(symbol_shape(handle.dtype, handle.shape))
            found.append([Part(STRUCTURE, bytes([_DIFFERENCE])), *self.encode_symbols(steps, memory)])
        # What learns from tensor to tensor learns from one of both.
        if not (found and self.sequential):
            found.append([Part(STRUCTURE, bytes([_PLAIN])), *self.encode_symbols(symbols_of(tensor), memory)])
        return EncodedTensor(min(found, key=size_of))

    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tensor, bit for bit; see `Code.decode`."""
        shape = symbol_shape(entry.dtype, entry.shape)
        if known is not None:
            form, data = data[:1], data[1:]
            if form == bytes([_DIFFERENCE]) and known.dtype == entry.dtype:
                steps = self.decode_symbols(data, shape, word_dtype(entry.dtype), memory)
                return from_word_differences(steps.reshape(-1), known)
            if form != bytes([_PLAIN]):
                raise StreamError(f"a relative tensor of {dtype_name(entry.dtype)} can't begin with {form.hex()}")
        symbols = self.decode_symbols(data, shape, symbol_dtype(entry.dtype), memory)
        return tensor_from_words(symbols.view(word_dtype(entry.dtype)), entry.dtype, entry.shape)


@dataclass(frozen=True)
class CoderCode(SymbolCode):
    """The code of a coder that codes each array of integers by itself."""

    coder: Coder
    name: ClassVar[str] = "coder"

    @property
    def spec(self) -> str:
        """Specification string of the coder."""
        return spec_of(self.coder)

    @property
    def full_spec(self) -> str:
        """Specification string of the coder with every option."""
        return full_spec_of(self.coder)

    def encode_symbols(self, symbols: Symbols, memory: Memory, known: torch.Tensor | None = None) -> list[Part]:
        """Return the coder's parts; see `SymbolCode.encode_symbols`."""
        return encode_pieces(symbols, lambda piece, start: self.coder.encode_parts(piece))

    def decode_symbols(
        self, data: bytes, shape: Shape, dtype: np.dtype[Any], memory: Memory, known: torch.Tensor | None = None
    ) -> Symbols:
        """Return what the coder decodes; see `SymbolCode.decode_symbols`."""
        return decode_pieces(data, shape, dtype, lambda piece, size, start: self.coder.decode(piece, size, dtype))


def shortest(code: Code, encode: Callable[[Code], tuple[Result, Outcome]]) -> Result:
    """Return the result of a code or of a rival of it, whichever came out shortest."""
    result, outcome = encode(code)
    least = outcome.bits
    for rival in code.rivals(outcome):
        other, told = encode(rival)
        if told.bits < least:
            result, least = other, told.bits
    return result


def encode_pieces(symbols: Symbols, encode: Callable[[Symbols, int], list[Part]]) -> list[Part]:
    """Return the parts of symbols chunk by chunk; every chunk but the last is preceded by its length.

    Parameters
    ----------
    encode
        Returns the parts of a piece, given its position in the flat symbols.
    """
    flat = np.ascontiguousarray(symbols).reshape(-1)
    coded = [encode(flat[start:stop].reshape(shape), start) for start, stop, shape in chunks(symbols.shape)]
    lengths = [size_of(parts) for parts in coded[:-1]]
    structure = [Part(STRUCTURE, join_lengths(lengths))] if lengths else []
    return [*structure, *(part for parts in coded for part in parts)]


def decode_pieces(
    data: bytes, shape: Shape, dtype: np.dtype[Any], decode: Callable[[bytes, Shape, int], Symbols]
) -> Symbols:
    """Return the symbols of `encode_pieces`.

    Parameters
    ----------
    decode
        Returns the symbols of a piece, given its stream, its shape and its position.
    """
    count = chunk_count(shape)
    if count == 1:
        return decode(data, shape, 0)
    streams = split_lengths(data, count)
    symbols = np.empty(math.prod(shape), dtype)
    for piece, (start, stop, size) in zip(streams, chunks(shape), strict=True):
        symbols[start:stop] = decode(piece, size, start).reshape(-1)
    return symbols.reshape(shape)
