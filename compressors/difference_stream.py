"""Matrices given others as streams of `mix` and `lin`: what is told of each matrix before its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.compressors.binary_coder import as_bytes
from kcomplex.compressors.float_stream import FloatFormat, octave_and_powers, relative, unit
from kcomplex.compressors.mix_differences import (
    FIELDS,
    Places,
    code_difference_rows,
    nearest_places,
    new_difference_columns,
    new_difference_mixer,
    numbers_of,
)
from kcomplex.compressors.mix_floats import LARGEST, Fields
from kcomplex.compressors.mix_integers import new_regression
from kcomplex.compressors.mix_matrix import (
    LINEAR,
    TRANSPOSED,
    Integers,
    MatrixCode,
    Memory,
    RowModel,
    eighths_of_octaves,
    folded,
    layouts,
    pack_choices,
    read_choices,
    shortest,
    unzigzag,
    zigzag,
)
from kcomplex.description import STRUCTURE
from kcomplex.errors import StreamError
from kcomplex.estimator import Coder, Part, Shape, Symbols
from kcomplex.structure import Reader, varint

_SAME, _ZEROS, _NEGATIVE_ZEROS, _OFFSET = 8, 16, 32, 64
_STEPS = 64
# A share of entries that are as given, or zero, below which telling them costs more than it saves.
_FEWEST_TOLD = 1e-3
# Rounding the factor moves what is expected by at most about so many mean differences.
_PRECISION = 0.01
_MOST_BITS = 60
_MOST_EIGHTHS = 8 * 900


class Line(NamedTuple):
    """What is expected of an entry, told before a matrix: a factor of the given weights, and an offset.

    Attributes
    ----------
    factor, bits
        The factor is ``factor / 2**bits``.
    offset, offset_bits
        The same for the offset.
    """

    factor: int
    bits: int
    offset: int = 0
    offset_bits: int = 0

    def of(self, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what is expected, the same bits on every machine; zero where that isn't finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = given * math.ldexp(self.factor, -self.bits)
            expected = scaled + math.ldexp(self.offset, -self.offset_bits)
        return np.where(np.isfinite(expected), expected, 0.0)

    def to_bytes(self) -> bytes:
        """Return what `read_line` reads; without an offset of zero."""
        pieces = [zigzag(self.factor), zigzag(self.bits)]
        if self.offset:
            pieces += [zigzag(self.offset), zigzag(self.offset_bits)]
        return b"".join(map(varint, pieces))


def read_line(reader: Reader, offset: bool) -> Line:
    """Return the line in a stream.

    Raises
    ------
    StreamError
        Its numbers are out of range.
    """
    line = Line(*(unzigzag(reader.varint()) for _ in range(4 if offset else 2)))
    octaves = max(line.factor.bit_length() - line.bits, line.offset.bit_length() - line.offset_bits)
    large = max(abs(line.factor), abs(line.offset)) >> _MOST_BITS
    if max(abs(line.bits), abs(line.offset_bits)) > 1000 or octaves > 1023 or large:
        raise StreamError("mix: the factor of what is given is out of range")
    return line


def new_difference_memory() -> Memory:
    """Return the memory of a stream's first differences."""
    return Memory(new_difference_mixer(), new_regression(), eager=True)


