"""Online mixing of predictions of one binary decision in the logistic domain, in integers.

Each decision is predicted by adaptive probabilities in several contexts and by parametric distributions; two sets of
weights, chosen by two other contexts, add up the logits, and every part learns from what the decision turned out to be.
Encoder and decoder do the same integer arithmetic, so that a stream decodes alike on every machine. The scheme is that
of the PAQ family of compressors (M. Mahoney, Adaptive weighing of context models for lossless data compression, 2005).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled

from ..tables.logistic import STRETCH_LIMIT, Tables
from .binary_coder import Bytes, CoderState, code_bit

# Adaptive probabilities keep 22 bits of a probability and a count of up to 1023 decisions in 32 bits.
_COUNT_BITS = 10
_COUNT_MASK = (1 << _COUNT_BITS) - 1
_ONE = 1 << 22
# Weights of the mixer are in 1/2**24, learning rates in 1/2**20, errors in 1/2**16, logits in 1/2**11.
_WEIGHT_UNIT = 1 << 24
_RATE_UNIT = 1 << 20


class Mixer(NamedTuple):
    """Everything that learns.

    Attributes
    ----------
    maps
        uint32 of shape (contexts, nodes, values): adaptive probabilities with counts; zero where never used.
    quick
        int32 of shape (2, nodes, values): probabilities in 1/2**22 that keep adapting at one rate.
    first, second
        int32 of shape (sets, inputs): the weights.
    decisions
        int64 of one element: how many decisions there were.
    reciprocals
        int64: 65536 / (n + 1.6).
    """

    maps: NDArray[np.uint32]
    quick: NDArray[np.int32]
    first: NDArray[np.int32]
    second: NDArray[np.int32]
    decisions: NDArray[np.int64]
    reciprocals: NDArray[np.int64]


def new_mixer(contexts: int, nodes: int, values: int, first: int, second: int) -> Mixer:
    """Return a mixer that knows nothing: equal weights on contexts, a little more on parametric predictions.

    Parameters
    ----------
    contexts, nodes, values
        Number of adaptive contexts, of decisions that are told apart, and of values that a context can have.
    first, second
        Number of sets of weights.
    """
    weights = np.concatenate([np.full(contexts, 0.09), np.full(2, 0.12), np.full(2, 0.03)])
    initial = np.rint(weights * _WEIGHT_UNIT).astype(np.int32)
    return Mixer(
        maps=np.zeros((contexts, nodes, values), np.uint32),
        quick=np.full((2, nodes, values), _ONE // 2, np.int32),
        first=np.tile(initial, (first, 1)),
        second=np.tile(initial, (second, 1)),
        decisions=np.zeros(1, np.int64),
        reciprocals=np.array([655360 // (10 * count + 16) for count in range(1 << _COUNT_BITS)], np.int64),
    )


def copied(mixer: Mixer) -> Mixer:
    """Return a mixer that knows the same and learns for itself."""
    return mixer._replace(
        maps=mixer.maps.copy(),
        quick=mixer.quick.copy(),
        first=mixer.first.copy(),
        second=mixer.second.copy(),
        decisions=mixer.decisions.copy(),
    )


@compiled
def learning_rate(mixer: Mixer) -> int:
    """Return the mixer's rate in 1/2**20: 0.0003, and 0.002 more at the beginning."""
    return int(315 + 2097 * 20000 // (20000 + mixer.decisions[0]))


@compiled
def mixed_bit(
    decoding: bool,
    state: CoderState,
    data: Bytes,
    bit: int,
    parametric: NDArray[np.float64],
    node: int,
    slots: NDArray[np.int64],
    quick_slot: int,
    first_set: int,
    second_set: int,
    rate: int,
    limit: int,
    inputs: NDArray[np.int32],
    mixer: Mixer,
    tables: Tables,
    spent: NDArray[np.float64],
    kind: int,
) -> int:
    """Return the bit that was decoded, or that was encoded, and learn from it.

    Parameters
    ----------
    parametric
        Two probabilities that the bit is one; the first is also what a context that was never seen begins with.
    node, slots, quick_slot, first_set, second_set
        Which decision this is, the values of its contexts, and which sets of weights add up the predictions.
    rate, limit
        Learning rate of the weights, and the count at which adaptive probabilities stop slowing down.
    inputs
        Room for the predictions.
    spent, kind
        Statistics: the bits of the decision are added to ``spent[kind]``.
    """
    contexts = slots.size
    start = min(max(int(parametric[0] * 4194304.0), 8388), 4185916)
    for context in range(contexts):
        entry = mixer.maps[context, node, slots[context]]
        if entry == 0:
            entry = np.uint32(start << _COUNT_BITS | 1)
            mixer.maps[context, node, slots[context]] = entry
        inputs[context] = tables.stretch[np.int64(entry) >> 16]
    for which in range(2):
        inputs[contexts + which] = tables.stretch[min(max(int(parametric[which] * 65536.0), 1), 65535)]
    inputs[contexts + 2] = tables.stretch[mixer.quick[0, node, 0] >> 6]
    inputs[contexts + 3] = tables.stretch[mixer.quick[1, node, quick_slot] >> 6]
    one, other = 0, 0
    for which in range(inputs.size):
        one += int(mixer.first[first_set, which]) * int(inputs[which])
        other += int(mixer.second[second_set, which]) * int(inputs[which])
    probability = _squashed((one + other) >> 25, tables)
    bit = code_bit(decoding, state, data, bit, probability)
    spent[kind] += tables.cost[(probability if bit else 65536 - probability) >> 4]
    step_one = ((bit << 16) - _squashed(one >> 24, tables)) * rate
    step_other = ((bit << 16) - _squashed(other >> 24, tables)) * rate
    for which in range(inputs.size):
        mixer.first[first_set, which] += (step_one * inputs[which]) >> 23
        mixer.second[second_set, which] += (step_other * inputs[which]) >> 23
    target = bit << 22
    for context in range(contexts):
        known = int(mixer.maps[context, node, slots[context]])
        count, chance = known & _COUNT_MASK, known >> _COUNT_BITS
        chance += ((target - chance) * int(mixer.reciprocals[count])) >> 16
        chance = min(max(chance, 1), _ONE - 1)
        mixer.maps[context, node, slots[context]] = np.uint32(chance << _COUNT_BITS | min(count + 1, limit))
    mixer.quick[0, node, 0] += (target - mixer.quick[0, node, 0]) * 5 >> 8
    mixer.quick[1, node, quick_slot] += (target - mixer.quick[1, node, quick_slot]) >> 5
    mixer.decisions[0] += 1
    return bit


@compiled
def _squashed(logit: int, tables: Tables) -> int:
    return int(tables.squash[min(max(logit, -STRETCH_LIMIT), STRETCH_LIMIT) + STRETCH_LIMIT])
