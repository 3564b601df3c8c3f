"""FPP: PMMP in which each side answers the average of what the other one played so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.pruning.pmmp import PMMP, bracket_of, saddle
from kcomplex.training.pruning.pruning import PrunedState

_PLAYED = ("theta", "w", "gamma", "u")


@dataclass(frozen=True)
class FPP(PMMP):
    """PMMP by fictitious play: the gradients see averaged opponents, which damps the circling of minimum and maximum.

    Theta, w and gamma descend against the running mean of u; u ascends on the bracket at the running means of theta, w
    and gamma. The means take in a value after every step, and their starting values count as the first one. They cost
    four more tensors a weight.

    Parameters
    ----------
    bits_per_parameter, alpha, samples, rising_epochs, tolerance, error_tolerance, cleaning, include, exclude, u0, p0,
    gamma_lr, u_lr
        See `PMMP`.
    longest
        The means forget what is much longer ago than so many steps: the newest value has a share of at least
        ``1 / (longest + 1)``. None gives exact means.
    """

    longest: int | None = None
    name: ClassVar[str] = "fpp"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_outside(self, longest="[1, inf)")

    def attach(self, model: nn.Module) -> PrunedState:
        """Return what `PMMP.attach` does, with means that begin at the present values."""
        state = super().attach(model)
        state.means = {
            full: {
                key: tensor.detach().to(companions["w"].dtype, copy=True)
                for key, tensor in zip(_PLAYED, (state.weights[full], *companions.values()), strict=True)
            }
            for full, companions in state.companions.items()
        }
        return state

    def regulariser(self) -> torch.Tensor:
        """Return ``alpha sum(gamma) + sum(mean u bracket)``; u's gradient is the bracket of the other means."""
        means = self.pruned_state.means
        against = (
            (theta, w, gamma, mean["u"])
            for (theta, w, gamma, _), mean in zip(self.quadruples(), means.values(), strict=True)
        )
        total = saddle(self.pruned_state.present_price, against)
        for mean, companions in zip(means.values(), self.companions.values(), strict=True):
            bracket = bracket_of(mean["theta"], mean["w"], mean["gamma"])
            u = companions["u"]
            total = total + ((u - u.detach()) * bracket).sum()
        return total

    @torch.no_grad()
    def after_step(self) -> None:
        """Do as PMMP does, and take the new values into the means."""
        super().after_step()
        state = self.pruned_state
        if state.fine_tuning:
            return
        count = state.played if self.longest is None else min(state.played, self.longest)
        for mean, tensor in self._means_and_values():
            mean.lerp_(tensor.to(mean.dtype), 1 / (count + 1))
        state.played += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the means by parameter and the number of values in them, and what `PMMP.state_dict` does."""
        means = {full: dict(parts) for full, parts in self.pruned_state.means.items()}
        return {"means": means, "played": self.pruned_state.played, **super().state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; see `PMMP.load_state_dict`."""
        super().load_state_dict(state)
        for full, parts in self.pruned_state.means.items():
            for key, mean in parts.items():
                mean.copy_(state["means"][full][key])
        self.pruned_state.played = state["played"]

    def _means_and_values(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for parts, values in zip(self.pruned_state.means.values(), self.quadruples(), strict=True):
            yield from zip(parts.values(), values, strict=True)
