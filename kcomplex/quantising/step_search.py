"""The largest steps of quantisation that still meet a wish: one for all tensors first, then one for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from kcomplex.errors import WeightsError

Steps: TypeAlias = Mapping[str, float]

DEFAULT_ESTIMATOR = "grid|context"
EVALUATIONS = 100
WITHIN = 0.01

# Bisection ends where the step is known to a part of an octave: half a percent for what is cheap to compute, two where
# each trial costs an evaluation.
FINE, COARSE = 0.0075, 0.03
# Without a better idea a step is moved by so many octaves, and by no more whatever the prediction.
_MOVE, _LONGEST_MOVE = 1.0, 3.0
# A prediction is overshot by this, so that the boundary is soon enclosed.
_OVERSHOOT = 0.1
# No tensor's step moves further than this from its neighbours' in one go, in octaves.
_MOST_CHANGE = 2.0
# What is left to search for the common factor of steps once they are shared out.
_RESERVE = 8
_WIDENED = (2**0.25, 2**0.5)


class Probe(NamedTuple):
    """What a trial at one place told: whether the wish is met there, and where the boundary may be (NaN: no idea)."""

    met: bool
    predicted: float = math.nan


def boundary(
    probe: Callable[[float], Probe | None], start: float, lowest: float, highest: float, resolution: float
) -> float | None:
    """Return the greatest place found where a wish is met that is met below some place and not above it.

    Parameters
    ----------
    probe
        Tells about a place; None ends the search with what was found.
    start, lowest, highest
        Where to begin, and the ends of the search.
    resolution
        Distance from the boundary that is near enough.

    Returns
    -------
    float or None
        None where the wish is met nowhere.
    """
    met = missed = math.nan
    place = min(max(start, lowest), highest)
    while (told := probe(place)) is not None:
        if told.met:
            met = place
        else:
            missed = place
        if met >= highest or missed <= lowest or missed - met <= resolution:
            break
        place = min(max(_next(place, told.predicted, met, missed), lowest), highest)
    return None if math.isnan(met) else met


def _next(place: float, predicted: float, met: float, missed: float) -> float:
    move = predicted - place
    move = _MOVE if math.isnan(move) else min(abs(move), _LONGEST_MOVE) + _OVERSHOOT
    if math.isnan(missed):
        return place + move
    if math.isnan(met):
        return place - move
    margin = 0.15 * (missed - met)
    return predicted if met + margin <= predicted <= missed - margin else (met + missed) / 2


@dataclass(frozen=True)
class Outcome:
    """Steps that meet the wish, the loss with them, and the length of the code in bits."""

    steps: Steps
    loss: float
    bits: float


class LossSearch:
    """Looks for the shortest code whose loss is within a limit.

    Parameters
    ----------
    evaluate
        Returns the loss with the tensors quantised at these steps; NaN and infinity count as too much.
    total_bits, tensor_bits
        Return the length of the whole code, and of one tensor at a step.
    baseline, limit
        The loss of the weights as they are, and the largest that is allowed.
    evaluations
        How many times `evaluate` may be called.
    """

    def __init__(
        self,
        evaluate: Callable[[Steps], float],
        total_bits: Callable[[Steps], float],
        tensor_bits: Callable[[str, float], float],
        baseline: float,
        limit: float,
        evaluations: int,
    ) -> None:
        self._evaluate = evaluate
        self._total_bits = total_bits
        self._tensor_bits = tensor_bits
        self._baseline, self._limit = baseline, limit
        self._left = evaluations
        self._best: Outcome | None = None

    def run(self, units: list[Steps], lowest: float, highest: float, start: float, sizes: Mapping[str, int]) -> Outcome:
        """Return the best outcome that was found.

        Parameters
        ----------
        units
            Ways to share one global factor: a step for each tensor at the factor 1.
        lowest, highest, start
            Of the global factor's logarithm to the base of 2.
        sizes
            Number of weights of each tensor.

        Raises
        ------
        WeightsError
            No step keeps the loss within the limit.
        """
        for unit in units:
            self._scale(unit, lowest, highest, start)
        if self._best is None:
            raise WeightsError(
                f"no step keeps the loss within {self._limit:.6g} (it is {self._baseline:.6g} without quantisation): "
                "allow more loss or more evaluations, or keep the weights by a lossless code"
            )
        names = sorted(self._best.steps, key=lambda name: (-sizes[name], name))
        before = math.inf
        while self._left and self._best.bits < before:
            before = self._best.bits
            self._coarsen(self._share_out(names, sizes))
        return self._best

    def _loss(self, steps: Steps) -> float | None:
        if not self._left:
            return None
        self._left -= 1
        return self._evaluate(steps)

    def _within(self, loss: float) -> bool:
        return math.isfinite(loss) and loss <= self._limit

    def _keep(self, steps: Steps, loss: float) -> bool:
        """Take steps for the best so far where their code is shorter, and return whether it is."""
        bits = self._total_bits(steps)
        if self._best is None or bits < self._best.bits:
            self._best = Outcome(dict(steps), loss, bits)
            return True
        return False

    def _scale(self, unit: Steps, lowest: float, highest: float, start: float) -> None:
        """Search for the largest common factor of the steps."""
        losses: dict[float, float] = {}

        def probe(place: float) -> Probe | None:
            loss = self._loss(_scaled(unit, place))
            if loss is None:
                return None
            losses[place] = loss
            share = (self._limit - self._baseline) / (loss - self._baseline) if loss > self._baseline else math.nan
            # Loss grows with the square of small steps.
            return Probe(self._within(loss), place + math.log2(share) / 2 if 0 < share < math.inf else math.nan)

        found = boundary(probe, start, lowest, highest, COARSE)
        if found is not None:
            self._keep(_scaled(unit, found), losses[found])

    def _share_out(self, names: list[str], sizes: Mapping[str, int]) -> list[str]:
        """Give each tensor the step at which a bit costs the same loss everywhere; return names, cheapest first.

        The squared step of a tensor is made proportional to the bits that a coarser one saves, over the loss that it
        adds.
        """
        best = self._best
        assert best is not None
        least = max(self._limit - self._baseline, 0.0) / 100 or math.ulp(1.0)
        rates: dict[str, float] = {}
        for name in names[: max(self._left - _RESERVE, 0)] if len(names) > 1 else ():
            coarse = 2 * best.steps[name]
            loss = self._loss({**best.steps, name: coarse})
            assert loss is not None
            harm = max(loss - best.loss, least) if math.isfinite(loss) else math.inf
            saved = max(self._tensor_bits(name, best.steps[name]) - self._tensor_bits(name, coarse), 1.0)
            rates[name] = saved / harm
        positive = {name: math.log2(rate) / 2 for name, rate in rates.items() if rate > 0}
        if positive:
            measured = sum(sizes[name] for name in positive)
            middle = math.fsum(sizes[name] * octaves for name, octaves in positive.items()) / measured
            changes = dict.fromkeys(rates, -_MOST_CHANGE)
            for name, octaves in positive.items():
                changes[name] = min(max(octaves - middle, -_MOST_CHANGE), _MOST_CHANGE)
            shared = {name: step * 2 ** changes.get(name, 0.0) for name, step in best.steps.items()}
            self._scale(shared, -_LONGEST_MOVE, _LONGEST_MOVE, 0.0)
        return sorted(names, key=lambda name: (-rates.get(name, 0.0), name))

    def _coarsen(self, names: list[str]) -> None:
        """Widen one tensor's step after the other, and all steps at once, as long as that stays within the limit.

        Loss isn't monotone: a wider step may do where a narrower one doesn't.
        """
        moves = [(group, factor) for group in [*((name,) for name in names), names] for factor in _WIDENED]
        again = True
        while again:
            again = False
            for group, factor in moves:
                assert self._best is not None
                steps = {**self._best.steps, **{name: factor * self._best.steps[name] for name in group}}
                loss = self._loss(steps)
                if loss is None:
                    return
                if self._within(loss) and self._keep(steps, loss):
                    again = True


def _scaled(unit: Steps, place: float) -> dict[str, float]:
    return {name: step * 2**place for name, step in unit.items()}


def mean_square_probe(error: Callable[[float], float], limit: float) -> Callable[[float], Probe]:
    """Return a probe of places (logarithms of a step to the base of 2) whose mean squared error is within a limit."""

    def probe(place: float) -> Probe:
        found = error(place)
        share = limit / found if found > 0 else math.nan
        return Probe(found <= limit, place + math.log2(share) / 2 if 0 < share < math.inf else math.nan)

    return probe


def length_probe(bits: Callable[[float], float], limit: float) -> Callable[[float], Probe]:
    """Return a probe of places (logarithms of one over a step) whose bits a weight are within a limit."""

    def probe(place: float) -> Probe:
        found = bits(place)
        return Probe(found <= limit, place + limit - found)

    return probe
