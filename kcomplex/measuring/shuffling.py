"""The shuffled control: the same weights in another order, so that only their histograms are left to a code."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kcomplex.errors import SpecError
from kcomplex.weights import TensorHandle, Weights, tensor_from_words, words_an_element, words_of


def shuffled_weights(weights: Weights, seed: int = 0) -> Weights:
    """Return weights whose entries are permuted inside each tensor, anew and alike at every read.

    A tensor's permutation depends on the seed and its name alone, not on the other tensors. The files stay those of
    the weights that were given, which must stay open.

    Raises
    ------
    SpecError
        The seed is negative.
    """
    if seed < 0:
        raise SpecError(f"the seed of a shuffle can't be negative: {seed}")
    handles = [replace(handle, load=partial(_shuffled, handle, seed), load_range=None) for handle in weights.values()]
    return Weights(handles, weights.skipped, f"{weights.source}, shuffled", selection=weights.selection)


def _shuffled(handle: TensorHandle, seed: int) -> torch.Tensor:
    random = np.random.default_rng([seed, *handle.name.encode("utf-8", "surrogatepass")])
    words = words_of(handle.read())
    if words_an_element(handle.dtype) > 1:
        pairs = words.reshape(-1, words_an_element(handle.dtype))
        words = pairs[random.permutation(len(pairs))].reshape(-1)
    else:
        words = random.permutation(words)
    return tensor_from_words(words, handle.dtype, handle.shape)
