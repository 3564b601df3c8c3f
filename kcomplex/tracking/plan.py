"""The plan of a tracker: when it captures what, what that is measured with, and what is kept."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from kcomplex.errors import KComplexError, RunError, SpecError
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import INITIAL, given_of
from kcomplex.estimators.pipeline import build_estimator, build_estimators
from kcomplex.estimators.relative import GivenCode
from kcomplex.tracking.schedule import Schedule, parse_schedule
from kcomplex.tracking.snapshot import Selection
from kcomplex.tracking.store import Keep


@dataclass(frozen=True)
class Plan:
    """What a tracker does, and when.

    Parameters
    ----------
    every, steps_per_epoch
        Schedule of the snapshots; see `parse_schedule`.
    selection
        Which tensors are captured.
    keep
        Which snapshots' files stay once they are measured: the first and the last (``ends``), ``all`` or ``none``.
    max_pending_bytes
        Raw size of the snapshots that may wait for being measured.
    measure
        Whether a process measures beside the training.
    given
        What that may open or call for it; see `named_given`.

    Raises
    ------
    SpecError
        A value makes no sense.
    """

    every: str | int | tuple[int, ...] | None
    steps_per_epoch: int | None
    selection: Selection
    keep: Keep
    max_pending_bytes: int
    measure: bool
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise SpecError(f"keep must be one of {', '.join(get_args(Keep))}, not {self.keep!r}")
        if self.max_pending_bytes < 0:
            raise SpecError(f"max_pending_bytes must be 0 or more, not {self.max_pending_bytes}")
        self.schedule()

    def schedule(self) -> Schedule:
        """Return the schedule of the snapshots."""
        return parse_schedule(self.every, self.steps_per_epoch)

    def epoch(self, step: int) -> float | None:
        """Return how many epochs a number of steps is; None where unknown."""
        return step / self.steps_per_epoch if self.steps_per_epoch else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in plain values, as the run store keeps it."""
        return {
            "every": self.every,
            "steps_per_epoch": self.steps_per_epoch,
            "include": self.selection.include,
            "exclude": self.selection.exclude,
            "trainable": self.selection.trainable,
            "keep": self.keep,
            "max_pending_bytes": self.max_pending_bytes,
        }


def estimator_specs(estimators: str | Estimator | Iterable[str | Estimator]) -> tuple[str, ...]:
    """Return the canonical specifications of estimators, each one once.

    Raises
    ------
    SpecError, UnknownNameError, PluginError
        An estimator can't be built, or there is none.
    """
    specs = tuple(dict.fromkeys(estimator.spec for estimator in build_estimators(estimators)))
    # Only the specification reaches the measuring process: an estimator that isn't registered must fail here.
    for spec in specs:
        build_estimator(spec)
    if not specs:
        raise SpecError("a run needs at least one estimator, such as 'zstd'")
    return specs


def named_given(specs: Iterable[str]) -> tuple[str, ...]:
    """Return the checkpoints and recipes that specifications name, but for the run's own first snapshot."""
    found = []
    for spec in specs:
        # What can't be built is told of each snapshot, and opens nothing.
        with suppress(KComplexError):
            estimator = build_estimator(spec)
            if isinstance(estimator, GivenCode) and estimator.given.text != INITIAL:
                found.append(estimator.given.text)
    return tuple(found)


def check_given(specs: Iterable[str], given: Iterable[str], run: Path) -> None:
    """Check that the specifications of a run name nothing but what its user has given in this call.

    Raises
    ------
    RunError
        They do.
    """
    allowed = [given_of(text).text for text in given]
    for text in named_given(specs):
        if text not in allowed:
            raise RunError(
                f"{run}: the run store says to measure given {text[:200]!r}, which opens that, or imports and calls "
                "it: if you trust whoever made the run, give the same again"
            )
