"""Blocks of weights and banks of motifs.

A network's tensors are cut in blocks of s consecutive weights; a mosaic keeps k motifs and one motif's index a block
(MoMos, arXiv:2602.14896). Everything here works on float64 rows, which hold every shorter float exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError, WeightsError
from kcomplex.motifs.nearest import Indices, Rows, distinct, squared_distances

# Beyond it a squared distance overflows float64.
_LARGEST = 1e150


@dataclass(frozen=True)
class Blocks:
    """The blocks of several tensors, stacked.

    Attributes
    ----------
    rows
        float64 of shape (m, s); the last block of a tensor is padded with zeros at its end.
    real
        Number of real entries of each block, of shape (m,): s but for padded tails.
    sizes
        Number of weights of each tensor.
    """

    rows: Rows
    real: Indices
    sizes: tuple[int, ...]


def split_rows(rows: Rows, sizes: Sequence[int]) -> list[Rows]:
    """Return the rows of stacked blocks as one flat array for each tensor of these sizes, without the padding."""
    width = rows.shape[1]
    flat, start, pieces = rows.reshape(-1), 0, []
    for size in sizes:
        pieces.append(flat[start : start + size])
        start += -(-size // width) * width
    return pieces


def blocks_of(tensors: Sequence[NDArray[np.floating[Any]]], block_size: int, names: Sequence[str] = ()) -> Blocks:
    """Return the blocks of tensors, each one flattened in C order and padded with zeros at its own end.

    Parameters
    ----------
    tensors
        Of any shapes; an empty one has no block, a scalar has one.
    block_size
        Weights a block, at least 1.
    names
        Of the tensors, for messages.

    Raises
    ------
    WeightsError
        A tensor holds NaN, infinity, or a value whose square overflows.
    SpecError
        The block size isn't positive.
    """
    if block_size < 1:
        raise SpecError(f"a block must have at least 1 weight, not {block_size}")
    counts = [-(-tensor.size // block_size) for tensor in tensors]
    rows = np.zeros((sum(counts), block_size))
    real = np.full(len(rows), block_size)
    flat, start = rows.reshape(-1), 0
    for index, (tensor, count) in enumerate(zip(tensors, counts, strict=True)):
        values = flat[start : start + tensor.size]
        values[:] = tensor.reshape(-1)
        wrong = ~(np.abs(values) <= _LARGEST)
        if wrong.any():
            name = repr(names[index]) if names else f"number {index}"
            raise WeightsError(
                f"the tensor {name} of shape {tensor.shape} holds {np.count_nonzero(wrong)} values that have no "
                f"nearest motif (NaN, infinite, or beyond {_LARGEST:g}), the first at flat index {np.argmax(wrong)}: "
                "training has diverged, or exclude the tensor"
            )
        start += count * block_size
        if count:
            real[start // block_size - 1] = tensor.size - (count - 1) * block_size
    return Blocks(rows, real, tuple(tensor.size for tensor in tensors))


def motif_count(capacity: float, blocks: int, *, reference: bool = False) -> int:
    """Return the number of motifs that a capacity c allows m blocks: floor(c m), at least 1 and at most m.

    A billionth is added before rounding down, so that .29 of 100 blocks is 29; the published code truncates the
    float64 product, which makes it 28 (``reference``).
    """
    exact = capacity * blocks
    return max(1, min(int(exact if reference else math.floor(exact + 1e-9)), blocks))


def mosaic_bits(motifs: int, block_size: int, word_bits: int, blocks: int) -> int:
    """Return the nominal length of a mosaic in bits: k s q for the motifs and m ceil(log2 k) for the indices.

    The ratio of n q to it is the relative algorithmic compression of MoMos (arXiv:2602.14896). Nothing is entropy
    coded and no structure is paid, so that it is no length of any stream.
    """
    return motifs * block_size * word_bits + blocks * (max(motifs, 1) - 1).bit_length()


def draw_motifs(
    blocks: Blocks, count: int, permutation: Indices, *, force_zero: bool = True, reference: bool = False
) -> Rows:
    """Return motifs drawn from the blocks without replacement, the zero motif first where it is forced.

    Parameters
    ----------
    blocks
        Where to draw from.
    count
        Number of motifs, at least 1, the zero motif included; fewer come back where there are fewer (distinct)
        blocks.
    permutation
        Random permutation of the blocks' indices: the blocks are taken in its order.
    force_zero
        Put a zero motif at index 0.
    reference
        As published: duplicates are kept, and so are padded tails. Otherwise motifs are distinct, and a padded tail
        becomes one only where there is no other block.

    Returns
    -------
    ndarray of shape (k, s), k <= count
    """
    size = blocks.rows.shape[1]
    zero = np.zeros((int(force_zero), size))
    if reference:
        count = max(1, min(count, len(blocks.rows)))
        return np.concatenate([zero, blocks.rows[permutation[: count - len(zero)]]])
    whole = blocks.real[permutation] == size
    pool = permutation[whole] if whole.any() else permutation
    if force_zero:
        pool = pool[blocks.rows[pool].any(axis=1)]
    return np.concatenate([zero, blocks.rows[first_distinct(blocks.rows, pool, count - len(zero))]])


def mean_motifs(blocks: Blocks, motifs: Rows, assignment: Indices, *, force_zero: bool = True) -> Rows:
    """Return motifs after each one became the mean of the blocks assigned to it, where there are some.

    Padding counts for nothing. The zero motif at index 0, if forced, stays.
    """
    count, size = motifs.shape
    updated = motifs.copy()
    for column in range(size):
        inside = blocks.real > column
        total = np.bincount(assignment[inside], blocks.rows[inside, column], minlength=count)
        users = np.bincount(assignment[inside], minlength=count)
        np.divide(total, users, out=updated[:, column], where=users > 0)
    if force_zero:
        updated[0] = 0.0
    return updated


def update_motifs(blocks: Blocks, motifs: Rows, assignment: Indices, *, force_zero: bool = True) -> Rows:
    """Return motifs after one step of Lloyd's algorithm: `mean_motifs`, and unused ones where blocks fit worst.

    The zero motif at index 0, if forced, stays.
    """
    count, size = motifs.shape
    updated = mean_motifs(blocks, motifs, assignment, force_zero=force_zero)
    unused = np.flatnonzero(np.bincount(assignment, minlength=count) == 0)
    unused = unused[unused >= int(force_zero)]
    if unused.size:
        error = squared_distances(blocks.rows, motifs[assignment], blocks.real)
        poor = np.flatnonzero((error > 0) & (blocks.real == size))
        worst = first_distinct(blocks.rows, poor[np.argsort(-error[poor], kind="stable")], unused.size)
        updated[unused[: len(worst)]] = blocks.rows[worst]
    return updated


def first_distinct(rows: Rows, order: Indices, count: int) -> Indices:
    """Return the first ``count`` of the rows in an order, those that repeat an earlier one left out."""
    taken = count
    while True:
        first = distinct(rows[order[:taken]])[:count]
        if len(first) == count or taken >= len(order):
            return order[first]
        taken *= 2
