"""FPP: PMMP in which each side answers the average of what the other one played so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.pruning.pmmp import PMMP, bracket_of, saddle

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

    Raises
    ------
    SpecError
        A value is out of range.
    """

    longest: int | None = None
    name: ClassVar[str] = "fpp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest is not None and self.longest < 1:
            raise SpecError(f"fpp: longest must be 1 or more, not {self.longest}")

    def prepare(self, model: nn.Module) -> None:
        """Attach to a model, which isn't changed; see `PMMP.prepare`."""
        super().prepare(model)
        means = {
            full: {
                key: tensor.detach().to(companions["w"].dtype, copy=True)
                for key, tensor in zip(_PLAYED, (self.pruned_state.weights[full], *companions.values()), strict=True)
            }
            for full, companions in self.companions.items()
        }
        object.__setattr__(self, "_means", means)
        object.__setattr__(self, "_played", [1])

    def regulariser(self) -> torch.Tensor:
        """Return ``alpha sum(gamma) + sum(mean u bracket)``; u's gradient is the bracket of the other means."""
        means = self._attached_means()
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
        if self.pruned_state.fine_tuning:
            return
        played = self.__dict__["_played"]
        count = played[0] if self.longest is None else min(played[0], self.longest)
        for mean, tensor in self._means_and_values():
            mean.lerp_(tensor.to(mean.dtype), 1 / (count + 1))
        played[0] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the means by parameter and the number of values in them, and what `PMMP.state_dict` does."""
        means = {full: dict(parts) for full, parts in self._attached_means().items()}
        return {"means": means, "played": self.__dict__["_played"][0], **super().state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; see `PMMP.load_state_dict`."""
        super().load_state_dict(state)
        for full, parts in self._attached_means().items():
            for key, mean in parts.items():
                mean.copy_(state["means"][full][key])
        self.__dict__["_played"][0] = state["played"]

    def _attached_means(self) -> dict[str, dict[str, torch.Tensor]]:
        if "_means" not in self.__dict__:
            raise SpecError("the mode 'fpp' isn't attached: call prepare(model) first")
        means: dict[str, dict[str, torch.Tensor]] = self.__dict__["_means"]
        return means

    def _means_and_values(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for parts, values in zip(self._attached_means().values(), self.quadruples(), strict=True):
            yield from zip(parts.values(), values, strict=True)
