"""The exact nearest motif of every block, by a k-d tree or by matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from kcomplex.errors import WeightsError
from kcomplex.machine.blas_threads import one_blas_thread
from kcomplex.machine.parallel import in_order

Rows: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]

# Entries of the largest array that a search makes at once; larger ones are slower too, for they leave the cache.
_CHUNK = 1 << 20


def nearest(rows: Rows, motifs: Rows, real: Indices | None = None, *, workers: int = -1) -> Indices:
    """Return the index of the nearest motif of every block in squared Euclidean distance; ties go to the lowest index.

    The result is exact: it is the smallest of `squared_distances`, however it was found. A k-d tree finds it for
    short blocks, matrix products for long ones.

    Parameters
    ----------
    rows
        Blocks of shape (m, s), finite.
    motifs
        Of shape (k, s), finite, k > 0.
    real
        Number of real entries of each block; the others don't count. None counts all.
    workers
        Threads; -1 for one a core.

    Raises
    ------
    WeightsError
        There is no motif.

    Notes
    -----
    The tree is taken for k >= 64 * 2**s motifs, the crossover measured. Microseconds of processor time a block (EPYC),
    tree / products, for Gaussian blocks and motifs drawn from them:

    =====  ===========  ===========  ===========  ===========
    s      k = 64       k = 512      k = 5,000    k = 25,000
    =====  ===========  ===========  ===========  ===========
    1      0.33 / 0.32  0.41 / 0.73  0.58 / 10    0.80 / 46
    2      0.35 / 0.23  0.53 / 0.60  0.75 / 3.9   1.05 / 18
    4      0.50 / 0.22  1.00 / 0.62  1.65 / 3.9   2.10 / 18
    8      0.64 / 0.32  3.12 / 0.71  13.8 / 6.0   23 / 26
    16     1.27 / 0.33  5.89 / 0.88  96 / 6.1     487 / 34
    32     1.56 / 0.69  9.12 / 1.33  158 / 9.2    1144 / 49
    64     - / 2.10     - / 1.88     - / 13       - / 75
    =====  ===========  ===========  ===========  ===========
    """
    if not len(motifs):
        raise WeightsError("there is no motif to assign blocks to")
    size = rows.shape[1]
    if real is None or bool((real == size).all()):
        return _search(rows, motifs, workers)
    found = np.empty(len(rows), dtype=np.intp)
    for length in np.unique(real):
        chosen = real == length
        found[chosen] = _search(rows[chosen, :length], motifs[:, :length], workers)
    return found


def squared_distances(rows: Rows, motifs: Rows, real: Indices | None = None) -> Rows:
    """Return the squared Euclidean distance of each row to the motif in the same place, of shape (m,).

    The squares are added in float64 from the first entry to the last, whatever way the motif was found, so that two
    distances are equal where their entries' differences are. Entries beyond ``real`` don't count.
    """
    total = np.zeros(len(rows))
    for column in range(rows.shape[1]):
        square = np.square(rows[:, column] - motifs[:, column])
        total += square if real is None else np.where(real > column, square, 0.0)
    return total


def distinct(rows: Rows) -> Indices:
    """Return the lowest index of each distinct row, ascending; 0.0 and -0.0 are equal."""
    order, first = equal_runs(rows)
    return np.sort(order[first])


def equal_runs(rows: Rows) -> tuple[Indices, NDArray[np.bool_]]:
    """Return an order in which equal rows follow each other, the lowest index first, and which places begin a run.

    0.0 and -0.0 are equal.
    """
    order = np.lexsort((np.arange(len(rows)), *rows.T[::-1]))
    ordered = rows[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, first


def _search(rows: Rows, motifs: Rows, workers: int) -> Indices:
    keep = distinct(motifs)
    bank = np.ascontiguousarray(motifs[keep])
    count, size = bank.shape
    if count == 1:
        return np.full(len(rows), keep[0])
    search = _search_tree if count >= 64 << size else _search_products
    return keep[search(rows, bank, workers)]


def _search_tree(rows: Rows, motifs: Rows, workers: int) -> Indices:
    tree: Any = cKDTree(motifs)
    found = np.empty(len(rows), dtype=np.intp)
    for piece in _pieces(len(rows), 4):
        distances, indices = tree.query(rows[piece], k=2, workers=workers)
        found[piece] = indices[:, 0]
        # The tree adds squares in an order of its own and breaks ties as it likes.
        pending = piece.start + np.flatnonzero(distances[:, 1] <= _slightly_more(distances[:, 0]))
        width = 2
        while pending.size:
            width = min(4 * width, len(motifs))
            pending = np.concatenate(
                [
                    _settle(tree, rows, motifs, pending[part], width, found, workers)
                    for part in _pieces(len(pending), width)
                ]
            )
    return found


def _settle(tree: Any, rows: Rows, motifs: Rows, pending: Indices, width: int, found: Indices, workers: int) -> Indices:
    """Decide the ties that are no wider than `width` motifs, in place; return the blocks that are still open."""
    distances, indices = tree.query(rows[pending], k=width, workers=workers)
    tied = distances <= _slightly_more(distances[:, :1])
    settled = ~tied[:, -1] if width < len(motifs) else np.ones(len(pending), dtype=bool)
    which, column = np.nonzero(tied[settled])
    winners = _lowest_nearest(rows, motifs, pending[settled][which], indices[settled][which, column])
    found[pending[settled]] = winners
    still_open: Indices = pending[~settled]
    return still_open


def _slightly_more(distances: Rows) -> Rows:
    # The second term is for squares that underflow.
    more: Rows = distances * (1 + 1e-12) + 1e-150
    return more


def _search_products(rows: Rows, motifs: Rows, workers: int) -> Indices:
    # |x - z|^2 - |x|^2 = |z|^2 - 2 x z cancels where all weights share an offset, such as gains near one.
    centre = motifs.mean(axis=0)
    bank = motifs - centre
    # A power of two, exact: float32 would overflow where float64 doesn't. Beyond 2**26 it would tell motifs apart whose
    # squared distances both underflow, which makes them a tie.
    largest = max(np.abs(rows).max(initial=0.0), np.abs(motifs).max())
    scale = np.ldexp(1.0, min(-int(np.frexp(largest)[1]) - 1, 26))
    bank *= scale
    squares = np.square(bank).sum(axis=1)
    double = np.ascontiguousarray(np.vstack([-2 * bank.T, squares]))
    tables: tuple[NDArray[np.floating[Any]], ...] = (double.astype(np.float32), double)
    longest = math.sqrt(float(squares.max()))
    found = np.empty(len(rows), dtype=np.intp)

    def search(piece: slice) -> None:
        chunk = np.column_stack([(rows[piece] - centre) * scale, np.ones(piece.stop - piece.start)])
        lengths = np.sqrt(np.square(chunk[:, :-1]).sum(axis=1))
        for table in tables:
            which, candidates = _candidates(chunk.astype(table.dtype), table, lengths, longest)
            if len(which) <= 4 * len(chunk):
                break
        found[piece] = _lowest_nearest(rows, motifs, piece.start + which, candidates)

    with one_blas_thread():
        for _ in in_order(search, _pieces(len(rows), max(motifs.shape)), workers):
            pass
    return found


def _candidates(
    chunk: NDArray[np.floating[Any]], table: NDArray[np.floating[Any]], lengths: Rows, longest: float
) -> tuple[Indices, Indices]:
    """Return (row, motif) of every motif whose score can't be told from the row's best, by rows."""
    scores = chunk @ table
    info = np.finfo(scores.dtype)
    # Twice the error bounds of an inner product of s + 1 terms whose factors were rounded, and of the distances in
    # float64 that decide: two of them can be equal although the motifs aren't equally near.
    slack = (len(table) + 4) * (
        float(info.eps) * (2 * lengths * longest + longest**2)
        + float(np.finfo(np.float64).eps) * (lengths + longest) ** 2
        + float(info.tiny)
    )
    limit = np.nextafter((scores.min(axis=1) + slack).astype(scores.dtype), info.max)
    # In two dimensions np.nonzero takes longer than the product.
    flat = np.flatnonzero(scores <= limit[:, None])
    return flat // scores.shape[1], flat % scores.shape[1]


def _lowest_nearest(rows: Rows, motifs: Rows, which: Indices, candidates: Indices) -> Indices:
    """Return the nearest of each row's candidates, the lowest in a tie; ``which`` ascends and misses no row."""
    begins = np.ones(len(which), dtype=bool)
    begins[1:] = which[1:] != which[:-1]
    starts = np.flatnonzero(begins)
    winners = candidates[starts]
    sizes = np.diff(starts, append=len(which))
    rivals = np.repeat(sizes > 1, sizes)
    if rivals.any():
        which, candidates = which[rivals], candidates[rivals]
        distances = squared_distances(rows[which], motifs[candidates])
        order = np.lexsort((candidates, distances, which))
        ordered = which[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = ordered[1:] != ordered[:-1]
        winners[sizes > 1] = candidates[order[first]]
    return winners


def _pieces(length: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // width)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
