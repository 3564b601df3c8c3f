"""Online mixing of predictions of one binary decision in the logistic domain, in integers.

Each decision is predicted by adaptive probabilities in several contexts and by parametric distributions; two sets of
weights, chosen by two other contexts, add up the logits, and every part learns from what the decision turned out to be.
Encoder and decoder do the same integer arithmetic, so that a stream decodes alike on every machine. The scheme is that
of the PAQ family of compressors (M. Mahoney, Adaptive weighing of context models for lossless data compression, 2005).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import inlined

from ..tables.logistic import STRETCH_LIMIT, Tables
from .binary_coder import Bytes, CoderState, code_bit
from .bins import BINS

# Adaptive probabilities keep 22 bits of a probability and a count of up to 1023 decisions in 32 bits; at 255 decisions
# they stop slowing down.
_COUNT_BITS = 10
_COUNT_MASK = (1 << _COUNT_BITS) - 1
_MOST_COUNTED = 255
_ONE = 1 << 22
# Weights of the mixer are in 1/2**24, learning rates in 1/2**20, errors in 1/2**16, logits in 1/2**11.
_WEIGHT_UNIT = 1 << 24
# Predictions besides those of contexts: two parametric ones, two probabilities that keep adapting at one rate.
_FURTHER = 4
# What a copy leaves out is told in pieces of so many adaptive probabilities.
_PIECE_BITS = 8
_PIECE = 1 << _PIECE_BITS
_DECISIONS, _RATE = 0, 1


class Mixer(NamedTuple):
    """Everything that learns.

    Attributes
    ----------
    maps
        uint32: adaptive probabilities with counts; zero where never used.
    starts
        int64 of shape (nodes, contexts): where in ``maps`` those of a decision in each context begin.
    used
        uint8: which pieces of ``maps`` are used at all.
    quick
        int32 of shape (nodes, 1 + `BINS`): probabilities in 1/2**22 that keep adapting at one rate, without a context
        and in one.
    first, second
        int32 of shape (sets, inputs): the weights.
    progress
        int64: how many decisions there were, and the learning rate of the weights.
    kinds
        int64 of shape (nodes,): what the bits of each decision are counted as. Only for statistics.
    reciprocals
        int64: 65536 / (n + 1.6).
    """

    maps: NDArray[np.uint32]
    starts: NDArray[np.int64]
    used: NDArray[np.uint8]
    quick: NDArray[np.int32]
    first: NDArray[np.int32]
    second: NDArray[np.int32]
    progress: NDArray[np.int64]
    kinds: NDArray[np.int64]
    reciprocals: NDArray[np.int64]


class Engine(NamedTuple):
    """What codes decisions: a coder, a mixer, and what is told them of the next decision.

    Attributes
    ----------
    decoding
        Whether decisions are read from the data instead of written.
    state, data
        See `binary_coder`.
    parametric
        float64 of shape (2,): probabilities that the bit is one; the first is also what a context that was never seen
        begins with.
    slots
        int64 of shape (contexts,): the values of the contexts.
    places, inputs
        Room for where in `Mixer.maps` they are (int64), and for the predictions (int32).
    spent
        float64, by kind: bits that decisions took. Only for statistics.
    """

    decoding: bool
    state: CoderState
    data: Bytes
    mixer: Mixer
    tables: Tables
    parametric: NDArray[np.float64]
    slots: NDArray[np.int64]
    places: NDArray[np.int64]
    inputs: NDArray[np.int32]
    spent: NDArray[np.float64]


def new_mixer(bounds: NDArray[np.int64], kinds: NDArray[np.int64], second: int) -> Mixer:
    """Return a mixer that knows nothing: equal weights on contexts, a little more on parametric predictions.

    Parameters
    ----------
    bounds
        int64 of shape (nodes, contexts): how many values each context of each decision has.
    kinds
        See `Mixer.kinds`.
    second
        Number of sets of weights besides those of each decision.
    """
    nodes, contexts = bounds.shape
    ends = np.cumsum(bounds).reshape(bounds.shape)
    pieces = -(-int(ends[-1, -1]) // _PIECE)
    weights = np.concatenate([np.full(contexts, 0.09), np.full(2, 0.12), np.full(2, 0.03)])
    initial = np.rint(weights * _WEIGHT_UNIT).astype(np.int32)
    return Mixer(
        maps=np.zeros(pieces * _PIECE, np.uint32),
        starts=ends - bounds,
        used=np.zeros(pieces, np.uint8),
        quick=np.full((nodes, 1 + BINS), _ONE // 2, np.int32),
        first=np.tile(initial, (nodes, 1)),
        second=np.tile(initial, (second, 1)),
        progress=np.zeros(2, np.int64),
        kinds=kinds,
        reciprocals=_reciprocals(),
    )


@lru_cache(maxsize=1)
def _reciprocals() -> NDArray[np.int64]:
    return np.array([655360 // (10 * count + 16) for count in range(1 << _COUNT_BITS)], np.int64)


def copied(mixer: Mixer) -> Mixer:
    """Return a mixer that knows the same and learns for itself."""
    # Most of the maps is never used: fresh zeros cost nothing until they are.
    maps, pieces = np.zeros(mixer.maps.size, np.uint32), np.flatnonzero(mixer.used)
    maps.reshape(-1, _PIECE)[pieces] = mixer.maps.reshape(-1, _PIECE)[pieces]
    return mixer._replace(
        maps=maps,
        used=mixer.used.copy(),
        quick=mixer.quick.copy(),
        first=mixer.first.copy(),
        second=mixer.second.copy(),
        progress=mixer.progress.copy(),
    )


def new_engine(
    decoding: bool, state: CoderState, data: Bytes, mixer: Mixer, tables: Tables, spent: NDArray[np.float64]
) -> Engine:
    """Return what codes decisions with a mixer."""
    contexts = mixer.starts.shape[1]
    return Engine(
        decoding,
        state,
        data,
        mixer,
        tables,
        parametric=np.zeros(2),
        slots=np.zeros(contexts, np.int64),
        places=np.zeros(contexts, np.int64),
        inputs=np.zeros(contexts + _FURTHER, np.int32),
        spent=spent,
    )


@inlined
def slow_down(mixer: Mixer) -> None:
    """Set the learning rate, in 1/2**20: 0.0003, and 0.002 more at the beginning."""
    mixer.progress[_RATE] = 315 + 2097 * 20000 // (20000 + mixer.progress[_DECISIONS])


@inlined
def mixed_bit(engine: Engine, bit: int, node: int, quick_slot: int, second_set: int) -> int:
    """Return the bit that was decoded, or that was encoded, and learn from it.

    Parameters
    ----------
    node, quick_slot, second_set
        Which decision this is, the value of the context that keeps adapting, and which further set of weights adds up
        the predictions.
    """
    mixer, tables, parametric = engine.mixer, engine.tables, engine.parametric
    slots, places, inputs = engine.slots, engine.places, engine.inputs
    contexts = slots.size
    start = min(max(int(parametric[0] * 4194304.0), 8388), 4185916)
    for context in range(contexts):
        place = mixer.starts[node, context] + slots[context]
        places[context] = place
        entry = mixer.maps[place]
        if entry == 0:
            entry = np.uint32(start << _COUNT_BITS | 1)
            mixer.maps[place] = entry
            mixer.used[place >> _PIECE_BITS] = 1
        inputs[context] = tables.stretch[np.int64(entry) >> 16]
    for which in range(2):
        inputs[contexts + which] = tables.stretch[min(max(int(parametric[which] * 65536.0), 1), 65535)]
    inputs[contexts + 2] = tables.stretch[mixer.quick[node, 0] >> 6]
    inputs[contexts + 3] = tables.stretch[mixer.quick[node, 1 + quick_slot] >> 6]
    one, other = 0, 0
    for which in range(inputs.size):
        one += int(mixer.first[node, which]) * int(inputs[which])
        other += int(mixer.second[second_set, which]) * int(inputs[which])
    probability = _squashed((one + other) >> 25, tables)
    bit = code_bit(engine.decoding, engine.state, engine.data, bit, probability)
    engine.spent[mixer.kinds[node]] += tables.cost[(probability if bit else 65536 - probability) >> 4]
    rate = mixer.progress[_RATE]
    step_one = ((bit << 16) - _squashed(one >> 24, tables)) * rate
    step_other = ((bit << 16) - _squashed(other >> 24, tables)) * rate
    for which in range(inputs.size):
        mixer.first[node, which] += (step_one * inputs[which]) >> 23
        mixer.second[second_set, which] += (step_other * inputs[which]) >> 23
    target = bit << 22
    for context in range(contexts):
        known = int(mixer.maps[places[context]])
        count, chance = known & _COUNT_MASK, known >> _COUNT_BITS
        chance += ((target - chance) * int(mixer.reciprocals[count])) >> 16
        chance = min(max(chance, 1), _ONE - 1)
        mixer.maps[places[context]] = np.uint32(chance << _COUNT_BITS | min(count + 1, _MOST_COUNTED))
    mixer.quick[node, 0] += (target - mixer.quick[node, 0]) * 5 >> 8
    mixer.quick[node, 1 + quick_slot] += (target - mixer.quick[node, 1 + quick_slot]) >> 5
    mixer.progress[_DECISIONS] += 1
    return bit


@inlined
def _squashed(logit: int, tables: Tables) -> int:
    return int(tables.squash[min(max(logit, -STRETCH_LIMIT), STRETCH_LIMIT) + STRETCH_LIMIT])
