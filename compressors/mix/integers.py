"""Matrices of integers as streams of `mix` and `lin`: what is told of each matrix before its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Part
from kcomplex.estimators.description import STRUCTURE
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape, Symbols

from ..tables.centring import centre
from ..tables.numbers import eighths_of_octaves, folded, octave_fraction, read_middle, zigzag
from ..tables.words import from_bytes, to_bytes
from .binary_coder import as_bytes
from .integer_rows import FIELDS, code_integer_rows, new_columns, new_integer_mixer, new_regression
from .matrix import (
    LINEAR,
    MODELLED,
    PLAIN,
    PLAINLY,
    TRANSPOSED,
    MatrixCode,
    Memory,
    RowModel,
    layouts,
    pack_choices,
    read_choices,
    shortest,
)

# Integers are modelled up to this magnitude.
LARGEST = 1 << 48


def new_integer_memory() -> Memory:
    """Return the memory of a stream's first integers."""
    return Memory(new_integer_mixer(), new_regression())


@dataclass(frozen=True)
class IntegerMix:
    """Codes integers, by what those before them have taught."""

    linear: bool
    memory: Memory

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        if not symbols.size:
            return []
        middle = centre(symbols)
        values = symbols.astype(np.int64) - np.int64(middle)
        largest = max(int(values.max()), -int(values.min()))
        if largest >= LARGEST:
            return [Part(STRUCTURE, bytes([PLAIN])), Part("payload", to_bytes(symbols))]
        matrix = values.reshape(folded(symbols.shape))
        scale = min(max(eighths_of_octaves(max(float(np.abs(matrix).mean()), 2.0**-8)), -64), 383)
        candidates = layouts(self.memory, matrix, largest) if self.linear else PLAINLY

        def encode(memory: Memory, mode: int, choices: list[int]) -> list[Part]:
            rows = np.ascontiguousarray(matrix.T) if mode & TRANSPOSED else matrix
            return [
                Part(STRUCTURE, bytes([mode | MODELLED]) + varint(zigzag(middle)) + varint(scale + 64)),
                Part("tables", pack_choices(choices)),
                _code(scale, choices).encode(memory, rows),
            ]

        return shortest(self.memory, candidates, encode)

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers."""
        if not math.prod(shape):
            return from_bytes(data, shape, dtype)
        reader = Reader(data)
        mode = reader.take(1)[0]
        if mode == PLAIN:
            return from_bytes(reader.rest(), shape, dtype)
        if not mode & MODELLED or mode > MODELLED + TRANSPOSED + LINEAR:
            raise StreamError(f"mix: a tensor of integers can't begin with {mode}")
        middle = read_middle(reader)
        scale = reader.varint() - 64
        if scale > 383:
            raise StreamError(f"mix: a scale of {scale} eighths of an octave")
        height, width = folded(shape)
        if mode & TRANSPOSED:
            height, width = width, height
        choices = read_choices(reader, self.memory, (height, width)) if mode & LINEAR else []
        values = _code(scale, choices).decode(self.memory, as_bytes(reader.rest()), (height, width))
        if mode & TRANSPOSED:
            values = values.T
        symbols: Symbols = (values.reshape(shape) + np.int64(middle)).astype(dtype)
        return symbols


def _code(scale: int, choices: list[int]) -> MatrixCode:
    return MatrixCode(
        RowModel(code_integer_rows, new_columns, FIELDS),
        octave_fraction(scale),
        choices,
        arguments=lambda start, stop: (),
        numbers=lambda values, start: values.astype(np.float64),
    )
