"""Lottery tickets: iterative magnitude pruning, the weights that are left rewound to early values after each round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.pruning.masked import Masked


@dataclass(frozen=True)
class LotteryTicket(Masked):
    """Trains, prunes a share of what is left, rewinds, and trains again.

    Parameters
    ----------
    scope, include, exclude
        See `Masked`.
    share
        Of the weights left, how many are pruned after each round, in (0, 1).
    rounds
        Rounds that end with pruning and rewinding, so that ``(1 - share)**rounds`` of the weights are left; training
        goes on after the last one.
    epochs
        Of each round.
    rewind_step
        Where to rewind to: 0 is the initialisation; later steps of the first round work better for larger networks.

    Notes
    -----
    Everything in the model is rewound, biases and buffers too. The optimiser's moments aren't, which this mode doesn't
    see: make a new optimiser where `rounds_done` grows, or let the moments fade. Take a constant learning rate, or a
    schedule that repeats after each round.

    References
    ----------
    J. Frankle, M. Carbin: The lottery ticket hypothesis. ICLR 2019. J. Frankle et al.: Linear mode connectivity and
    the lottery ticket hypothesis. ICML 2020 (rewinding to a later step).
    """

    share: float = 0.2
    rounds: int = 10
    epochs: int = 5
    rewind_step: int = 0
    name: ClassVar[str] = "lottery_ticket"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_outside(self, share="(0, 1)", rounds="[0, inf)", epochs="[1, inf)", rewind_step="[0, inf)")

    def prepare(self, model: nn.Module) -> None:
        """Attach to a model, which isn't changed; remember it, where that is what to rewind to."""
        super().prepare(model)
        if self.rewind_step == 0:
            self._remember()

    @property
    def rounds_done(self) -> int:
        """How often the network was pruned and rewound."""
        return min(self.state.epochs // self.epochs, self.rounds)

    def after_step(self) -> None:
        """Keep at zero what is pruned; remember the network at the step to rewind to."""
        state = self.state
        state.steps += 1
        self.apply_masks()
        if state.steps == self.rewind_step and not state.rest:
            self._remember()

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Prune and rewind, at the end of a round.

        Raises
        ------
        SpecError
            The first round is over before the step to rewind to.
        """
        state = self.state
        before = self.rounds_done
        state.epochs += 1
        if self.rounds_done == before:
            return
        if not state.rest:
            raise SpecError(
                f"lottery_ticket: rewind_step={self.rewind_step} isn't in the first round, of {state.steps} steps"
            )
        self.prune_to(1 - (1 - self.share) ** self.rounds_done)
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(state.rest[name])
        self.apply_masks()

    def report(self) -> dict[str, float]:
        """Return ``zeros``, the share of the chosen weights that are zero, and ``rounds`` done."""
        return {**super().report(), "rounds": float(self.rounds_done)}

    def _remember(self) -> None:
        kept: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.state.rest = kept
