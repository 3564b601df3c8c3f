"""Schedules: after which optimiser steps a snapshot is due."""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from kcomplex.errors import SpecError

Every: TypeAlias = "str | int | Iterable[int] | None"

_FORMS = (
    "write '1 epoch', '100 steps', 'geometric 1.3', a number of steps, a list of steps, "
    "or None to take snapshots only with capture()"
)


class Schedule(ABC):
    """A set of step numbers. The state before the first step (step 0) is always captured and in no schedule."""

    @abstractmethod
    def next_after(self, step: int) -> int | None:
        """Return the first scheduled step after a step number; None where there is none."""


@dataclass(frozen=True)
class Periodic(Schedule):
    """Every multiple of ``period`` steps."""

    period: int

    def __post_init__(self) -> None:
        if self.period < 1:
            raise SpecError(f"a schedule must have at least 1 step between snapshots, not {self.period}")

    def next_after(self, step: int) -> int:
        """Return the next multiple."""
        return (step // self.period + 1) * self.period


@dataclass(frozen=True)
class Geometric(Schedule):
    """The steps ``floor(base ** k)`` for k = 0, 1, 2, ...: dense at first, then ever sparser."""

    base: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base) and self.base > 1):
            raise SpecError(f"a geometric schedule needs a finite factor above 1, not {self.base}")

    def next_after(self, step: int) -> int:
        """Return the next ``floor(base ** k)``."""
        # The logarithm may be off by a rounding error; the powers decide.
        exponent = max(0, math.ceil(math.log(step + 1) / math.log(self.base)) - 1)
        while math.floor(self.base**exponent) <= step:
            exponent += 1
        return math.floor(self.base**exponent)


@dataclass(frozen=True)
class Explicit(Schedule):
    """Exactly these steps, in increasing order; none at all means that every snapshot is asked for."""

    steps: tuple[int, ...] = ()

    def next_after(self, step: int) -> int | None:
        """Return the next listed step."""
        position = bisect_right(self.steps, step)
        return self.steps[position] if position < len(self.steps) else None


def parse_schedule(every: Every, steps_per_epoch: int | None = None) -> Schedule:
    """Return the schedule that ``every`` describes.

    Parameters
    ----------
    every
        ``"1 epoch"``, ``"2 epochs"``, ``"100 steps"``, ``"geometric 1.3"``, a number of steps, step numbers, or None.
    steps_per_epoch
        Optimiser steps in an epoch; needed where ``every`` counts epochs.

    Raises
    ------
    SpecError
        The text makes no sense, a number is out of range, or ``steps_per_epoch`` is missing.
    """
    if steps_per_epoch is not None and _whole(steps_per_epoch, "steps_per_epoch") < 1:
        raise SpecError(f"steps_per_epoch must be at least 1, not {steps_per_epoch}")
    plain = plain_every(every)
    if isinstance(plain, str):
        return _parse_text(plain, steps_per_epoch)
    if isinstance(plain, int):
        return Periodic(plain)
    return Explicit(plain or ())


def plain_every(every: Every) -> str | int | tuple[int, ...] | None:
    """Return what describes a schedule in Python's own types: step numbers sorted, each one once.

    Raises
    ------
    SpecError
        Something isn't a step number.
    """
    if every is None or isinstance(every, str):
        return every
    if not isinstance(every, Iterable):
        return _whole(every, f"every={every!r}")
    steps = {_whole(step, f"every={every!r}") for step in every}
    if any(step < 0 for step in steps):
        raise SpecError(f"every={every!r} lists a negative step")
    return tuple(sorted(steps))


def _parse_text(text: str, steps_per_epoch: int | None) -> Schedule:
    if match := re.fullmatch(r"\s*(\d+)\s*(epoch|step)s?\s*", text):
        count = int(match[1])
        if match[2] == "step":
            return Periodic(count)
        if steps_per_epoch is None:
            raise SpecError(f"every={text!r} counts epochs: give steps_per_epoch too, such as len(train_loader)")
        return Periodic(count * steps_per_epoch)
    if match := re.fullmatch(r"\s*geometric\s+(\S+)\s*", text):
        try:
            return Geometric(float(match[1]))
        except ValueError as error:
            raise SpecError(f"every={text!r}: {error if isinstance(error, SpecError) else _FORMS}") from None
    raise SpecError(f"every={text!r} isn't a schedule: {_FORMS}")


def _whole(value: object, where: str) -> int:
    """Return an integer of any integer type; booleans and floats aren't step numbers."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise SpecError(f"{where}: {value!r} isn't a whole number of steps: {_FORMS}")
