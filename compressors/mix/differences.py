"""Matrices given others as streams of `mix` and `lin`: what is told of each matrix before its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Part
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape, Symbols

from ..tables.numbers import eighths_of_octaves, folded, unzigzag, zigzag
from .difference_rows import (
    FIELDS,
    Places,
    code_difference_rows,
    nearest_places,
    new_difference_columns,
    new_difference_mixer,
    numbers_of,
)
from .float_rows import LARGEST, Fields
from .floats import FORMATS, FloatFormat, octave_and_powers, relative, unit
from .integers import new_integer_memory
from .line import Line, fitted_line, ordinary, read_line
from .low_rank import STEP, Directions, LowRank, directions, read_low_rank
from .matrix import Integers, MatrixModel, Memory, RowModel, decode_matrix, encode_matrix

_MODERATE, _SAME, _ZEROS, _NEGATIVE_ZEROS, _OFFSET, _LOW_RANK = 1, 8, 16, 32, 64, 128
# There are more places of float64 than are told apart: those below 2, or zeros and those from 2**-510 to 2**512, which
# are counted as if their exponents, less so many, had ten bits.
_DOUBLE = FORMATS[torch.float64]
_MODERATE_DOUBLE = FloatFormat(10, 52, 511, ())
_LESS = 512
_MOST_PLACES = 1 << 62
_STEPS = 64
# A share of entries that are as given, or zero, below which telling them costs more than it saves.
_FEWEST_TOLD = 1e-3
_MOST_EIGHTHS = 8 * 900
# Each rank that is tried is so many times lower than the one before; each step of its factors so many times finer.
_FEWER, _FINER = 2, 4.0
_MOST_FITS = 4
# Predictions wrong by less than this share of the distance between places are as good as exact.
_EXACT = 0.05


@dataclass
class DifferenceMemory(Memory):
    """What tensors given others leave to those after them.

    Attributes
    ----------
    factors
        What low-rank parts leave to each other.
    """

    factors: Memory = field(default_factory=new_integer_memory)

    def copy(self) -> DifferenceMemory:
        """Return a copy for a trial."""
        plain = super().copy()
        return DifferenceMemory(plain.mixer, plain.eager, plain.column_scales, plain.covariances, self.factors.copy())

    def become(self, other: Memory) -> None:
        """Take over what another memory, not used any more, has learned."""
        super().become(other)
        if isinstance(other, DifferenceMemory):
            self.factors = other.factors


def new_difference_memory() -> DifferenceMemory:
    """Return the memory of a stream's first differences."""
    return DifferenceMemory(new_difference_mixer(), eager=True)


@dataclass
class GivenNumbers:
    """The numbers of given weights, taken piece by piece.

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

    def expected(
        self, line: Line, given: NDArray[np.float64], product: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Return what is expected of entries: numbers, or positions between those of the table.

        Parameters
        ----------
        product
            What is expected to be added to a line.
        """
        numbers = line.of(given)
        if product is not None:
            with np.errstate(over="ignore"):
                numbers = np.clip(numbers + product, -1e300, 1e300)
        if self.table is None:
            return numbers
        over = np.clip(np.searchsorted(self.table, numbers), 1, max(self.table.size - 1, 1))
        over = np.minimum(over, self.table.size - 1)
        under = np.maximum(over - 1, 0)
        low, high = self.table[under], self.table[over]
        gap = high - low
        part = np.clip((numbers - low) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)
        return under - self.shift + part


class _Attempt(NamedTuple):
    size: int
    parts: list[Part]
    memory: DifferenceMemory


