"""Integers through a code of them, without a checkpoint around."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kcomplex.estimators.code import SymbolCode
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.structure import TensorEntry
from kcomplex.estimators.symbols import Shape, Symbols
from kcomplex.weights import TensorHandle


class Stream:
    """One stream of a code: what is encoded, or decoded, in order, with a memory of its own."""

    def __init__(self, code: SymbolCode | str) -> None:
        built = build_estimator(code)
        assert isinstance(built, SymbolCode)
        self.code, self.memory = built, built.memory(b"")

    def encode(self, symbols: Symbols) -> bytes:
        return b"".join(part.data for part in self.code.encode_symbols(symbols, self.memory))

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        return self.code.decode_symbols(data, shape, dtype, self.memory)

    def encode_tensor(self, tensor: torch.Tensor, known: torch.Tensor | None = None) -> bytes:
        return self.code.encode(TensorHandle.of("w", tensor), self.memory, known).to_bytes()

    def decode_tensor(
        self, data: bytes, dtype: torch.dtype, shape: Shape, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.code.decode(TensorEntry(("w",), dtype, tuple(shape)), data, self.memory, known)


def encoded(code: SymbolCode | str, symbols: Symbols) -> bytes:
    """Return integers as the first of a stream."""
    return Stream(code).encode(symbols)


def decoded(code: SymbolCode | str, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
    """Return the integers of `encoded`."""
    return Stream(code).decode(data, shape, dtype)
