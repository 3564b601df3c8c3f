"""Selection of motifs from the blocks of weights: at random, by frequency, or far from each other."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.motifs.blocks import Blocks, draw_motifs, first_distinct
from kcomplex.motifs.nearest import Indices, Rows, equal_runs, nearest, squared_distances

Selection = Literal["random", "distinct", "weighted", "spread"]
SELECTIONS: tuple[str, ...] = get_args(Selection)

_ROUNDS = 5
# Of more blocks than this, or than this many a motif, spread motifs are selected from a sample.
_SAMPLED = 1 << 17
_SAMPLED_A_MOTIF = 16


def select_motifs(
    blocks: Blocks,
    count: int,
    generator: torch.Generator,
    selection: Selection,
    *,
    force_zero: bool = True,
    kept: Rows | None = None,
) -> Rows:
    """Return motifs selected from the blocks, the zero motif first where it is forced.

    Parameters
    ----------
    blocks, count, force_zero
        See `kcomplex.motifs.blocks.draw_motifs`; padded tails become motifs only where there is no other block, but for
        ``random``.
    generator
        Of the random numbers; the same state and blocks give the same motifs on machines of one kind.
    selection
        ``random``: blocks drawn without replacement, equal ones among them (as published). ``distinct``: the same,
        but no motif twice. ``weighted``: distinct blocks, drawn in proportion to how many blocks are equal to them.
        ``spread``: a fifth of the motifs distinct, then four times as many again drawn in proportion to the squared
        distance to those already taken, summed over equal blocks, which seeds k-means well; of many blocks, from a
        sample of them in which blocks far from the mean are more frequent, and count less.
    kept
        Motifs to begin with, distinct, the zero motif first where it is forced; they are part of the count, and those
        beyond it are left out. No motif is returned twice then, by ``random`` neither.

    Returns
    -------
    ndarray of shape (k, s), k <= count

    References
    ----------
    B. Bahmani et al.: Scalable k-means++. VLDB 2012 (``spread``). O. Bachem, M. Lucic, A. Krause: Scalable k-means
    clustering via lightweight coresets. KDD 2018 (the sample).
    """
    if selection in ("random", "distinct") and kept is None:
        return _drawn(blocks, count, generator, selection, force_zero)
    taken = np.zeros((int(force_zero), blocks.rows.shape[1])) if kept is None else kept[:count]
    if selection == "weighted":
        rows = _whole(blocks)
        counts = multiplicities(rows)
        counts[~rows.any(axis=1) & force_zero] = 0.0
        taken = _joined(taken, rows[_draw(counts, count - len(taken), generator)], count)
    elif selection == "spread":
        taken = _spread(_whole(blocks), taken, count, generator)
    if len(taken) < count:
        # Of those that are drawn, as many as are taken already may be equal to them.
        taken = _joined(taken, _drawn(blocks, count, generator, "distinct", force_zero), count)
    return taken


def multiplicities(rows: Rows, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Return, in the place of each distinct row's first occurrence, how often it occurs, and zero elsewhere.

    Parameters
    ----------
    rows
        Of shape (m, s).
    weights
        Of shape (m,), to add instead of counting.
    """
    order, starts = equal_runs(rows)
    added = np.ones(len(rows)) if weights is None else weights[order]
    counts = np.zeros(len(rows))
    counts[order[starts]] = np.add.reduceat(added, np.flatnonzero(starts)) if len(rows) else 0.0
    return counts


def _whole(blocks: Blocks) -> Rows:
    """Return the blocks that aren't padded or, where all are, those."""
    whole = np.flatnonzero(blocks.real == blocks.rows.shape[1])
    return blocks.rows[whole] if len(whole) else blocks.rows


def _drawn(blocks: Blocks, count: int, generator: torch.Generator, selection: Selection, force_zero: bool) -> Rows:
    permutation = torch.randperm(len(blocks.rows), generator=generator).numpy()
    return draw_motifs(blocks, count, permutation, force_zero=force_zero, reference=selection == "random")


def _joined(motifs: Rows, others: Rows, count: int) -> Rows:
    """Return the first of some motifs and of others that aren't equal to one before."""
    both = np.concatenate([motifs, others])
    return both[first_distinct(both, np.arange(len(both)), count)]


def _spread(rows: Rows, taken: Rows, count: int, generator: torch.Generator) -> Rows:
    weights = np.ones(len(rows))
    most = max(_SAMPLED, _SAMPLED_A_MOTIF * count)
    if len(rows) > most:
        far = squared_distances(rows, np.broadcast_to(rows.mean(axis=0), rows.shape))
        # Where all blocks are equal there is no distance to share.
        shares = np.full(len(rows), 0.5 / len(rows)) + 0.5 * far / (far.sum() or 1.0)
        sample = _draw(shares, most, generator)
        rows, weights = rows[sample], 1 / np.minimum(most * shares[sample], 1.0)
    weights = multiplicities(rows, weights)
    distances = np.ones(len(rows))
    if len(taken):
        distances = squared_distances(rows, taken[nearest(rows, taken)])
    first = weights * (distances > 0)
    for left in range(_ROUNDS, 0, -1):
        drawn = _draw(first if left == _ROUNDS else weights * distances, -(-(count - len(taken)) // left), generator)
        if not len(drawn):
            break
        more = rows[drawn]
        distances = np.minimum(distances if len(taken) else np.inf, squared_distances(rows, more[nearest(rows, more)]))
        taken = np.concatenate([taken, more])
    return taken


def _draw(weights: NDArray[np.float64], count: int, generator: torch.Generator) -> Indices:
    """Return indices drawn without replacement in proportion to weights, in order of drawing; none of weight zero.

    The sampling is systematic, at equal distances along the sum of the weights; whoever is hit more than once is taken,
    and left out of another pass for those still missing.
    """
    left = weights.copy()
    passes: list[Indices] = [np.empty(0, dtype=np.intp)]
    missing = min(count, int(np.count_nonzero(left)))
    while missing > 0:
        ends = np.cumsum(left)
        offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        places = (np.arange(missing) + offset) * (ends[-1] / missing)
        hit = np.unique(np.searchsorted(ends, places, side="right"))
        hit = hit[hit < len(left)]
        passes.append(hit)
        left[hit] = 0.0
        missing -= len(hit)
    drawn = np.concatenate(passes)
    shuffled: Indices = drawn[torch.randperm(len(drawn), generator=generator).numpy()]
    return shuffled
