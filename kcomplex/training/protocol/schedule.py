"""Schedule: the phases of a training, the learning rate in each, and the rule that ends one early."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import refuse_outside

# Half of a window needs some losses for its noise to be told from its trend.
_SHORTEST_WINDOW = 6


class Phase(StrEnum):
    """What a training is doing."""

    REGULARISE = "regularise"
    FINE_TUNE = "fine_tune"
    FINISHED = "finished"


@dataclass(frozen=True)
class Schedule:
    """Regularised epochs, pruning, fine-tuning of what is left.

    Parameters
    ----------
    epochs
        Regularised epochs, at most.
    fine_tune_epochs
        Epochs after pruning, at most.
    window
        The stopping rule looks at so many objectives, six or more, and may end either phase; 0 trains all epochs.
    min_epochs
        Regularised epochs, at least, however saturated.
    check_every
        Epochs from one check for a turning point to the next; see `Course`.
    learning_rate
        ``cosine`` falls to the floor over each phase; ``constant`` stays.
    warm_up_epochs
        The learning rate rises linearly over the first epochs of the regularised phase.
    lr_floor
        Share of the learning rate that ``cosine`` falls to.
    fine_tune_lr_share
        Share of the learning rate that fine-tuning begins with; quantised networks do better with less.

    Raises
    ------
    SpecError
        A value is out of range.
    """

    epochs: int
    fine_tune_epochs: int = 0
    window: int = 0
    min_epochs: int = 0
    check_every: int = 10
    learning_rate: Literal["cosine", "constant"] = "cosine"
    warm_up_epochs: int = 0
    lr_floor: float = 0.0
    fine_tune_lr_share: float = 1.0

    def __post_init__(self) -> None:
        counts = ("fine_tune_epochs", "window", "min_epochs", "warm_up_epochs")
        refuse_outside(self, epochs="[1, inf)", check_every="[1, inf)", **dict.fromkeys(counts, "[0, inf)"))
        refuse_outside(self, lr_floor="[0, 1]", fine_tune_lr_share="(0, inf)")
        if 0 < self.window < _SHORTEST_WINDOW:
            raise SpecError(f"window must be 0 or at least {_SHORTEST_WINDOW}, not {self.window}")
        if self.warm_up_epochs >= self.epochs:
            raise SpecError(f"warm_up_epochs must be less than epochs ({self.epochs}), not {self.warm_up_epochs}")

    def lr_factor(self, phase: Phase, epochs: float) -> float:
        """Return the share of the learning rate that holds after so many epochs (not only whole ones) of a phase."""
        fine_tuning = phase == Phase.FINE_TUNE
        warm_up = 0 if fine_tuning else self.warm_up_epochs
        share = self.fine_tune_lr_share if fine_tuning else 1.0
        if epochs < warm_up:
            return epochs / warm_up
        if self.learning_rate == "constant":
            return share
        length = (self.fine_tune_epochs if fine_tuning else self.epochs) - warm_up
        travelled = min((epochs - warm_up) / length, 1.0) if length else 1.0
        return share * (self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * travelled)))


@dataclass(frozen=True)
class Verdict:
    """What to do after an epoch, in this order.

    Keep this state of the training; restore the one that was kept; prune, because the regularised phase is over; stop.
    """

    keep: bool = False
    restore: bool = False
    prune: bool = False
    finished: bool = False


@dataclass
class Course:
    """A training's way through its schedule: its phase, the epochs so far, and those before this phase.

    With a window, every `Schedule.check_every` epochs the objective is compared with the one of the check before. Where
    it didn't improve is a turning point; the best of them is remembered, and restored if the phase ends worse.
    """

    schedule: Schedule
    phase: Phase = Phase.REGULARISE
    epoch: int = 0
    begun: int = 0
    _objectives: list[float] = field(default_factory=list)
    _checked: float = math.inf
    _kept: float = math.inf

    def lr_factor_after(self, epochs: float) -> float:
        """Return the share of the learning rate that holds so many epochs from here, in this phase."""
        return self.schedule.lr_factor(self.phase, self.epoch - self.begun + epochs)

    def after_epoch(self, objective: float, settled: bool = True) -> Verdict:
        """Go one epoch on and return what to do.

        Parameters
        ----------
        objective
            What the phase minimises, on held-out data: the loss and, while regularised, the penalty. The loss alone
            would take a network back to where it was larger. NaN is not compared.
        settled
            Whether the mode allows the regularised phase to end before its time.

        Raises
        ------
        SpecError
            The training is finished.
        """
        if self.phase == Phase.FINISHED:
            raise SpecError("the training is finished: nothing comes after its last epoch")
        regularised = self.phase == Phase.REGULARISE
        self.epoch += 1
        self._objectives.append(objective)
        here = len(self._objectives)
        longest = self.schedule.epochs if regularised else self.schedule.fine_tune_epochs
        keep = restore = over = False
        if window := self.schedule.window:
            if here % self.schedule.check_every == 0:
                keep = objective >= self._checked and objective <= self._kept
                self._checked = objective
            if keep:
                self._kept = objective
            shortest = max(window, self.schedule.min_epochs if regularised else 0)
            over = here >= shortest and (settled or not regularised) and saturated(self._objectives[-window:])
            # Not ``objective > kept``: a training that ended with NaN goes back as well.
            restore = (over or here == longest) and self._kept < math.inf and not objective <= self._kept
        if not (over or here == longest):
            return Verdict(keep)
        self.phase = Phase.FINE_TUNE if regularised and self.schedule.fine_tune_epochs else Phase.FINISHED
        self.begun = self.epoch
        self._objectives, self._checked, self._kept = [], math.inf, math.inf
        return Verdict(keep, restore, prune=regularised, finished=self.phase == Phase.FINISHED)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values."""
        return {
            "phase": str(self.phase),
            "epoch": self.epoch,
            "begun": self.begun,
            "objectives": list(self._objectives),
            "checked": self._checked,
            "kept": self._kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.phase, self.epoch, self.begun = Phase(state["phase"]), state["epoch"], state["begun"]
        self._objectives, self._checked, self._kept = list(state["objectives"]), state["checked"], state["kept"]


def saturated(values: ArrayLike, tolerance: float = 1e-10) -> bool:
    """Return whether a sequence no longer falls by more than its own noise; a rising one doesn't fall.

    The second half's mean must be below the first one's by no more than the smaller standard deviation of the halves,
    each freed from its trend by an Epanechnikov-kernel smooth, and the tolerance.

    Parameters
    ----------
    values
        Losses, in order; of an even number, or the first one is left out. Not saturated if one isn't finite.
    tolerance
        In the unit of the values.

    Raises
    ------
    SpecError
        There are fewer than six.
    """
    series = np.asarray(values, float)
    if len(series) < _SHORTEST_WINDOW:
        raise SpecError(f"{len(series)} values are too few to tell noise from a trend: {_SHORTEST_WINDOW} are needed")
    if not np.isfinite(series).all():
        return False
    first, second = np.split(series[len(series) % 2 :], 2)
    noise = min(float(np.std(half - _smooth(half))) for half in (first, second))
    return float(first.mean() - second.mean()) <= noise + tolerance


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return local straight lines through values, weighted by the Epanechnikov kernel over a third of them each way.

    Lines, not means: at the ends of a steep fall a mean would take the fall for noise.
    """
    places = np.arange(len(values), dtype=float)
    distances = places[None] - places[:, None]
    weights = np.maximum(0, 1 - (distances / max(2.0, len(values) / 3)) ** 2)
    total, first, second = (np.sum(weights * distances**power, axis=1) for power in range(3))
    level = weights @ values
    slope = (weights * distances) @ values
    smooth: NDArray[np.float64] = (second * level - first * slope) / (total * second - first**2)
    return smooth
