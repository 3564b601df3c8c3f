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
from .integer_rows import FIELDS, code_integer_rows, new_integer_columns, new_integer_mixer
from .linear_prediction import MOST_COUNTED
from .matrix import (
    LINEAR,
    MODELLED,
    PLAIN,
    TRANSPOSED,
    Integers,
    MatrixModel,
    Memory,
    RowModel,
    decode_matrix,
    encode_matrix,
)

# Integers are modelled up to this magnitude.
LARGEST = 1 << 48
# In eighths of an octave.
_LARGEST_SCALE = 383
# Mean magnitudes of more bits than these are counted in a power of two.
_COUNTED_BITS = 13


def new_integer_memory() -> Memory:
    """Return the memory of a stream's first integers."""
    return Memory(new_integer_mixer())


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
        if max(int(values.max()), -int(values.min())) >= LARGEST:
            return [Part(STRUCTURE, bytes([PLAIN])), Part("payload", to_bytes(symbols))]
        matrix = values.reshape(folded(symbols.shape))
        scale = min(max(eighths_of_octaves(max(float(np.abs(matrix).mean()), 2.0**-8)), -64), _LARGEST_SCALE)
        head = MODELLED, varint(zigzag(middle)) + varint(scale + 64)
        counted = _counted(matrix, scale)
        return encode_matrix(self.memory, self.linear, head, matrix, counted, lambda _: _model(scale))

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; shape and dtype are those of what was encoded.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """
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
        if scale > _LARGEST_SCALE:
            raise StreamError(f"mix: a scale of {scale} eighths of an octave")
        values = decode_matrix(reader, self.memory, mode, folded(shape), lambda _: _model(scale))
        symbols: Symbols = (values.reshape(shape) + np.int64(middle)).astype(dtype)
        return symbols


def _model(scale: int) -> MatrixModel:
    return MatrixModel(
        RowModel(code_integer_rows, new_integer_columns, FIELDS),
        octave_fraction(scale),
        arguments=lambda start, stop: (),
        numbers=lambda values, start: _counted(values, scale).astype(np.float64),
    )


def _counted(values: Integers, scale: int) -> Integers:
    """Return integers as the covariance counts them: those of large matrices in a power of two, outliers cut off."""
    bits = max(scale // 8 - _COUNTED_BITS, 0)
    counted: Integers = np.clip((values + ((1 << bits) >> 1)) >> bits, -MOST_COUNTED, MOST_COUNTED)
    return counted
