"""The codebook that makes a network's repeated blocks short without changing a bit of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcomplex.weights import TensorHandle, Words, values_of, words_of

from ..tables.alphabet import alphabet
from ..tables.block_labels import block_keys, label_keys
from ..tables.codebook import bits_of

# Block sizes that are tried where none is given, and how many words of all tensors they are tried on.
LARGEST_FOUND = 64
_SAMPLED_WORDS = 1 << 22
# A tensor is tried whole at a size if, first of a small share of all tensors' blocks and then of a larger one, some of
# its own repeat one, and if their entropy is at most some of their words'. What is shorter as a mosaic shows itself
# even in a sixteenth: it has fewer distinct blocks than half of all.
_FIRST_SHARE, _SECOND_SHARE = 1 / 16, 1 / 4
_SAMPLED_BLOCKS, _FEWEST_BLOCKS = 1 << 10, 64
_REPEATING, _SHORTER = 1 / 32, 0.9


@dataclass(frozen=True)
class _Sample:
    """The beginning of a tensor: its words, and the bit patterns of its values."""

    words: Words
    patterns: Words

    @cached_property
    def length(self) -> float:
        """What they cost word by word."""
        return _word_length(self.words)

    @property
    def word_bits(self) -> int:
        return 8 * self.words.itemsize


def best_block_size(groups: Sequence[Sequence[TensorHandle]]) -> int | None:
    """Return the weights a block at which repeated blocks make tensors shortest; None where they do at no size.

    Lengths are those of `repeated_blocks`, on the beginning of each tensor where there are more than 4 million weights.
    Linear in the weights: blocks are hashed, and a size is tried on those tensors alone in which some blocks of it
    repeat.

    Parameters
    ----------
    groups
        Tensors whose values are of one dtype each, float32 and float64: each group has a codebook of its own.
    """
    total = sum(handle.elements for group in groups for handle in group)
    share = min(1.0, _SAMPLED_WORDS / max(total, 1))
    samples = [_samples(group, share) for group in groups]
    best, saved = None, 0.0
    # Blocks whose parts don't repeat don't repeat: for each size those tensors in which blocks of a divisor do.
    repeating = {1: samples}
    for size in range(2, LARGEST_FOUND + 1):
        divisor = next((size // prime for prime in range(2, size) if size % prime == 0), 1)
        repeating[size], found = [], 0.0
        for group in repeating[divisor]:
            repeats, shorter = _promising(group, size, _FIRST_SHARE)
            repeating[size].append(repeats)
            found += _saved(_promising(shorter, size, _SECOND_SHARE)[1], size)
        if found > saved:
            best, saved = size, found
    return best


def _samples(group: Sequence[TensorHandle], share: float) -> list[_Sample]:
    """Return the beginnings of tensors, without those in which hardly a word, and so no block, occurs twice."""
    heads = [handle.read_range(0, int(handle.elements * share)) for handle in group]
    patterns = [bits_of(values_of(head)) for head in heads]
    keys = _sampled_keys([words[:, None] for words in patterns], _FIRST_SHARE)
    labels, counts = _labelled(keys)
    return [
        _Sample(words_of(head), words)
        for head, words, part, own in zip(heads, patterns, keys, labels, strict=True)
        if _repeats(part, counts[own])
    ]


def _promising(group: Sequence[_Sample], size: int, share: float) -> tuple[list[_Sample], list[_Sample]]:
    """Return the tensors whose first blocks repeat, and those that may be shorter as a mosaic than as words."""
    if not group:
        return [], []
    keys = _sampled_keys([_blocks(sample.patterns, size)[0] for sample in group], share)
    labels, counts = _labelled(keys)
    costs = np.log2(counts.sum() / counts)
    repeating, shorter = [], []
    for sample, part, own in zip(group, keys, labels, strict=True):
        if _repeats(part, counts[own]):
            repeating.append(sample)
            # Of all blocks, the indices are no shorter than the first ones', and the distinct ones no fewer.
            indices = float(costs[own].sum()) / part.size * (sample.patterns.size // size)
            motifs = sample.word_bits * size * float((1.0 / counts[own]).sum())
            if indices <= _SHORTER * sample.length and indices + motifs <= sample.length:
                shorter.append(sample)
    return repeating, shorter


def _sampled_keys(blocks: Sequence[Words], share: float) -> list[NDArray[np.uint64]]:
    """Return the keys of the first blocks of each tensor."""
    share = min(1.0, max(share, _SAMPLED_BLOCKS / max(sum(map(len, blocks)), 1)))
    return [block_keys(rows[: max(int(share * len(rows)), _FEWEST_BLOCKS)]) for rows in blocks]


def _repeats(keys: NDArray[np.uint64], uses: NDArray[np.int64]) -> bool:
    """Return whether many blocks are used several times, zero left aside."""
    return bool(np.count_nonzero((uses > 1) & (keys != 0)) > _REPEATING * keys.size)


def _saved(group: Sequence[_Sample], size: int) -> float:
    """Return the bits that tensors save as blocks of a size; none where that is longer than their words."""
    if not group:
        return 0.0
    labels, counts = _labelled([block_keys(_blocks(sample.patterns, size)[0]) for sample in group])
    costs = np.log2(counts.sum() / counts)
    saved = 0.0
    for sample, own in zip(group, labels, strict=True):
        blocks = float((1.0 / counts[own]).sum()) + (sample.patterns.size % size > 0)
        saved += max(0.0, sample.length - float(costs[own].sum()) - sample.word_bits * size * blocks)
    return saved


def _labelled(keys: Sequence[NDArray[np.uint64]]) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """Return the labels of each tensor's keys, and how often every label occurs in all of them."""
    labels, counts = label_keys(np.concatenate([np.zeros(0, np.uint64), *keys]))
    return np.split(labels, np.cumsum([part.size for part in keys], dtype=np.intp))[:-1], counts


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
    keys = block_keys(table)
    order = np.argsort(keys, kind="stable")
    rows = np.empty(len(full), np.intp)
    # Most tensors that aren't a mosaic show it at once.
    for start, stop in ((0, _FEWEST_BLOCKS), (_FEWEST_BLOCKS, len(full))):
        part = full[start:stop]
        position = np.minimum(np.searchsorted(keys[order], block_keys(part)), len(table) - 1)
        rows[start:stop] = order[position]
        if not np.array_equal(table[rows[start:stop]], part):
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
    handles = [handle for handle in tensors if handle.elements >= block_size]
    if not handles:
        return np.zeros((0, block_size), dtype)
    keys = [block_keys(_blocks(bits_of(handle.values()).reshape(-1), block_size)[0]) for handle in handles]
    labels, counts = _labelled(keys)
    zero = np.zeros(counts.size, np.bool_)
    for own, part in zip(labels, keys, strict=True):
        zero[own[part == 0]] = True
    kept = _worthwhile(handles, dict(enumerate(labels)), zero, block_size)
    return _collect([(handles[index], labels[index]) for index in kept], zero, block_size, dtype)


def _worthwhile(
    handles: Sequence[TensorHandle], labels: dict[int, NDArray[np.int32]], zero: NDArray[np.bool_], block_size: int
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
    found = alphabet(words, words.size) if words.itemsize <= 2 else None
    counts = label_keys(block_keys(words[:, None]))[1] if found is None else found[1]
    entropy = float((counts * np.log2(words.size / counts)).sum())
    return min(8.0 * words.nbytes, entropy + 8.0 * words.itemsize * len(counts))


def _collect(
    kept: Sequence[tuple[TensorHandle, NDArray[np.int32]]],
    zero: NDArray[np.bool_],
    block_size: int,
    dtype: np.dtype[Any],
) -> NDArray[np.floating[Any]]:
    seen = zero.copy()
    pieces = [np.zeros((1, block_size), f"u{dtype.itemsize}")]
    tails = []
    for handle, labels in kept:
        full, tail = _blocks(bits_of(handle.values()).reshape(-1), block_size)
        first = np.full(zero.size, -1)
        # The last that is written is the block that comes first.
        first[labels[::-1]] = np.arange(labels.size)[::-1]
        pieces.append(full[first[(first >= 0) & ~seen]])
        seen |= first >= 0
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
