"""Masked weights: what the modes that prune by magnitude on a schedule have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from kcomplex.errors import WeightsError
from kcomplex.estimators.spec import refuse_others
from kcomplex.training.protocol.mode import Mode, chosen_weights
from kcomplex.training.protocol.parametrised import share_of_zeros


@dataclass
class MaskedState:
    """What a `Masked` keeps: weights by full name, masks (True where a weight is gone), and counters."""

    weights: dict[str, nn.Parameter]
    masks: dict[str, torch.Tensor]
    steps: int = 0
    epochs: int = 0
    rest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Masked(Mode):
    """Keeps pruned weights at zero.

    Parameters
    ----------
    scope
        Prune the smallest weights of the whole network (``global``), or of every ``tensor`` the same share.
    include, exclude
        See `Mode`.
    """

    scope: Literal["global", "tensor"] = "global"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_others(self, scope=("global", "tensor"))

    def attach(self, model: nn.Module) -> MaskedState:
        """Return weights and masks of a model, which isn't changed."""
        weights = chosen_weights(model, self.include, self.exclude)
        masks = {full: torch.zeros_like(weight, dtype=torch.bool) for full, weight in weights.items()}
        return MaskedState(weights, masks)

    @torch.no_grad()
    def prune_to(self, share: float) -> None:
        """Prune the smallest weights, so that this share of them is gone; what is gone stays gone."""
        state = self.state
        names = list(state.weights)
        for group in [names] if self.scope == "global" else [[name] for name in names]:
            sizes = torch.cat([state.weights[name].detach().abs().flatten().double() for name in group])
            gone = torch.cat([state.masks[name].flatten() for name in group])
            sizes[gone] = -1
            # Stable: ties go to the lowest index, whatever the machine.
            smallest = torch.argsort(sizes, stable=True)[: round(share * len(sizes))]
            gone[smallest] = True
            start = 0
            for name in group:
                mask = state.masks[name]
                mask.copy_(gone[start : start + mask.numel()].reshape(mask.shape))
                start += mask.numel()
        self.apply_masks()

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set to zero what is pruned."""
        for name, mask in self.state.masks.items():
            self.state.weights[name].masked_fill_(mask, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return masks, counters and what the method keeps besides."""
        state = self.state
        return {
            "masks": {name: mask.clone() for name, mask in state.masks.items()},
            "steps": state.steps,
            "epochs": state.epochs,
            "rest": dict(state.rest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; see `Mode.load_state_dict`."""
        mine = self.state
        given: Mapping[str, torch.Tensor] = state["masks"]
        if {name: mask.shape for name, mask in given.items()} != {n: mask.shape for n, mask in mine.masks.items()}:
            raise WeightsError(f"the state of {self.name} is of other parameters: {', '.join(given)}")
        for name, mask in given.items():
            mine.masks[name].copy_(mask)
        mine.steps, mine.epochs, mine.rest = state["steps"], state["epochs"], dict(state["rest"])

    def report(self) -> dict[str, float]:
        """Return ``zeros``, the share of the chosen weights that are zero."""
        return {"zeros": share_of_zeros(self.model, self.state.weights)}

    @property
    def state(self) -> MaskedState:
        """What the mode keeps of the model that it is attached to."""
        state: MaskedState = super().state
        return state
