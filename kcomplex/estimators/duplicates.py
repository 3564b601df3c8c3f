"""Tensors that are the same as an earlier one, bit for bit: a stream names that one instead of telling them again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from kcomplex.weights import TensorHandle, Weights, words_of

# Shorter tensors cost hardly more than their reference does.
_FEWEST_BYTES = 4


class Original(NamedTuple):
    """The earlier tensor that another one is the same as.

    Attributes
    ----------
    name
        Of the earlier tensor.
    transposed
        Whether the rows of one are the columns of the other (both are matrices).
    """

    name: str
    transposed: bool


def find_duplicates(weights: Weights) -> dict[str, Original]:
    """Return the originals of the tensors that equal an earlier one in dtype and bits, in any shape, or transposed.

    Only tensors that share dtype and size with another are read, one after another; two are compared where a sum of
    their words, which no order changes, is the same.
    """
    groups: dict[tuple[torch.dtype, int], list[TensorHandle]] = {}
    for handle in weights.values():
        if handle.nbytes >= _FEWEST_BYTES:
            groups.setdefault((handle.dtype, handle.elements), []).append(handle)
    found: dict[str, Original] = {}
    for group in groups.values():
        earlier: dict[tuple[int, int], list[TensorHandle]] = {}
        for handle in group if len(group) > 1 else ():
            candidates = earlier.setdefault(_fingerprint(handle), [])
            original = _equal_one(handle, candidates)
            if original is None:
                candidates.append(handle)
            else:
                found[handle.name] = original
    return found


def without(weights: Weights, originals: Mapping[str, Original]) -> Weights:
    """Return the weights that aren't the same as earlier ones; their files stay those of the given weights."""
    own = [handle for name, handle in weights.items() if name not in originals]
    return Weights(own, weights.skipped, weights.source) if originals else weights


def duplicate(original: torch.Tensor, shape: tuple[int, ...], transposed: bool) -> torch.Tensor:
    """Return the tensor of a shape that was found to be the same as another one; it shares no memory with it."""
    return (original.t() if transposed else original).contiguous().clone().reshape(shape)


def can_be_duplicate(shape: tuple[int, ...], of: tuple[int, ...], transposed: bool) -> bool:
    """Return whether a tensor of a shape may be the same as one of another shape, or as its transpose."""
    return of[::-1] == shape and len(of) == 2 if transposed else math.prod(shape) == math.prod(of)


def _fingerprint(handle: TensorHandle) -> tuple[int, int]:
    words = words_of(handle.read())
    return int(np.sum(words, dtype=np.uint64)), int(np.bitwise_xor.reduce(words))


def _equal_one(handle: TensorHandle, candidates: Iterable[TensorHandle]) -> Original | None:
    words = None
    for candidate in candidates:
        if words is None:
            words = words_of(handle.read())
        tensor = candidate.read()
        if np.array_equal(words, words_of(tensor)):
            return Original(candidate.name, False)
        matrices = len(handle.shape) == 2 and handle.shape == candidate.shape[::-1] and min(handle.shape) > 1
        if matrices and np.array_equal(words, words_of(tensor.t())):
            return Original(candidate.name, True)
    return None
