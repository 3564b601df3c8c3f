"""Lossless transforms before codes and code lengths: ``palette|zstd``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import numpy as np
import torch

from kcomplex.estimators.arrays import FORMS, made_of, read_arrays, tell_arrays
from kcomplex.estimators.code import Memory, SymbolCode, decode_pieces, encode_pieces
from kcomplex.estimators.coder import Part, Transform, size_of
from kcomplex.estimators.description import STRUCTURE, Kind
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.length import CodeLength
from kcomplex.estimators.spec import full_spec_of, spec_of
from kcomplex.estimators.structure import Reader, join_lengths, split_lengths, varint
from kcomplex.estimators.symbols import Shape, Symbols


class TwoStages(Estimator):
    """A dataclass whose first two fields are a stage and the estimator behind it."""

    @property
    def spec(self) -> str:
        """Both specifications, joined by ``|``."""
        stage, behind = self._stages()
        return f"{spec_of(stage)}|{behind.spec}"

    @property
    def full_spec(self) -> str:
        """Both specifications with every option, joined by ``|``."""
        stage, behind = self._stages()
        return f"{full_spec_of(stage)}|{behind.full_spec}"

    def _stages(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(cast(Any, self))[:2]]


@dataclass(frozen=True)
class TransformedCode(TwoStages, SymbolCode):
    """A code behind a lossless transform; itself one of integers."""

    transform: Transform
    code: SymbolCode
    name: ClassVar[str] = "transformed"

    @property
    def sequential(self) -> bool:
        """Whether the code behind the transform is."""
        return self.code.sequential

    def memory(self, shared: bytes) -> Memory:
        """Return the memory of the code behind the transform."""
        return self.code.memory(shared)

    def encode_symbols(self, symbols: Symbols, memory: Memory, known: torch.Tensor | None = None) -> list[Part]:
        """Return side information (tables), forms and lengths (structure) and the code's parts of every stream.

        What the code calls payload has the name that the transform gives it.
        """
        with made_of(symbols.nbytes):
            return encode_pieces(symbols, lambda piece, start: self._encoded(piece, memory))

    def _encoded(self, symbols: Symbols, memory: Memory) -> list[Part]:
        side, streams = self.transform.split(symbols)
        form, told = tell_arrays(streams, symbols.shape, symbols.dtype)
        coded = [self.code.encode_symbols(stream, memory) for stream in streams]
        names = self.transform.payload_names(len(streams))
        return [
            Part(STRUCTURE, varint(FORMS * len(side) + form) + told),
            Part("tables", side),
            Part(STRUCTURE, join_lengths([size_of(parts) for parts in coded[:-1]])),
            *(
                part._replace(name=name) if part.name == "payload" else part
                for name, parts in zip(names, coded, strict=True)
                for part in parts
            ),
        ]

    def decode_symbols(
        self, data: bytes, shape: Shape, dtype: np.dtype[Any], memory: Memory, known: torch.Tensor | None = None
    ) -> Symbols:
        """Return the symbols; see `SymbolCode.decode_symbols`."""
        with made_of(math.prod(shape) * dtype.itemsize):
            return decode_pieces(
                data, shape, dtype, lambda piece, size, start: self._decoded(piece, size, dtype, memory)
            )

    def _decoded(self, data: bytes, shape: Shape, dtype: np.dtype[Any], memory: Memory) -> Symbols:
        reader = Reader(data)
        length, form = divmod(reader.varint(), FORMS)
        forms = read_arrays(form, reader, shape, dtype)
        side = reader.take(length)
        pieces = split_lengths(reader.rest(), len(forms))
        streams = [self.code.decode_symbols(piece, *form, memory) for piece, form in zip(pieces, forms, strict=True)]
        return self.transform.join(side, streams, shape, dtype)


@dataclass(frozen=True)
class TransformedLength(TwoStages, CodeLength):
    """A code length behind a lossless transform; the transform's side information is paid for as it is."""

    transform: Transform
    measure: CodeLength
    name: ClassVar[str] = "transformed"

    @property
    def kind(self) -> Kind:
        """The kind of the length."""
        return self.measure.kind

    def length(self, symbols: Symbols) -> float:
        """Return the length of side information and streams, in bits."""
        side, streams = self.transform.split(symbols)
        return math.fsum([8.0 * len(side), *(self.measure.length(stream) for stream in streams)])