@dataclass(frozen=True)
class DifferenceMix:
    """Codes integers, or the words of floats, given others, by what those before them have taught."""

    format: FloatFormat | None
    linear: bool
    memory: DifferenceMemory
    given: GivenNumbers

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), low-rank part, choices of the linear prediction (tables) and the payload."""
        if self.format == _DOUBLE and _are_moderate(symbols):
            return replace(self, format=_MODERATE_DOUBLE).encode_parts(symbols)
        places = self._places(symbols.reshape(folded(symbols.shape)))
        given = self.given.take(places.shape)
        line = self._line(places, given)
        found = directions(self._update(places, given, line), self._floor(places))
        if found is None:
            return self._encoded(self.memory, places, given, line, None)

        def attempt(line: Line, low_rank: LowRank | None) -> _Attempt:
            memory = self.memory.copy()
            parts = self._encoded(memory, places, given, line, low_rank)
            return _Attempt(sum(len(part.data) for part in parts), parts, memory)

        best = attempt(line, None)
        rank, former, chosen = found.best_rank(), math.inf, None
        # What the linear prediction finds by itself needn't be told: with it, fewer directions may be best.
        while rank:
            fitted, found = self._fitted(places, given, line, rank, found.floor)
            trial = attempt(fitted, found.rounded(rank, STEP))
            if trial.size >= former:
                break
            former = trial.size
            if trial.size < best.size:
                best, chosen = trial, (fitted, found, rank)
            rank //= _FEWER
        if chosen is not None:
            fitted, found, rank = chosen
            step = STEP
            # Where about nothing but rounding is left over, it may be told by telling the factors more finely.
            while found.rest(rank) * _EXACT <= found.floor:
                step /= _FINER
                trial = attempt(fitted, found.rounded(rank, step))
                if trial.size >= best.size:
                    break
                best = trial
        self.memory.become(best.memory)
        return best.parts

    def _encoded(
        self,
        memory: DifferenceMemory,
        places: Integers,
        given: NDArray[np.float64],
        line: Line,
        low_rank: LowRank | None,
    ) -> list[Part]:
        """Return the parts of a stream with a line and a low-rank part; the memory learns from them."""
        exact = self._fields(0, 0)
        expected = self.given.expected(line, given, None if low_rank is None else low_rank.product())
        nearest = nearest_places(expected, exact)
        zeros = self._zeros(places, nearest)
        same = self.format is not None and float((nearest == places).mean()) > _FEWEST_TOLD
        eighths = _scale(
            np.abs(numbers_of(places, exact) - expected)[(nearest != places) & ((places != 0) | (not zeros))]
        )
        fields = self._fields(eighths, zeros)
        told = Places(fields, same)
        means = _in_units(expected, eighths)
        flags = _MODERATE if self.format == _MODERATE_DOUBLE else 0
        flags |= (_SAME if same else 0) | (0, _ZEROS, _NEGATIVE_ZEROS)[zeros] | (_OFFSET if line.offset else 0)
        factors = []
        if low_rank is not None:
            flags |= _LOW_RANK
            factors = [low_rank.part(memory.factors)]
        head = flags, varint(zigzag(eighths)) + line.to_bytes()
        steps = _steps(places, means, fields)
        return encode_matrix(
            memory, self.linear, head, places, steps, lambda turned: _model(told, means, eighths, turned), factors
        )

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers or words; shape and dtype are those of what was encoded.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """
        reader = Reader(data)
        mode = reader.take(1)[0]
        moderate = bool(mode & _MODERATE)
        if moderate and self.format == _DOUBLE:
            return replace(self, format=_MODERATE_DOUBLE).decode(data, shape, dtype)
        if moderate != (self.format == _MODERATE_DOUBLE) or (mode & _ZEROS and mode & _NEGATIVE_ZEROS):
            raise StreamError(f"mix: a tensor given another can't begin with {mode}")
        eighths = unzigzag(reader.varint())
        if abs(eighths) > _MOST_EIGHTHS:
            raise StreamError(f"mix: a scale of {eighths} eighths of an octave")
        line = read_line(reader, bool(mode & _OFFSET))
        sides = folded(shape)
        low_rank = read_low_rank(reader, self.memory.factors, sides) if mode & _LOW_RANK else None
        product = None if low_rank is None else low_rank.product()
        means = _in_units(self.given.expected(line, self.given.take(sides), product), eighths)
        zeros = 2 if mode & _NEGATIVE_ZEROS else int(mode & _ZEROS > 0)
        told = Places(self._fields(eighths, zeros), bool(mode & _SAME))
        places = decode_matrix(reader, self.memory, mode, sides, lambda turned: _model(told, means, eighths, turned))
        return self._symbols(places, shape, dtype)

    def _line(self, places: Integers, given: NDArray[np.float64], product: NDArray[np.float64] | None = None) -> Line:
        """Return what is expected: the given weights themselves where some are the same, or the best line."""
        if self.format is not None:
            line, exact = Line(1, 0), self._fields(0, 0)
            if (nearest_places(self.given.expected(line, given, product), exact) == places).mean() > _FEWEST_TOLD:
                return line
        numbers = self._numbers(places)
        with_offset = self.format is None and self.given.table is None
        return fitted_line(numbers if product is None else numbers - product, given, with_offset)

    def _fitted(
        self, places: Integers, given: NDArray[np.float64], line: Line, rank: int, floor: float
    ) -> tuple[Line, Directions]:
        """Return line and directions that go together: each is the best for what the other leaves over."""
        for _ in range(_MOST_FITS):
            found = Directions.of(self._update(places, given, line), rank, floor)
            other = self._line(places, given, found.product(rank))
            if other == line:
                return line, found
            line = other
        return line, Directions.of(self._update(places, given, line), rank, floor)

    def _update(self, places: Integers, given: NDArray[np.float64], line: Line) -> NDArray[np.float64]:
        """Return differences of numbers from a line; none where either is no usual number."""
        numbers = self._numbers(places)
        return np.where(ordinary(numbers) & ordinary(given), numbers - line.of(given), 0.0)

    def _floor(self, places: Integers) -> float:
        """Return an error of a prediction that is as good as none."""
        steps = np.diff(self.given.table) if self.given.table is not None else self._numbers(places + 1)
        if self.given.table is None:
            steps = steps - self._numbers(places)
        return max(_EXACT * float(np.median(np.abs(steps))) if steps.size else 0.0, 1e-150)

    def _numbers(self, places: Integers) -> NDArray[np.float64]:
        """Return what places stand for."""
        table = self.given.table
        return numbers_of(places, self._fields(0, 0)) if table is None else table[places + self.given.shift]

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
        sign = 8 * words.itemsize - 1
        magnitudes = words.astype(np.int64) & ((1 << sign) - 1)
        negative = (words >> words.dtype.type(sign)).astype(bool)
        if self.format == _MODERATE_DOUBLE:
            magnitudes[magnitudes > 0] -= _LESS << self.format.mantissa_bits
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
        if self.format == _MODERATE_DOUBLE:
            magnitudes[magnitudes > 0] += _LESS << self.format.mantissa_bits
        words: Symbols = magnitudes.astype(dtype) | (negative.astype(dtype) << dtype.type(8 * dtype.itemsize - 1))
        return words

    def _fields(self, eighths: int, zeros: int) -> Fields:
        if self.format is None:
            return Fields(0, 0, 0, zeros, 0, np.array([math.ldexp(1.0, -unit(eighths))]))
        octave, powers = octave_and_powers(self.format, eighths)
        return Fields(self.format.exponent_bits, self.format.mantissa_bits, 0, zeros, octave, powers)


def have_places(words: Symbols, layout: FloatFormat) -> bool:
    """Return whether words of floats can be told as differences from others."""
    return layout != _DOUBLE or bool((_magnitudes(words) < _MOST_PLACES).all()) or _are_moderate(words)


def _are_moderate(words: Symbols) -> bool:
    magnitudes = _magnitudes(words)
    places = magnitudes - (_LESS << _DOUBLE.mantissa_bits)
    return bool(((magnitudes == 0) | ((places >= 1 << _DOUBLE.mantissa_bits) & (places < _MOST_PLACES))).all())


def _magnitudes(words: Symbols) -> Integers:
    return words.astype(np.int64) & ((1 << 63) - 1)


def _model(told: Places, means: NDArray[np.float64], eighths: int, transposed: bool) -> MatrixModel:
    known = np.ascontiguousarray(means.T) if transposed else means
    return MatrixModel(
        RowModel(code_difference_rows, new_difference_columns, FIELDS),
        relative(eighths),
        arguments=lambda start, stop: (known[start:stop], told),
        numbers=lambda places, start: _steps(places, known[start : start + len(places)], told.fields).astype(float),
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
