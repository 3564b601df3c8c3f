"""The codebook that makes a network's repeated blocks short without changing a bit of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcomplex.compressors.codebook import bits_of
from kcomplex.weights import TensorHandle, Words

# Any odd number with well-mixed bits (from splitmix64).
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


# Block sizes that are tried where none is given, and how many words of all tensors they are tried on.
LARGEST_FOUND = 64
_SAMPLED_WORDS = 1 << 22
_USUAL_SIZE = 4


def best_block_size(groups: Sequence[Sequence[TensorHandle]]) -> int:
    """Return the weights a block at which repeated blocks make tensors shortest; 4 where they do at no size.

    Lengths are those of `repeated_blocks`, on the beginning of each tensor where there are more than 4 million weights:
    linear in the weights, with a sort of a 64-bit key for each block of each size.

    Parameters
    ----------
    groups
        Tensors whose values are of one dtype each, float32 and float64: each group has a codebook of its own.
    """
    total = sum(handle.elements for group in groups for handle in group)
    share = min(1.0, _SAMPLED_WORDS / max(total, 1))
    samples = []
    for group in groups:
        patterns = [bits_of(handle.values()).reshape(-1) for handle in group]
        patterns = [words[: int(words.size * share)] for words in patterns]
        lengths = [_word_length(handle.words()[: words.size]) for handle, words in zip(group, patterns, strict=True)]
        samples.append((patterns, lengths, [8 * handle.dtype.itemsize for handle in group]))
    plain = sum(sum(lengths) for _, lengths, _ in samples)
    found = {size: sum(_mosaic_length(*sample, size) for sample in samples) for size in range(2, LARGEST_FOUND + 1)}
    best = min(found, key=lambda size: found[size])
    return best if found[best] < plain else _USUAL_SIZE


def _mosaic_length(patterns: list[Words], word_lengths: list[float], word_bits: list[int], size: int) -> float:
    """Return the bits of tensors as blocks of a size, each tensor's at most those of its words."""
    keys = [_keys(_blocks(words, size)[0]) for words in patterns]
    if not any(key.size for key in keys):
        return sum(word_lengths)
    _, labels, counts = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
    costs = np.log2(counts.sum() / counts)
    total, position = 0.0, 0
    for words, key, length, bits in zip(patterns, keys, word_lengths, word_bits, strict=True):
        own = labels.reshape(-1)[position : position + key.size]
        position += key.size
        blocks = float((1.0 / counts[own]).sum()) + (words.size % size > 0)
        total += min(length, float(costs[own].sum()) + bits * size * blocks)
    return total


def find_blocks(words: Words, table: Words) -> NDArray[np.intp] | None:
    """Return the row of the table that each block of flat words equals bit for bit; None where a block isn't in it.

    Parameters
    ----------
    words
        Flat; cut in blocks of s words. The last block may be shorter: then the beginning of a row must equal it.
    table
        Of shape (k, s).
    """
    full, tail = _blocks(words, table.shape[1])
    keys = _keys(table)
    order = np.argsort(keys, kind="stable")
    position = np.minimum(np.searchsorted(keys[order], _keys(full)), len(table) - 1)
    rows = order[position]
    if not np.array_equal(table[rows], full):
        return None
    if tail.size:
        fits = _beginning(table, tail)
        if not fits.any():
            return None
        rows = np.append(rows, np.argmax(fits))
    return rows


