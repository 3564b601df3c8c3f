"""Long tensors in pieces of whole rows: the unit in which a ``.kcz`` file is written, checked and read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from kcomplex.weights import TensorHandle

# Rows are cut in multiples of so many: blocks of a mosaic whose size divides it then end where a piece ends.
_ROWS = 64


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a flat tensor, and the shape that they are coded in."""

    start: int
    stop: int
    shape: tuple[int, ...]


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
    """Yield a handle for each piece of a tensor, which is read once; the handle itself where there is one piece."""
    if piece_count(handle.shape, limit) == 1:
        yield handle
        return
    flat = handle.read().reshape(-1)
    for start, stop, shape in pieces_of(handle.shape, limit):
        yield TensorHandle.of(handle.name, flat[start:stop].reshape(shape))


def _longest(shape: tuple[int, ...], limit: int) -> int:
    """Return the number of elements in every piece but the last."""
    size, row = math.prod(shape), math.prod(shape[1:])
    if size <= limit or not shape:
        return max(size, 1)
    if row > limit:
        return limit
    rows = limit // row
    return row * (rows - rows % _ROWS if rows > _ROWS else rows)
