"""Equal blocks of words, found by hashing in linear time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled
from kcomplex.weights import Words

# Odd numbers with well-mixed bits, from splitmix64.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)
_FEWEST_SLOTS = 1 << 10


def block_keys(rows: Words) -> NDArray[np.uint64]:
    """Return a 64-bit mix of each row of words: 0 of zeros. Two different rows hardly ever share one, but may."""
    keys = np.empty(len(rows), np.uint64)
    _mix_rows(np.ascontiguousarray(rows), keys)
    return keys


def label_keys(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return a label for every key, equal ones for equal keys, and how often each label occurs.

    Labels count up from 0 in the order in which keys first occur.
    """
    labels = np.empty(keys.size, np.int32)
    first = np.empty(keys.size, np.int32)
    count = _label(keys, labels, first)
    return labels, np.bincount(labels, minlength=count)


@compiled
def _mix_rows(rows: Words, keys: NDArray[np.uint64]) -> None:
    for i in range(rows.shape[0]):
        key = np.uint64(0)
        for j in range(rows.shape[1]):
            key = (key ^ np.uint64(rows[i, j])) * _STEP
            key ^= key >> _SHIFT
        key *= _MIX
        keys[i] = key ^ (key >> _SHIFT)


@compiled
def _label(keys: NDArray[np.uint64], labels: NDArray[np.int32], first: NDArray[np.int32]) -> int:
    """Fill labels by open addressing: a slot holds a label, ``first`` where its key stands."""
    count = 0
    # Where few keys differ, a table that grows with them stays in the cache.
    slots = np.full(_FEWEST_SLOTS, -1, np.int32)
    for i in range(keys.size):
        key = keys[i]
        place = _slot(key, keys, slots, first)
        if slots[place] < 0:
            if 2 * count >= slots.size:
                slots = np.full(4 * slots.size, -1, np.int32)
                for label in range(count):
                    known = keys[first[label]]
                    slots[_slot(known, keys, slots, first)] = label
                place = _slot(key, keys, slots, first)
            slots[place] = count
            first[count] = i
            count += 1
        labels[i] = slots[place]
    return count


@compiled
def _slot(key: np.uint64, keys: NDArray[np.uint64], slots: NDArray[np.int32], first: NDArray[np.int32]) -> np.uint64:
    """Return the slot that holds the label of a key, or the empty one where it belongs."""
    mask = np.uint64(slots.size - 1)
    place = key & mask
    while slots[place] >= 0 and keys[first[slots[place]]] != key:
        place = (place + np.uint64(1)) & mask
    return place
