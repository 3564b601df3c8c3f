"""Tensors that are the same as an earlier one, bit for bit: a stream names that one instead of telling them again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from kcomplex.estimators.pieces import handles_of, piece_limit
from kcomplex.weights import TensorHandle, Weights

# Shorter tensors cost hardly more than their reference does.
_FEWEST_BYTES = 4
_DIGEST_BYTES = 16


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


class Distinct(NamedTuple):
    """Weights without the tensors that are the same as earlier ones.

    Attributes
    ----------
    weights
        The tensors that are left; their files stay those of the weights that they are from.
    originals
        Of the tensors that are left out, by name.
    """

    weights: Weights
    originals: Mapping[str, Original]


def distinct_weights(weights: Weights, apart: Callable[[TensorHandle], Hashable] = lambda handle: None) -> Distinct:
    """Return the weights without those that equal an earlier tensor in dtype and bits, in any shape, or transposed.

    Only tensors that share dtype and size with another are read, one after another, and told apart by a sum of their
    words, which no order changes; those of the same sum by a digest.

    Parameters
    ----------
    apart
        Tensors of which it returns different things are different: what is quantised, and what isn't.
    """
    groups: dict[Hashable, list[TensorHandle]] = {}
    for handle in weights.values():
        if handle.nbytes >= _FEWEST_BYTES:
            groups.setdefault((handle.dtype, handle.elements, apart(handle)), []).append(handle)
    originals: dict[str, Original] = {}
    for group in groups.values():
        alike: dict[tuple[int, int], list[TensorHandle]] = {}
        for handle in group if len(group) > 1 else ():
            alike.setdefault(_fingerprint(handle), []).append(handle)
        for handles in alike.values():
            if len(handles) > 1:
                originals |= _originals(handles)
    own = [handle for name, handle in weights.items() if name not in originals]
    return Distinct(weights.with_tensors(own, weights.skipped) if originals else weights, originals)


def duplicate(original: torch.Tensor, shape: tuple[int, ...], transposed: bool) -> torch.Tensor:
    """Return the tensor of a shape that is the same as another one; it shares no memory with it."""
    return (original.t() if transposed else original).contiguous().clone().reshape(shape)


def can_be_duplicate(shape: tuple[int, ...], of: tuple[int, ...], transposed: bool) -> bool:
    """Return whether a tensor of a shape may be the same as one of another shape, or as its transpose."""
    if transposed:
        return len(of) == 2 and of[::-1] == shape and min(of) > 1
    return math.prod(shape) == math.prod(of)


def _fingerprint(handle: TensorHandle) -> tuple[int, int]:
    total, parity = 0, 0
    for piece in handles_of(handle, piece_limit(True)):
        words = piece.words()
        total += int(np.sum(words, dtype=np.uint64))
        parity ^= int(np.bitwise_xor.reduce(words))
    return total, parity


def _originals(handles: list[TensorHandle]) -> dict[str, Original]:
    """Return the originals among tensors of one dtype and size."""
    found: dict[str, Original] = {}
    plain: dict[bytes, str] = {}
    turned: dict[str, bytes] = {}
    first: list[TensorHandle] = []
    for handle in handles:
        digest = _digest(handle)
        if digest in plain:
            found[handle.name] = Original(plain[digest], False)
            continue
        for other in first:
            if can_be_duplicate(handle.shape, other.shape, True):
                if other.name not in turned:
                    turned[other.name] = _digest(TensorHandle.of(other.name, other.read().t()))
                if turned[other.name] == digest:
                    found[handle.name] = Original(other.name, True)
                    break
        else:
            plain[digest] = handle.name
            first.append(handle)
    return found


def _digest(handle: TensorHandle) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for piece in handles_of(handle, piece_limit(True)):
        digest.update(piece.words().data)
    return digest.digest()