@dataclass
class GivenNumbers:
    """The numbers of given weights, taken chunk by chunk.

    Parameters
    ----------
    flat
        Of the whole tensor.
    table
        Ascending numbers of a palette: the entries are positions in it. None where they are numbers themselves.
    """

    flat: NDArray[np.floating[Any]]
    table: NDArray[np.float64] | None = None
    taken: int = 0

    @property
    def shift(self) -> int:
        """Position of the place zero in the table: that of the number zero, where it is there."""
        if self.table is None:
            return 0
        position = int(np.searchsorted(self.table, 0.0))
        return position if position < self.table.size and self.table[position] == 0 else 0

    def take(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        """Return the next numbers as a matrix."""
        first, self.taken = self.taken, self.taken + math.prod(shape)
        with np.errstate(invalid="ignore"):
            return self.flat[first : self.taken].astype(np.float64).reshape(shape)

    def expected(self, line: Line, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what is expected of entries: numbers, or positions between those of the table."""
        numbers = line.of(given)
        if self.table is None:
            return numbers
        over = np.clip(np.searchsorted(self.table, numbers), 1, max(self.table.size - 1, 1))
        over = np.minimum(over, self.table.size - 1)
        under = np.maximum(over - 1, 0)
        low, high = self.table[under], self.table[over]
        gap = high - low
        part = np.clip((numbers - low) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)
        return under - self.shift + part


@dataclass(frozen=True)
class DifferenceMix(Coder):
    """Codes integers, or the words of floats, given others."""

    format: FloatFormat | None
    linear: bool
    memory: Memory
    given: GivenNumbers
    name: ClassVar[str] = "difference_mix"

    def encode(self, symbols: Symbols) -> bytes:
        """Return the stream; see `Coder.encode`."""
        return b"".join(part.data for part in self.encode_parts(symbols))

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        places = self._places(symbols.reshape(folded(symbols.shape)))
        given = self.given.take(places.shape)
        exact = self._fields(0, 0)
        line = self._line(places, given, exact)
        expected = self.given.expected(line, given)
        nearest = nearest_places(expected, exact)
        zeros = self._zeros(places, nearest)
        same = self.format is not None and float((nearest == places).mean()) > _FEWEST_TOLD
        eighths = _scale(
            np.abs(numbers_of(places, exact) - expected)[(nearest != places) & ((places != 0) | (not zeros))]
        )
        fields = self._fields(eighths, zeros)
        told = Places(fields, same)
        means = _in_units(expected, eighths)
        candidates: list[tuple[int, list[int]]] = [(0, [])]
        if self.linear:
            steps = _steps(places, means, fields)
            candidates = layouts(self.memory, steps, int(np.abs(steps).max()))

        def encode(memory: Memory, mode: int, choices: list[int]) -> list[Part]:
            rows, known = (places.T.copy(), means.T.copy()) if mode & TRANSPOSED else (places, means)
            flags = (_SAME if told.same else 0) | (0, _ZEROS, _NEGATIVE_ZEROS)[zeros] | (_OFFSET if line.offset else 0)
            return [
                Part(STRUCTURE, bytes([mode | flags]) + varint(zigzag(eighths)) + line.to_bytes()),
                Part("tables", pack_choices(choices)),
                _code(told, known, eighths, choices).encode(memory, rows),
            ]

        return shortest(self.memory, candidates, encode)

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers or words; see `Coder.decode`."""
        reader = Reader(data)
        mode = reader.take(1)[0]
        if mode & 1 or mode & 128 or (mode & _ZEROS and mode & _NEGATIVE_ZEROS):
            raise StreamError(f"mix: a tensor given another can't begin with {mode}")
        eighths = unzigzag(reader.varint())
        if abs(eighths) > _MOST_EIGHTHS:
            raise StreamError(f"mix: a scale of {eighths} eighths of an octave")
        line = read_line(reader, bool(mode & _OFFSET))
        height, width = folded(shape)
        means = _in_units(self.given.expected(line, self.given.take((height, width))), eighths)
        if mode & TRANSPOSED:
            height, width, means = width, height, means.T.copy()
        choices = read_choices(reader, self.memory, (height, width)) if mode & LINEAR else []
        zeros = 2 if mode & _NEGATIVE_ZEROS else int(mode & _ZEROS > 0)
        told = Places(self._fields(eighths, zeros), bool(mode & _SAME))
        places = _code(told, means, eighths, choices).decode(self.memory, as_bytes(reader.rest()), (height, width))
        if mode & TRANSPOSED:
            places = places.T
        return self._symbols(places, shape, dtype)

    def _line(self, places: Integers, given: NDArray[np.float64], exact: Fields) -> Line:
        """Return what is expected: the given weights themselves where some are the same, or the best line."""
        if self.format is not None:
            line = Line(1, 0)
            if (nearest_places(self.given.expected(line, given), exact) == places).mean() > _FEWEST_TOLD:
                return line
        table = self.given.table
        numbers = numbers_of(places, exact) if table is None else table[places + self.given.shift]
        return _fitted(numbers, given, self.format is None and table is None)

    def _zeros(self, places: Integers, nearest: Integers) -> int:
        """Return whether a flag is to tell zeros, because there are many that aren't expected; 2 for both signs."""
        minus = (places == -1) & (self.format is not None)
        zeros = (places == 0) | minus
        unexpected = zeros & (nearest != 0) & (nearest != -1)
        usual = 0.0 if self.format is not None else 2.0 * (np.abs(places) == 1).mean()
        if unexpected.mean() < max(_FEWEST_TOLD, usual):
            return 0
        return 2 if minus.any() else 1

    def _places(self, words: Symbols) -> Integers:
        if self.format is None:
            return words.astype(np.int64) - self.given.shift
        bits = self.format.exponent_bits + self.format.mantissa_bits
        magnitudes = words.astype(np.int64) & ((1 << bits) - 1)
        negative = (words >> words.dtype.type(bits)).astype(bool)
        places: Integers = np.where(negative, -magnitudes - 1, magnitudes)
        return places

    def _symbols(self, places: Integers, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        flat = places.reshape(shape)
        if self.format is None:
            flat = flat + self.given.shift
            symbols: Symbols = flat.astype(dtype)
            if not np.array_equal(symbols.astype(np.int64), flat):
                raise StreamError(f"mix: the stream holds integers that {dtype} doesn't")
            return symbols
        bits = self.format.exponent_bits + self.format.mantissa_bits
        negative = flat < 0
        magnitudes = np.where(negative, -flat - 1, flat)
        if (magnitudes >> bits).any():
            raise StreamError("mix: the stream holds floats beyond its dtype")
        words: Symbols = magnitudes.astype(dtype) | (negative.astype(dtype) << dtype.type(bits))
        return words

    def _fields(self, eighths: int, zeros: int) -> Fields:
        if self.format is None:
            return Fields(0, 0, 0, zeros, 0, np.array([math.ldexp(1.0, -unit(eighths))]))
        octave, powers = octave_and_powers(self.format, eighths)
        return Fields(self.format.exponent_bits, self.format.mantissa_bits, 0, zeros, octave, powers)


def _code(told: Places, means: NDArray[np.float64], eighths: int, choices: list[int]) -> MatrixCode:
    return MatrixCode(
        RowModel(code_difference_rows, new_difference_columns, FIELDS),
        relative(eighths),
        choices,
        arguments=lambda start, stop: (means[start:stop], told),
        numbers=lambda places, start: _steps(places, means[start : start + len(places)], told.fields).astype(float),
    )


def _steps(places: Integers, means: NDArray[np.float64], fields: Fields) -> Integers:
    """Return differences in 1/64 of a unit, rounded, as the covariance counts them; none of zeros that are told."""
    differences = np.clip(numbers_of(places, fields) - means, -LARGEST, LARGEST)
    if fields.zeros:
        differences[(places == 0) | ((places == -1) & (fields.zeros == 2))] = 0.0
    steps: Integers = np.rint(differences * _STEPS).astype(np.int64)
    return steps


def _in_units(numbers: NDArray[np.float64], eighths: int) -> NDArray[np.float64]:
    """Return numbers in the units of a matrix, those beyond all bounds cut off."""
    with np.errstate(over="ignore"):
        return np.clip(numbers * math.ldexp(1.0, -unit(eighths)), -1e200, 1e200)


def _scale(differences: NDArray[np.float64]) -> int:
    """Return the mean of magnitudes, but for outliers, in eighths of an octave."""
    counted = differences[differences > 0]
    if not counted.size:
        return 0
    mean = float(counted[counted <= 64.0 * np.median(counted)].mean())
    return min(max(eighths_of_octaves(mean), -_MOST_EIGHTHS), _MOST_EIGHTHS)


def _fitted(values: NDArray[np.float64], given: NDArray[np.float64], with_offset: bool) -> Line:
    """Return the line with the least squared error over entries that aren't zero, rounded to what matters."""
    used = ordinary(values) & ordinary(given)
    nonzero = used & (values != 0)
    used = nonzero if nonzero.any() else used
    x, y = given[used], values[used]
    power = float(np.square(x).sum())
    if not power > 0:
        return Line(0, 0)
    offset = 0.0
    if with_offset:
        spread = float(np.square(x - x.mean()).sum())
        factor = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
        offset = float(y.mean() - factor * x.mean())
    else:
        factor = float((x * y).sum() / power)
    error = max(float(np.abs(y - factor * x - offset).mean()), 1e-300)
    return Line(*_rounded(factor, _PRECISION * error / math.sqrt(power / x.size)), *_rounded(offset, 0.05 * error))


def ordinary(numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which numbers are finite and no outliers: one broken weight mustn't decide for all."""
    magnitudes = np.where(np.isfinite(numbers), np.abs(numbers), np.inf)
    usual = magnitudes[(magnitudes > 0) & (magnitudes < 1e100)]
    return magnitudes <= (1000.0 * float(np.median(usual)) if usual.size else 0.0)


def _rounded(number: float, precision: float) -> tuple[int, int]:
    """Return integer and bits after its point of a number rounded to about a precision, without zeros at its end."""
    if not math.isfinite(number) or abs(number) < max(precision, 1e-290):
        return 0, 0
    bits = min(math.ceil(-math.log2(max(precision, 1e-300))), 52 - math.frexp(number)[1])
    integer = round(math.ldexp(number, bits))
    while integer and integer % 2 == 0:
        integer, bits = integer // 2, bits - 1
    return (integer, bits) if integer and abs(bits) <= 1000 else (0, 0)
