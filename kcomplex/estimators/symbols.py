"""Symbols: the integers that coders see of a tensor, and chunks of them where a long tensor is coded whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.weights import word_dtype, words_an_element, words_of

Symbols: TypeAlias = NDArray[np.integer[Any]]
Shape: TypeAlias = tuple[int, ...]

# What a code of integers sees at once of tensors that aren't coded in pieces: its tables and models stay bounded.
PIECE_SYMBOLS = 1 << 24


def symbol_dtype(dtype: torch.dtype) -> np.dtype[np.integer[Any]]:
    """Return the NumPy dtype in which coders see a tensor's words: signed for signed integers, else unsigned."""
    words = word_dtype(dtype)
    signed = dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
    return np.dtype(f"i{words.itemsize}") if signed else words


def symbol_shape(dtype: torch.dtype, shape: Shape) -> Shape:
    """Return the shape in which coders see a tensor's words: with a last axis of length 2 for complex numbers."""
    return shape if words_an_element(dtype) == 1 else (*shape, words_an_element(dtype))


def symbols_of(tensor: torch.Tensor) -> Symbols:
    """Return the words of a tensor as coders see them, in their shape; zero-copy where `words_of` is."""
    symbols = words_of(tensor).view(symbol_dtype(tensor.dtype))
    return symbols.reshape(symbol_shape(tensor.dtype, tuple(tensor.shape)))


def chunk_count(shape: Shape) -> int:
    """Return the number of chunks that symbols of a shape are coded in; at least one."""
    unit, units = _units(shape)
    return max(-(-math.prod(shape) // (unit * units)), 1) if math.prod(shape) > PIECE_SYMBOLS else 1


def chunks(shape: Shape) -> Iterator[tuple[int, int, Shape]]:
    """Yield begin, end and shape of each chunk of flat symbols: whole rows where they fit."""
    size = math.prod(shape)
    if size <= PIECE_SYMBOLS:
        yield 0, size, shape
        return
    unit, units = _units(shape)
    rest = shape[1:] if unit > 1 else ()
    for start in range(0, size, unit * units):
        stop = min(start + unit * units, size)
        yield start, stop, ((stop - start) // unit, *rest)


def _units(shape: Shape) -> tuple[int, int]:
    """Return how many symbols are never cut, and how many times that a chunk holds: rows where they fit."""
    row = math.prod(shape[1:])
    return (row, PIECE_SYMBOLS // row) if 0 < row <= PIECE_SYMBOLS else (1, PIECE_SYMBOLS)
