"""Online mixing of predictions of one binary decision in the logistic domain, in integers.

Each decision is predicted by adaptive probabilities in several contexts and by parametric distributions; two sets of
weights, chosen by two other contexts, add up the logits, and every part learns from what the decision turned out to be.
Encoder and decoder do the same integer arithmetic, so that a stream decodes alike on every machine. The scheme is that
of the PAQ family of compressors (M. Mahoney, Adaptive weighing of context models for lossless data compression, 2005).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import called, inlined, record

from ..tables.logistic import STRETCH_LIMIT
from .binary_coder import Bytes, code_bit
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
# Coefficients of the expected log magnitude: constant, row, column, last eight, neighbours, matrix, earlier matrix.
FIRST_REGRESSION = (0.0, 0.3, 0.3, 0.15, 0.1, 0.1, 0.05)


Decision: TypeAlias = tuple[int, int, int]


class Engine(NamedTuple):
    """What codes decisions: a coder and its bytes, see `binary_coder`; a mixer; and tables, see `tables`."""

    coder: np.record
    data: Bytes
    mixer: np.record
    tables: np.record


def new_mixer(bounds: NDArray[np.int64], kinds: NDArray[np.int64], fields: int, second: int) -> np.record:
    """Return a mixer that knows nothing: equal weights on contexts, a little more on parametric predictions.

    Its fields are

    maps
        uint32: adaptive probabilities with counts; zero where never used.
    used
        uint8: which pieces of ``maps`` are used at all.
    starts
        int64 of shape (nodes, contexts): where in ``maps`` those of a decision in each context begin.
    quick
        int32 of shape (nodes, 1 + `BINS`): probabilities in 1/2**22 that keep adapting at one rate, without a context
        and in one.
    first, second
        int32 of shape (sets, inputs): the weights.
    regression
        float64: see `scales`.
    decisions, rate
        How many decisions there were, and the learning rate of the weights.
    kinds
        int64 of shape (nodes,): what the bits of each decision are counted as. Only for statistics.
    spent
        float64 of shape (fields,): bits that decisions took, by kind. Only for statistics.
    parametric
        float64 of shape (2,): what is told of the next decision, probabilities that the bit is one; the first is also
        what a context that was never seen begins with.
    slots
        int64 of shape (contexts,): the values of the contexts, told as well.
    places, inputs
        Room for where in ``maps`` they are, and for the predictions.

    Parameters
    ----------
    bounds
        int64 of shape (nodes, contexts): how many values each context of each decision has.
    kinds, fields
        What each decision's bits are counted as, and how many kinds there are.
    second
        Number of sets of weights besides those of each decision.
    """
    nodes, contexts = bounds.shape
    ends = np.cumsum(bounds).reshape(bounds.shape)
    pieces = -(-int(ends[-1, -1]) // _PIECE)
    weights = np.concatenate([np.full(contexts, 0.09), np.full(2, 0.12), np.full(2, 0.03)])
    initial = np.rint(weights * _WEIGHT_UNIT).astype(np.int32)
    return record(
        maps=np.zeros(pieces * _PIECE, np.uint32),
        used=np.zeros(pieces, np.uint8),
        starts=ends - bounds,
        quick=np.full((nodes, 1 + BINS), _ONE // 2, np.int32),
        first=np.tile(initial, (nodes, 1)),
        second=np.tile(initial, (second, 1)),
        regression=FIRST_REGRESSION,
        decisions=0,
        rate=0,
        kinds=kinds,
        spent=np.zeros(fields),
        parametric=np.zeros(2),
        slots=np.zeros(contexts, np.int64),
        places=np.zeros(contexts, np.int64),
        inputs=np.zeros_like(initial),
    )


def copied(mixer: np.record) -> np.record:
    """Return a mixer that knows the same and learns for itself."""
    copy = cast(np.record, np.zeros(1, mixer.dtype)[0])
    # Most of the maps is never used.
    pieces = np.flatnonzero(mixer.used)
    copy.maps.reshape(-1, _PIECE)[pieces] = mixer.maps.reshape(-1, _PIECE)[pieces]
    for name in (mixer.dtype.names or ())[1:]:
        copy[name] = mixer[name]
    return copy


@inlined
def slow_down(mixer: np.record) -> None:
    """Set the learning rate, in 1/2**20: 0.0003, and 0.002 more at the beginning."""
    mixer.rate = 315 + 2097 * 20000 // (20000 + mixer.decisions)


@called
def mixed_bit(engine: Engine, bit: int, decision: Decision) -> int:
    """Return the bit that was decoded, or that was encoded, and learn from it.

    Parameters
    ----------
    decision
        Which one it is, the value of the context that keeps adapting, and which further set of weights adds up the
        predictions.
    """
    node, quick_slot, second_set = decision
    mixer, tables = engine.mixer, engine.tables
    slots, places, inputs, parametric = mixer.slots, mixer.places, mixer.inputs, mixer.parametric
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
        one += mixer.first[node, which] * inputs[which]
        other += mixer.second[second_set, which] * inputs[which]
    probability = _squashed((one + other) >> 25, tables)
    bit = code_bit(engine.coder, engine.data, bit, probability)
    mixer.spent[mixer.kinds[node]] += tables.cost[(probability if bit else 65536 - probability) >> 4]
    step_one = ((bit << 16) - _squashed(one >> 24, tables)) * mixer.rate
    step_other = ((bit << 16) - _squashed(other >> 24, tables)) * mixer.rate
    for which in range(inputs.size):
        mixer.first[node, which] += (step_one * inputs[which]) >> 23
        mixer.second[second_set, which] += (step_other * inputs[which]) >> 23
    target = bit << 22
    for context in range(contexts):
        known = int(mixer.maps[places[context]])
        count, chance = known & _COUNT_MASK, known >> _COUNT_BITS
        chance += ((target - chance) * tables.reciprocals[count]) >> 16
        chance = min(max(chance, 1), _ONE - 1)
        mixer.maps[places[context]] = np.uint32(chance << _COUNT_BITS | min(count + 1, _MOST_COUNTED))
    mixer.quick[node, 0] += (target - mixer.quick[node, 0]) * 5 >> 8
    mixer.quick[node, 1 + quick_slot] += (target - mixer.quick[node, 1 + quick_slot]) >> 5
    mixer.decisions += 1
    return bit


@inlined
def _squashed(logit: int, tables: np.record) -> int:
    squashed: int = tables.squash[min(max(logit, -STRETCH_LIMIT), STRETCH_LIMIT) + STRETCH_LIMIT]
    return squashed