def repeated_blocks(
    tensors: Sequence[TensorHandle], block_size: int, dtype: np.dtype[Any]
) -> NDArray[np.floating[Any]]:
    """Return the distinct blocks of the tensors that are shorter as a mosaic than word by word, of shape (k, s).

    The zero block is left out: it is in every codebook. A tensor stays out if its indices and its share of the
    codebook (an equal one for every use of a block, and a block for what is left after the last) cost more than its
    words; both are counted at their empirical entropy, tables included, so that the answer doesn't depend on the coder.

    Parameters
    ----------
    tensors
        Whose values are of one dtype.
    block_size
        Weights a block.
    dtype
        float32 or float64.
    """
    found = [(handle, _keys(_blocks(bits_of(handle.values()).reshape(-1), block_size)[0])) for handle in tensors]
    found = [(handle, keys) for handle, keys in found if keys.size]
    if not found:
        return np.zeros((0, block_size), dtype)
    unique, flat = np.unique(np.concatenate([keys for _, keys in found]), return_inverse=True)
    sizes = [keys.size for _, keys in found]
    labels = dict(enumerate(np.split(flat.reshape(-1), np.cumsum(sizes)[:-1])))
    handles = [handle for handle, _ in found]
    zero = unique == _keys(np.zeros((1, block_size), f"u{dtype.itemsize}"))
    kept = _worthwhile(handles, labels, zero, block_size)
    return _collect([(handles[index], labels[index]) for index in kept], zero, block_size, dtype)


def _worthwhile(
    handles: Sequence[TensorHandle], labels: dict[int, NDArray[np.intp]], zero: NDArray[np.bool_], block_size: int
) -> list[int]:
    kept, word_lengths = list(labels), dict[int, float]()
    while kept:
        counts = np.bincount(np.concatenate([labels[index] for index in kept]), minlength=len(zero))
        uses = np.maximum(counts, 1)
        index_bits = np.log2(counts.sum() / uses)
        share = np.where(zero, 0.0, 1.0 / uses)
        staying = []
        for index in kept:
            own = labels[index]
            row_bits = 8 * block_size * handles[index].dtype.itemsize
            blocks = float(share[own].sum()) + (handles[index].elements % block_size > 0)
            length = float(index_bits[own].sum()) + row_bits * blocks
            # Counting words takes longer than counting blocks, and most tensors need no count to be left out.
            if length < 8 * handles[index].nbytes:
                if index not in word_lengths:
                    word_lengths[index] = _word_length(handles[index].words())
                if length < word_lengths[index]:
                    staying.append(index)
        if len(staying) == len(kept):
            break
        kept = staying
    return kept


def _word_length(words: Words) -> float:
    """Return the bits of words at their empirical entropy with a table of the distinct ones, or plain if shorter."""
    _, counts = np.unique(words, return_counts=True)
    entropy = float((counts * np.log2(words.size / counts)).sum())
    return min(8.0 * words.nbytes, entropy + 8.0 * words.itemsize * len(counts))


def _collect(
    kept: Sequence[tuple[TensorHandle, NDArray[np.intp]]],
    zero: NDArray[np.bool_],
    block_size: int,
    dtype: np.dtype[Any],
) -> NDArray[np.floating[Any]]:
    seen = zero.copy()
    pieces = [np.zeros((1, block_size), f"u{dtype.itemsize}")]
    tails = []
    for handle, labels in kept:
        full, tail = _blocks(bits_of(handle.values()).reshape(-1), block_size)
        ids, first = np.unique(labels, return_index=True)
        pieces.append(full[first[~seen[ids]]])
        seen[ids] = True
        if tail.size:
            tails.append(tail)
    table = np.concatenate(pieces)
    for tail in tails:
        if not _beginning(table, tail).any():
            padded = np.zeros((1, block_size), table.dtype)
            padded[0, : tail.size] = tail
            table = np.concatenate([table, padded])
    rows: NDArray[np.floating[Any]] = table[1:].view(dtype)
    return rows


def _blocks(words: Words, size: int) -> tuple[Words, Words]:
    """Return the full blocks of flat words, of shape (m, size), and what is left over."""
    whole = words.size - words.size % size
    return words[:whole].reshape(-1, size), words[whole:]


def _beginning(table: Words, tail: Words) -> NDArray[np.bool_]:
    fits: NDArray[np.bool_] = (table[:, : tail.size] == tail).all(axis=1)
    return fits


def _keys(rows: Words) -> NDArray[np.uint64]:
    """Return a 64-bit mix of each row. Should two different rows share one, a tensor is coded word by word."""
    keys = np.zeros(len(rows), np.uint64)
    for column in range(rows.shape[1]):
        keys = (keys ^ rows[:, column]) * _MULTIPLIER
        keys ^= keys >> np.uint64(32)
    return keys
