"""Matrices of floats as streams of `mix` and `lin`: what is told of each matrix before its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Part
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape, Symbols

from ..tables.numbers import eighths_of_octaves, folded, octave_fraction, unzigzag, zigzag
from ..tables.words import from_bytes
from .float_rows import (
    FIELDS,
    HIGHEST_OCTAVE,
    LARGEST,
    MODELLED,
    Fields,
    code_float_rows,
    new_float_columns,
    new_float_mixer,
)
from .matrix import Integers, MatrixModel, Memory, RowModel, decode_matrix, encode_matrix

_ZEROS, _NEGATIVE_ZEROS = 8, 16
# Steps of a unit in which the covariance counts values: products of integers are summed exactly.
_STEPS = 64
# A share of entries with trailing zeros below which telling them costs more than it saves.
_FEWEST_TRAILING = 1e-3
_MOST_EIGHTHS = 8 * 1100


class FloatFormat(NamedTuple):
    """Widths of a float's fields in bits, the exponent's bias, and mantissa widths of shorter formats it may be from.

    Attributes
    ----------
    origins
        Explicit mantissa bits of formats whose values, widened, end in zeros.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    origins: tuple[int, ...]


FORMATS = {
    torch.float64: FloatFormat(11, 52, 1023, (23, 10, 7)),
    torch.float32: FloatFormat(8, 23, 127, (10, 7)),
    torch.bfloat16: FloatFormat(8, 7, 127, ()),
    torch.float16: FloatFormat(5, 10, 15, ()),
    torch.float8_e4m3fn: FloatFormat(4, 3, 7, ()),
    torch.float8_e4m3fnuz: FloatFormat(4, 3, 8, ()),
    torch.float8_e5m2: FloatFormat(5, 2, 15, ()),
    torch.float8_e5m2fnuz: FloatFormat(5, 2, 16, ()),
}


def octave_and_powers(layout: FloatFormat, eighths: int) -> tuple[int, NDArray[np.float64]]:
    """Return `Fields.octave` and `Fields.powers` of a matrix with a scale in eighths of an octave."""
    octave = -layout.bias - unit(eighths)
    # What is too small or too large for float64 in units is zero, or worth the same.
    exponents = np.clip(np.arange((1 << layout.exponent_bits) + 1) + octave, -1100, HIGHEST_OCTAVE).astype(np.int32)
    return octave, np.ldexp(1.0, exponents)


def new_float_memory() -> Memory:
    """Return the memory of a stream's first floats."""
    return Memory(new_float_mixer())


@dataclass(frozen=True)
class FloatMix:
    """Codes the words of floats by their fields, by what those before them have taught."""

    format: FloatFormat
    linear: bool
    memory: Memory

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        words = symbols.reshape(folded(symbols.shape)).astype(np.int64)
        eighths = self._scale(words)
        fields = self._fields(eighths, self._trailing(words), self._zeros(words))
        head = (0, _ZEROS, _NEGATIVE_ZEROS)[fields.zeros], bytes([fields.trailing]) + varint(zigzag(eighths))
        steps = _steps(words, fields)
        return encode_matrix(self.memory, self.linear, head, words, steps, lambda _: _model(fields, eighths))

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the words; shape and dtype are those of what was encoded.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """
        if not math.prod(shape):
            return from_bytes(data, shape, dtype)
        reader = Reader(data)
        mode, trailing = reader.take(2)
        if mode >= 2 * _NEGATIVE_ZEROS or mode & 1 or trailing not in (0, *self._candidates()):
            raise StreamError(f"mix: a tensor of floats can't begin with {mode}, {trailing}")
        eighths = unzigzag(reader.varint())
        if abs(eighths) > _MOST_EIGHTHS:
            raise StreamError(f"mix: a scale of {eighths} eighths of an octave")
        zeros = 2 if mode & _NEGATIVE_ZEROS else int(mode & _ZEROS > 0)
        fields = self._fields(eighths, trailing, zeros)
        words = decode_matrix(reader, self.memory, mode, folded(shape), lambda _: _model(fields, eighths))
        symbols: Symbols = words.reshape(shape).astype(dtype)
        return symbols

    def _scale(self, words: Integers) -> int:
        """Return the mean magnitude of finite non-zero words in eighths of an octave."""
        magnitudes = np.abs(_values(words, self._fields(0, 0, 0)))
        counted = magnitudes[(magnitudes > 0) & (magnitudes < 1e200)]
        return eighths_of_octaves(float(counted.mean())) if counted.size else 0

    def _fields(self, eighths: int, trailing: int, zeros: int) -> Fields:
        octave, powers = octave_and_powers(self.format, eighths)
        return Fields(self.format.exponent_bits, self.format.mantissa_bits, trailing, zeros, octave, powers)

    def _trailing(self, words: Integers) -> int:
        """Return how many lowest bits a flag is worth telling about; 0 for none."""
        nonzero = words[words & ((1 << self.format.mantissa_bits) - 1) != 0]
        saved = {bits: float((nonzero & ((1 << bits) - 1) == 0).mean()) for bits in self._candidates() if nonzero.size}
        worth = {bits: bits * share for bits, share in saved.items() if share > _FEWEST_TRAILING}
        return max(worth, key=lambda bits: worth[bits], default=0)

    def _zeros(self, words: Integers) -> int:
        negative = 1 << (self.format.exponent_bits + self.format.mantissa_bits)
        if self.format.exponent_bits + self.format.mantissa_bits == 63:
            negative = -(1 << 63)
        return 2 if (words == negative).any() else int((words == 0).any())

    def _candidates(self) -> list[int]:
        raw = self.format.mantissa_bits - MODELLED
        return [min(self.format.mantissa_bits - origin, raw) for origin in self.format.origins]


def _model(fields: Fields, eighths: int) -> MatrixModel:
    return MatrixModel(
        RowModel(code_float_rows, new_float_columns, FIELDS),
        relative(eighths),
        arguments=lambda start, stop: (fields,),
        numbers=lambda words, start: _steps(words, fields).astype(np.float64),
    )


def unit(eighths: int) -> int:
    """Return the whole octaves of a scale: units are powers of two."""
    return (eighths + 4) // 8


def relative(eighths: int) -> float:
    """Return a scale in units."""
    return octave_fraction(eighths - 8 * unit(eighths))


def _values(words: Integers, fields: Fields) -> NDArray[np.float64]:
    """Return the numbers of words in units, those with the highest exponent (infinity, NaN) as if they were finite."""
    exponent_bits, mantissa_bits = fields.exponent_bits, fields.mantissa_bits
    exponents = (words >> mantissa_bits) & ((1 << exponent_bits) - 1)
    parts = (words & ((1 << mantissa_bits) - 1)) / float(1 << mantissa_bits)
    magnitudes = np.where(exponents == 0, parts * fields.powers[1], (1.0 + parts) * fields.powers[exponents])
    negative = (words >> (exponent_bits + mantissa_bits)) & 1
    values: NDArray[np.float64] = np.where(negative, -magnitudes, magnitudes)
    return values


def _steps(words: Integers, fields: Fields) -> Integers:
    """Return numbers in 1/64 of a unit, rounded, as the covariance counts them."""
    values = np.clip(_values(words, fields), -LARGEST, LARGEST)
    steps: Integers = np.rint(values * _STEPS).astype(np.int64)
    return steps
