"""The coder of one stream of `mix` or `lin`: integers, few-valued floats as integers, other floats by their fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.compressors.binary_coder import as_bytes, finish_decoding
from kcomplex.compressors.centring import centre
from kcomplex.compressors.float_stream import FORMATS, FloatMix, new_float_memory
from kcomplex.compressors.linear_prediction import Factors
from kcomplex.compressors.logistic import tables
from kcomplex.compressors.mix_integers import FIELDS, code_integer_rows, new_columns, new_integer_mixer, new_regression
from kcomplex.compressors.mix_matrix import (
    LINEAR,
    MODELLED,
    PLAIN,
    PLAINLY,
    TRANSPOSED,
    Integers,
    Memory,
    RowDecoder,
    RowEncoder,
    check_size,
    code_blocks,
    eighths_of_octaves,
    folded,
    layouts,
    octave_fraction,
    pack_choices,
    read_choices,
    shortest,
    unzigzag,
    zigzag,
)
from kcomplex.compressors.palette import Palette
from kcomplex.compressors.words import from_bytes, to_bytes
from kcomplex.description import STRUCTURE
from kcomplex.errors import StreamError
from kcomplex.estimator import Coder, EncodedTensor, Part, Shape, Symbols
from kcomplex.structure import Reader, varint
from kcomplex.weights import TensorHandle, tensor_from_words, word_dtype, words_of

# Integers are modelled up to this magnitude.
_LARGEST = 1 << 48
# Floats with so few values, each often enough, are a table and integers.
_MOST_VALUES = 4096
_FEWEST_USES = 16


def new_integer_memory() -> Memory:
    """Return the memory of a stream's first integers."""
    return Memory(new_integer_mixer(), new_regression())


@dataclass(frozen=True)
class LearningMix(Coder):
    """The coder of one stream; see `kcomplex.compressors.mix.Mix`."""

    linear: bool
    memory: Memory = field(default_factory=new_integer_memory)
    name: ClassVar[str] = "learning_mix"

    @property
    def sequential(self) -> bool:
        """True: tensors learn from those before them."""
        return True

    @cached_property
    def floats(self) -> Memory:
        """What tensors of floats leave to each other."""
        return new_float_memory()

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the stream of a tensor: integers; or a table and integers, or fields, of floats."""
        if handle.dtype not in FORMATS or not handle.elements:
            return super().encode_tensor(handle, shared)
        words = words_of(handle.read())
        side, (symbols,) = Palette().split(words)
        if symbols is words or not _is_few_valued(symbols, words.itemsize):
            coder = FloatMix(FORMATS[handle.dtype], self.linear, self.floats)
            return EncodedTensor([Part(STRUCTURE, b"\0"), *coder.encode_words(words, handle.shape)])
        parts = [Part(STRUCTURE, varint(len(side))), Part("tables", side)]
        return EncodedTensor(parts + self.encode_words(symbols, handle.shape))

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor, bit for bit."""
        if dtype not in FORMATS or not math.prod(shape):
            return super().decode_tensor(data, dtype, shape, shared)
        reader, word = Reader(data), word_dtype(dtype)
        length = reader.varint()
        if not length:
            coder = FloatMix(FORMATS[dtype], self.linear, self.floats)
            return tensor_from_words(coder.decode_words(reader.rest(), shape, word), dtype, shape)
        side = reader.take(length)
        ((_, indices),) = Palette().layout(side, shape, word)
        symbols = self.decode_words(reader.rest(), shape, indices)
        return tensor_from_words(Palette().join(side, [symbols], shape, word), dtype, shape)

    def encode(self, symbols: Symbols) -> bytes:
        """Return the stream; see `Coder.encode`."""
        return b"".join(part.data for part in self.encode_parts(symbols))

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        if not symbols.size:
            return []
        middle = centre(symbols)
        values = symbols.astype(np.int64) - np.int64(middle)
        largest = max(int(values.max()), -int(values.min()))
        if largest >= _LARGEST:
            return [Part(STRUCTURE, bytes([PLAIN])), Part("payload", to_bytes(symbols))]
        matrix = values.reshape(folded(symbols.shape))
        scale = min(max(eighths_of_octaves(max(float(np.abs(matrix).mean()), 2.0**-8)), -64), 383)
        candidates = layouts(self.memory, matrix, largest) if self.linear else PLAINLY

        def encode(memory: Memory, mode: int, choices: list[int]) -> list[Part]:
            rows = np.ascontiguousarray(matrix.T) if mode & TRANSPOSED else matrix
            spent, encoder = np.zeros(len(FIELDS)), RowEncoder()
            _code(memory, rows, scale, choices, encoder, spent)
            return [
                Part(STRUCTURE, bytes([mode | MODELLED]) + varint(zigzag(middle)) + varint(scale + 64)),
                Part("tables", pack_choices(choices)),
                Part("payload", encoder.finish(), dict(zip(FIELDS, spent.tolist(), strict=True))),
            ]

        return shortest(self.memory, candidates, encode)

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`."""
        if not math.prod(shape):
            return from_bytes(data, shape, dtype)
        reader = Reader(data)
        mode = reader.take(1)[0]
        if mode == PLAIN:
            return from_bytes(reader.rest(), shape, dtype)
        if not mode & MODELLED or mode > MODELLED + TRANSPOSED + LINEAR:
            raise StreamError(f"mix: a tensor of integers can't begin with {mode}")
        middle = unzigzag(reader.varint())
        scale = reader.varint() - 64
        if scale > 383:
            raise StreamError(f"mix: a scale of {scale} eighths of an octave")
        height, width = folded(shape)
        if mode & TRANSPOSED:
            height, width = width, height
        choices = read_choices(reader, self.memory, (height, width)) if mode & LINEAR else []
        payload = as_bytes(reader.rest())
        check_size(height * width, payload.size)
        values = np.empty((height, width), np.int64)
        decoder = RowDecoder(payload)
        _code(self.memory, values, scale, choices, decoder, np.zeros(len(FIELDS)))
        finish_decoding(decoder.state, payload)
        if mode & TRANSPOSED:
            values = values.T
        symbols: Symbols = (values.reshape(shape) + np.int64(middle)).astype(dtype)
        return symbols


def _code(
    memory: Memory,
    matrix: Integers,
    scale_index: int,
    choices: list[int],
    coder: RowEncoder | RowDecoder,
    spent: NDArray[np.float64],
) -> None:
    shape, scale = matrix.shape, octave_fraction(scale_index)
    columns = new_columns(shape[1], scale, memory.scales(shape, scale))

    def code_rows(start: int, stop: int, factors: Factors, room: NDArray[np.uint8]) -> None:
        rows = matrix[start:stop]
        expected = np.zeros(rows.shape, np.float32)
        code_integer_rows(
            coder.decoding, coder.state, room, rows, expected, *factors, columns, memory.regression, memory.mixer,
            tables(), spent,
        )  # fmt: skip

    def numbers(start: int, stop: int) -> NDArray[np.float64]:
        return matrix[start:stop].astype(np.float64)

    code_blocks(coder, memory, shape, choices, code_rows, numbers)
    memory.keep_scales(shape, columns.scale, scale)


def _is_few_valued(indices: Symbols, word_bytes: int) -> bool:
    """Return whether floats are better coded by their indices: few values, all but the commonest used often enough."""
    counts = np.bincount(indices.reshape(-1))
    used = indices.size - int(counts.max())
    return counts.size <= min(_MOST_VALUES, 1 << 4 * word_bytes, 1 + used // _FEWEST_USES)
