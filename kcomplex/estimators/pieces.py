"""Long tensors in pieces of whole rows: the unit in which they are measured, written, checked and read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.weights import TensorHandle, words_of

# Weights a piece.
PIECE_WEIGHTS = 1 << 22
# Rows are cut in multiples of so many: blocks of a mosaic whose size divides it then end where a piece ends.
ALIGNMENT = 64


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a flat tensor, and the shape that they are coded in."""

    start: int
    stop: int
    shape: tuple[int, ...]


def piece_limit(divisible: bool) -> int:
    """Return the most weights a piece: `PIECE_WEIGHTS`, or 0 where tensors stay whole."""
    return PIECE_WEIGHTS if divisible else 0


def piece_count(shape: tuple[int, ...], limit: int) -> int:
    """Return the number of pieces of a tensor; 1 without a limit (0)."""
    return max(1, -(-math.prod(shape) // _longest(shape, limit))) if limit else 1


def pieces_of(shape: tuple[int, ...], limit: int) -> Iterator[Piece]:
    """Yield the pieces of a tensor of at most ``limit`` elements each: whole rows where they fit, else flat.

    Without a limit (0), or where the tensor isn't longer, there is one piece, of the tensor's own shape.
    """
    size = math.prod(shape)
    if piece_count(shape, limit) == 1:
        yield Piece(0, size, shape)
        return
    row = math.prod(shape[1:])
    longest = _longest(shape, limit)
    for start in range(0, size, longest):
        stop = min(start + longest, size)
        yield Piece(start, stop, ((stop - start) // row, *shape[1:]) if row <= limit else (stop - start,))


def handles_of(handle: TensorHandle, limit: int) -> Iterator[TensorHandle]:
    """Yield a handle for each piece of a tensor; the handle itself where there is one piece.

    A tensor of which the source can't read a range is read once for all pieces.
    """
    if piece_count(handle.shape, limit) == 1:
        yield handle
        return
    whole = handle.read() if handle.load_range is None else None
    for piece in pieces_of(handle.shape, limit):
        load = partial(_part, handle, whole, piece)
        yield replace(handle, shape=piece.shape, load=load, load_range=None)


def _part(handle: TensorHandle, whole: torch.Tensor | None, piece: Piece) -> torch.Tensor:
    if whole is None:
        return handle.read_range(piece.start, piece.stop).reshape(piece.shape)
    if piece.shape[1:] != handle.shape[1:]:
        return whole.reshape(-1)[piece.start : piece.stop]
    # Of a tensor that isn't contiguous, rows are a view, where flat entries are a copy of the whole.
    row = math.prod(handle.shape[1:])
    return whole[piece.start // row : piece.stop // row]


def values_of_pieces(handle: TensorHandle) -> Iterator[NDArray[np.floating[Any]]]:
    """Yield the values of each piece of a tensor; see `TensorHandle.values`."""
    return (piece.values() for piece in handles_of(handle, PIECE_WEIGHTS))


def joined(parts: Iterable[tuple[Piece, torch.Tensor]], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of a dtype and shape that is in pieces."""
    data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    for (start, stop, _), part in parts:
        data.numpy()[start * dtype.itemsize : stop * dtype.itemsize] = words_of(part).view(np.uint8)
    return data.view(dtype).reshape(shape)


def _longest(shape: tuple[int, ...], limit: int) -> int:
    """Return the number of elements in every piece but the last."""
    size, row = math.prod(shape), math.prod(shape[1:])
    if size <= limit or not shape:
        return max(size, 1)
    if row > limit:
        return limit
    rows = limit // row
    return row * (rows - rows % ALIGNMENT if rows > ALIGNMENT else rows)
