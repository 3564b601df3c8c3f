"""The tight codes: `mix` mixes predictions of every binary decision, `lin` predicts each weight from others as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from kcomplex.estimators.code import EncodedTensor, Memory, SymbolCode
from kcomplex.estimators.coder import Part
from kcomplex.estimators.structure import TensorEntry
from kcomplex.estimators.symbols import Shape, Symbols
from kcomplex.weights import TensorHandle

from .stream import MixMemory, MixStream


@dataclass(frozen=True)
class Mix(SymbolCode):
    """Decides bit by bit with a mixture of adaptive and parametric predictions: short codes, at 1e6 weights a second.

    Tensors of a stream share what is learned, so that a tensor is decoded after those before it. Given other weights,
    each tensor is expected to be a factor times what is given for it, plus an offset (of integers) and a matrix of low
    rank; what differs from that is coded. The rank, 0 included, is that of the shortest of several streams.
    """

    name: ClassVar[str] = "mix"
    linear: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """True: tensors learn from those before them."""
        return True

    @property
    def predicts(self) -> bool:
        """True: integers are expected where known numbers are."""
        return True

    def memory(self, shared: bytes = b"") -> MixMemory:
        """Return the memory of a new stream."""
        return MixMemory(shared)

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return the stream of a tensor: integers; or a table and integers, or fields, of floats; or differences."""
        stream = self._stream(memory)
        tensor = handle.read()
        return EncodedTensor(stream.encode(tensor) if known is None else stream.encode_given(tensor, known))

    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tensor, bit for bit; see `Code.decode`."""
        stream = self._stream(memory)
        if known is None:
            return stream.decode(data, entry.dtype, entry.shape)
        return stream.decode_given(data, entry.dtype, entry.shape, known)

    def encode_symbols(self, symbols: Symbols, memory: Memory, known: torch.Tensor | None = None) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        stream = self._stream(memory)
        return stream.encode_symbols(symbols) if known is None else stream.encode_symbols_given(symbols, known)

    def decode_symbols(
        self, data: bytes, shape: Shape, dtype: np.dtype[Any], memory: Memory, known: torch.Tensor | None = None
    ) -> Symbols:
        """Return the integers; see `SymbolCode.decode_symbols`."""
        stream = self._stream(memory)
        if known is None:
            return stream.decode_symbols(data, shape, dtype)
        return stream.decode_symbols_given(data, shape, dtype, known)

    def _stream(self, memory: Memory) -> MixStream:
        assert isinstance(memory, MixMemory)
        return MixStream(self.linear, memory)


@dataclass(frozen=True)
class Lin(Mix):
    """`mix` around a mean that is predicted linearly from entries that are already coded, along rows or columns."""

    name: ClassVar[str] = "lin"
    linear: ClassVar[bool] = True
