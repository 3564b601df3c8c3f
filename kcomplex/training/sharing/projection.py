"""Projection: tensors with every block replaced by a motif."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.motifs.blocks import blocks_of, split_rows
from kcomplex.motifs.nearest import Indices, Rows, nearest


@dataclass(frozen=True)
class Projection:
    """Tensors on a mosaic.

    Attributes
    ----------
    tensors
        In the shapes and dtypes of what was projected.
    assignment
        The motif of every block, of shape (m,).
    counts
        How many blocks use each motif, of shape (k,).
    distortion
        Sum of squared changes, in float64.
    changed
        Number of weights whose value changed.
    """

    tensors: list[torch.Tensor]
    assignment: Indices
    counts: NDArray[np.intp]
    distortion: float
    changed: int


def project(
    tensors: Sequence[torch.Tensor],
    motifs: Rows,
    *,
    reference: bool = False,
    names: Sequence[str] = (),
) -> Projection:
    """Return tensors whose every block is replaced by its nearest motif; the tensors themselves aren't changed.

    Parameters
    ----------
    tensors
        Real floating-point tensors, cut in blocks as `kcomplex.motifs.blocks.blocks_of` does.
    motifs
        float64 of shape (k, s).
    reference
        Count the padding of the last block of each tensor in the distance, as published.
    names
        Of the tensors, for messages.

    Raises
    ------
    WeightsError
        A tensor holds NaN or infinity.
    """
    blocks = blocks_of([array_of(tensor) for tensor in tensors], motifs.shape[1], names)
    return replaced(tensors, blocks.sizes, motifs, nearest(blocks.rows, motifs, None if reference else blocks.real))


def replaced(
    tensors: Sequence[torch.Tensor],
    sizes: tuple[int, ...],
    motifs: Rows,
    assignment: Indices,
    tensors_of: Sequence[Callable[[Rows], torch.Tensor]] | None = None,
) -> Projection:
    """Return tensors of these sizes with the assigned motif in the place of every block.

    Parameters
    ----------
    tensors, sizes
        What is replaced, and the number of entries of each.
    motifs, assignment
        Of shapes (k, s) and (m,).
    tensors_of
        For each tensor, what makes a tensor of its shape and dtype of flat entries of motifs; None casts them.
    """
    projected, distortion, changed = [], 0.0, 0
    for index, (tensor, flat) in enumerate(zip(tensors, split_rows(motifs[assignment], sizes), strict=True)):
        after = tensors_of[index](flat) if tensors_of else torch.from_numpy(flat).to(tensor.dtype).reshape(tensor.shape)
        difference = array_of(after) - array_of(tensor)
        distortion += float(np.square(difference).sum())
        changed += int(np.count_nonzero(difference))
        projected.append(after)
    return Projection(projected, assignment, np.bincount(assignment, minlength=len(motifs)), distortion, changed)


def array_of(tensor: torch.Tensor) -> Rows:
    """Return a tensor as a float64 array."""
    array: Rows = tensor.detach().to("cpu", torch.float64).numpy()
    return array
