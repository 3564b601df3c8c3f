"""Differences of two tensors' words, in the order of their values."""

from __future__ import annotations

import numpy as np
import torch

from kcomplex.estimators.symbols import Symbols
from kcomplex.weights import tensor_from_words, words_of


def word_differences(tensor: torch.Tensor, known: torch.Tensor) -> Symbols:
    """Return the differences of a tensor's words, in the order of their values, from those of another of its dtype.

    They are flat and unsigned; small ones of both signs are small.
    """
    return _zigzag(ordered_words(words_of(tensor), tensor.dtype) - ordered_words(words_of(known), tensor.dtype))


def from_word_differences(differences: Symbols, known: torch.Tensor) -> torch.Tensor:
    """Return the tensor that has these differences from another."""
    words = ordered_words(_unzigzag(differences) + ordered_words(words_of(known), known.dtype), known.dtype)
    return tensor_from_words(words, known.dtype, tuple(known.shape))


def ordered_words(words: Symbols, dtype: torch.dtype) -> Symbols:
    """Return words so that neighbours in value are neighbours; applied twice, it gives the words themselves.

    The words of floats are sign and magnitude: those of negative numbers run the other way.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return words
    bits = 8 * words.itemsize - 1
    below, negative = words.dtype.type((1 << bits) - 1), words >> words.dtype.type(bits)
    ordered: Symbols = words ^ (negative * below)
    return ordered


def _zigzag(differences: Symbols) -> Symbols:
    """Return differences modulo the words' range so that small ones of both signs are small."""
    top = 8 * differences.itemsize - 1
    negative = (differences >> differences.dtype.type(top)).astype(bool)
    doubled = differences << differences.dtype.type(1)
    folded: Symbols = np.where(negative, ~doubled, doubled)
    return folded


def _unzigzag(folded: Symbols) -> Symbols:
    one = folded.dtype.type(1)
    halved = folded >> one
    differences: Symbols = np.where(folded & one, ~halved, halved)
    return differences
