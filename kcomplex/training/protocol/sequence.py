"""Sequence: one mode until fine-tuning begins, a second one on top of it from then on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import build, split_stages
from kcomplex.training.protocol.mode import Evaluate, Mode, ParameterGroups


@dataclass(frozen=True)
class Sequence(Mode):
    """Prunes, say, and quantises what is left: ``pmmp:bits_per_parameter=8|uniform_qat:bits=4``.

    The first mode does what it always does. When fine-tuning begins, the second one is attached to the same model and
    works on top of it: what was pruned stays pruned beneath a quantiser that maps zero to zero.

    Parameters
    ----------
    first, second
        Neither is attached yet. The second one's own fine-tuning never begins.

    Raises
    ------
    SpecError
        One of them is a sequence.

    Notes
    -----
    `begin_fine_tuning` adds what the second mode trains to `parameter_groups`, for an optimiser that is made anew or
    takes the new groups in. Load this mode's state before the model's: it attaches the second mode where that is due.
    """

    first: Mode
    second: Mode
    name: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        if isinstance(self.first, Sequence) or isinstance(self.second, Sequence):
            raise SpecError("a sequence has two modes: the second one begins with fine-tuning, and no third one would")

    @property
    def spec(self) -> str:
        """Specification string that builds this sequence again."""
        return f"{self.first.spec}|{self.second.spec}"

    def with_samples(self, samples: int) -> Sequence:
        """Return the sequence of both modes with the number of training samples; see `Mode.with_samples`."""
        return dataclasses.replace(
            self, first=self.first.with_samples(samples), second=self.second.with_samples(samples)
        )

    def attach(self, model: nn.Module) -> set[int]:
        """Attach the first mode to a model; return the parameters that the second one finds, none yet."""
        self.first.prepare(model)
        return set()

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> ParameterGroups:
        """Return the first mode's groups and, while fine-tuning, those with what the second mode adds."""
        groups = self.first.parameter_groups(lr, weight_decay)
        if not self.second.attached:
            return groups
        # The second mode may have put parameters of its own into the model, where the first one takes them for weights.
        added = {id(parameter) for parameter in self.model.parameters()} - self.state
        groups = [_without(group, added) for group in groups]
        known = {id(parameter) for group in groups for parameter in group["params"]}
        return [*groups, *(_without(group, known) for group in self.second.parameter_groups(lr, weight_decay))]

    def penalty(self) -> torch.Tensor:
        """Return the sum of the attached modes' penalties."""
        penalty = self.first.penalty()
        return penalty + self.second.penalty() if self.second.attached else penalty

    def after_step(self) -> None:
        """Let the attached modes do so, in order."""
        for mode in self._active:
            mode.after_step()

    def after_epoch(self) -> None:
        """Let the attached modes do so, in order."""
        for mode in self._active:
            mode.after_epoch()

    def settled(self) -> bool:
        """Return whether the first mode is."""
        return self.first.settled()

    def steady(self) -> bool:
        """Return whether the attached modes are."""
        return all(mode.steady() for mode in self._active)

    def least_epochs(self) -> int:
        """Return those of the first mode, the only one there is while the penalty holds."""
        return self.first.least_epochs()

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Let the first mode prune, and attach the second one."""
        self.first.begin_fine_tuning(evaluate, error)
        self._attach_second()

    def convert(self, model: nn.Module) -> nn.Module:
        """Return what the mode that came last makes of the model."""
        return self._active[-1].convert(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both modes; the second one's is None while it isn't attached."""
        return {
            "first": self.first.state_dict(),
            "second": self.second.state_dict() if self.second.attached else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, and attach the second mode if it was."""
        self.first.load_state_dict(state["first"])
        if state["second"] is not None:
            if not self.second.attached:
                self._attach_second()
            self.second.load_state_dict(state["second"])
        elif self.second.attached:
            raise SpecError("the state is from before fine-tuning, which has begun here: prepare a new sequence for it")

    def report(self) -> dict[str, float]:
        """Return the numbers of the attached modes; the later one's where both have one of a name."""
        return {key: value for mode in self._active for key, value in mode.report().items()}

    def _attach_second(self) -> None:
        self.state.update(id(parameter) for parameter in self.model.parameters())
        self.second.prepare(self.model)

    @property
    def _active(self) -> list[Mode]:
        return [self.first, self.second] if self.second.attached else [self.first]


def _without(group: dict[str, Any], known: set[int]) -> dict[str, Any]:
    return {**group, "params": [parameter for parameter in group["params"] if id(parameter) not in known]}


def mode(spec: str | Mode) -> Mode:
    """Return the mode of a specification string, such as ``momos:block_size=4,capacity=0.01``.

    Two modes joined by ``|`` follow one another; see `Sequence`.

    Raises
    ------
    SpecError
        An option is unknown or wrong.
    UnknownNameError, PluginError
        The mode isn't known, or can't be loaded.
    """
    if isinstance(spec, Mode):
        return spec
    stages = []
    for stage in split_stages(spec):
        built = build("kcomplex.modes", stage)
        if not isinstance(built, Mode):
            raise SpecError(f"{stage!r} names {type(built).__name__}, which isn't a training mode")
        stages.append(built)
    if len(stages) == 1:
        return stages[0]
    return reduce(Sequence, stages)
