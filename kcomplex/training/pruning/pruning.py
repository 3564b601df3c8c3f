"""Pruning: what the modes that price every non-zero weight have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from kcomplex.errors import SpecError, WeightsError
from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.protocol.mode import Evaluate, Mode, chosen_weights
from kcomplex.training.protocol.parametrised import arithmetic_dtype, share_of_zeros
from kcomplex.training.pruning.tamade import prune_tolerably
from kcomplex.training.shrinking.chain import links_of
from kcomplex.training.shrinking.random_gradients import without_gradient
from kcomplex.training.shrinking.reachability import unreachable


@dataclass(frozen=True)
class Pruning(Mode):
    """Regularises, prunes by magnitude, and fine-tunes what is left.

    Parameters
    ----------
    bits_per_parameter
        Price c of a non-zero weight in bits. The penalty's weight is then ``alpha = c ln2 / samples``: with the mean
        loss in nats, `samples` times the training loss is a description length of model and data.
    alpha
        The penalty's weight itself, in nats a sample; it takes the place of the price in bits.
    samples
        Number of training samples; needed unless alpha is given.
    rising_epochs
        Epochs over which the price rises to its value in equal steps, so that the network learns before it is pruned;
        0 asks the full price from the start.
    tolerance
        Share by which pruning may make the held-out loss worse.
    error_tolerance
        By how much pruning may raise the share of held-out mistakes, such as 0.005; it takes the tolerance's place.
    cleaning
        How weights without any influence are found, which go too: ``graph`` by exact reachability, for a chain (see
        `kcomplex.training.shrinking.reachability`); ``gradients`` by random gradients, for any network (see
        `kcomplex.training.shrinking.random_gradients`); ``none`` leaves them.
    include, exclude
        Shell-style globs on parameter names. By default the weights of linear, convolution, embedding
        and attention layers; ``include=*`` prices biases and norms too.
    """

    bits_per_parameter: float = 8.0
    alpha: float | None = None
    samples: int | None = None
    rising_epochs: int = 0
    tolerance: float = 0.01
    error_tolerance: float | None = None
    cleaning: Literal["none", "graph", "gradients"] = "none"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        prices = ("bits_per_parameter", "alpha", "tolerance", "error_tolerance", "rising_epochs")
        refuse_outside(self, samples="[1, inf)", **dict.fromkeys(prices, "[0, inf)"))

    @property
    def price(self) -> float:
        """The penalty's weight alpha, in nats a sample and non-zero weight; SpecError where nothing gives it."""
        if self.alpha is not None:
            return self.alpha
        if self.samples is None:
            raise SpecError(
                f"{self.name}: a price in bits needs the number of training samples: give {self.name}:"
                f"bits_per_parameter={self.bits_per_parameter},samples=..., or the penalty's weight itself, alpha=..."
            )
        return self.bits_per_parameter * math.log(2) / self.samples

    def attach(self, model: nn.Module) -> PrunedState:
        """Return what is kept of a model, which isn't changed.

        Raises
        ------
        SpecError
            There is no price, nothing to work on, or the cleaning needs a chain.
        """
        price = self.price
        if self.cleaning == "graph":
            links_of(model)
        return PrunedState(price, chosen_weights(model, self.include, self.exclude), self.rising_epochs)

    @abstractmethod
    def regulariser(self) -> torch.Tensor:
        """Return the regularised phase's penalty, in nats a sample."""

    def penalty(self) -> torch.Tensor:
        """Return the method's regulariser; zero while fine-tuning."""
        return self.no_penalty() if self.pruned_state.fine_tuning else self.regulariser()

    def no_penalty(self) -> torch.Tensor:
        """Return zero, on the weights' device and in the dtype that penalties are computed in."""
        weights = next(iter(self.pruned_state.weights.values()))
        return torch.zeros((), dtype=arithmetic_dtype(weights.dtype), device=weights.device)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep at zero what was pruned."""
        state = self.pruned_state
        for full, pruned in state.pruned.items():
            state.weights[full].masked_fill_(pruned, 0)

    def after_epoch(self) -> None:
        """Let the price rise."""
        self.pruned_state.epochs += 1

    def settled(self) -> bool:
        """Return whether the price has risen to its value."""
        return self.pruned_state.epochs >= self.rising_epochs

    def steady(self) -> bool:
        """Return whether the price of the epoch to come is the full one, or there is none any more."""
        state = self.pruned_state
        return state.fine_tuning or state.present_price == state.price

    def least_epochs(self) -> int:
        """Return the epochs that the price takes to rise."""
        return self.rising_epochs

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Prune by magnitude as much as is tolerated on held-out data, and fix what is pruned; see `tamade`.

        Where several processes train one model, the evaluation has to return the same in all of them.

        Raises
        ------
        SpecError
            There is an error tolerance, and the loop doesn't give the error.
        WeightsError
            The unpruned network's loss or error isn't finite.
        """
        state = self.pruned_state
        self.clean(evaluate)
        if self.error_tolerance is None:
            prune_tolerably(state.weights.values(), evaluate, self.tolerance)
        elif error is None:
            raise SpecError(f"{self.name}: error_tolerance needs begin_fine_tuning(evaluate, error)")
        else:
            prune_tolerably(state.weights.values(), error, self.error_tolerance, absolute=True)
        self.clean(evaluate)
        for full, weights in state.weights.items():
            state.pruned[full] = weights.detach() == 0
        state.fine_tuning = True

    @torch.no_grad()
    def clean(self, evaluate: Evaluate) -> None:
        """Set weights without any influence to zero, the way that `cleaning` says."""
        if self.cleaning == "none":
            return
        if self.cleaning == "graph":
            masks = unreachable(self.model)
        else:
            with torch.enable_grad():
                masks = without_gradient(self.model, _shape_of_inputs(self.model, evaluate))
        for full, weights in self.pruned_state.weights.items():
            if full in masks:
                weights.masked_fill_(masks[full], 0)

    def convert(self, model: nn.Module) -> nn.Module:
        """Return a plain copy in which the pruned weights are exactly zero."""
        plain = super().convert(model)
        with torch.no_grad():
            for full, pruned in self.pruned_state.pruned.items():
                plain.get_parameter(full).masked_fill_(pruned, 0)
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs so far, whether the regularised phase is over, and what was pruned by parameter."""
        state = self.pruned_state
        return {"epochs": state.epochs, "fine_tuning": state.fine_tuning, "pruned": dict(state.pruned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; see `Mode.load_state_dict`."""
        mine = self.pruned_state
        self.refuse_other_shapes({full: pruned.shape for full, pruned in state["pruned"].items()})
        mine.epochs, mine.fine_tuning = state["epochs"], state["fine_tuning"]
        mine.pruned.clear()
        for full, pruned in state["pruned"].items():
            mine.pruned[full] = pruned.to(mine.weights[full].device, copy=True)

    def refuse_other_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise WeightsError unless these are shapes of this mode's weights, all or none; for `load_state_dict`."""
        mine = {full: weights.shape for full, weights in self.pruned_state.weights.items()}
        if shapes and dict(shapes) != mine:
            raise WeightsError(f"the state of {self.name} is of other parameters ({_told(shapes)} for {_told(mine)})")

    def report(self) -> dict[str, float]:
        """Return ``zeros``, the share of the priced weights that are zero."""
        return {"zeros": share_of_zeros(self.model, self.pruned_state.weights)}

    @property
    def pruned_state(self) -> PrunedState:
        """What the mode keeps of the model that it is attached to; SpecError before `prepare`."""
        state: PrunedState = self.state
        return state


@dataclass
class PrunedState:
    """What a `Pruning` keeps.

    Attributes
    ----------
    price
        The penalty's weight alpha.
    weights
        The priced parameters by full name. The objects are kept, not only the names: a mode that follows may move
        them behind a parametrisation.
    rising_epochs, epochs
        Over which the price rises, and so far.
    pruned
        Masks by full name, True where a weight is gone; empty before pruning.
    fine_tuning
        Whether the regularised phase is over.
    companions
        Of each parameter in PMMP: w, gamma and u.
    means, played
        What FPP answers to by parameter (theta, w, gamma and u), and how many values are in these means.
    """

    price: float
    weights: dict[str, nn.Parameter]
    rising_epochs: int = 0
    epochs: int = 0
    pruned: dict[str, torch.Tensor] = field(default_factory=dict)
    fine_tuning: bool = False
    companions: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    means: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    played: int = 1

    @property
    def present_price(self) -> float:
        """The penalty's weight in the epoch that is trained now."""
        return self.price * min(1.0, (self.epochs + 1) / max(self.rising_epochs, 1))

    def wide(self) -> list[torch.Tensor]:
        """Return the weights in the dtype that penalties are computed in, differentiable."""
        return [weights.to(arithmetic_dtype(weights.dtype)) for weights in self.weights.values()]


def _shape_of_inputs(model: nn.Module, evaluate: Evaluate) -> tuple[int, ...]:
    """Return the shape of the first batch that an evaluation gives to a model."""
    shapes: list[tuple[int, ...]] = []

    def remember(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes.append(tuple(inputs[0].shape))

    with model.register_forward_pre_hook(remember):
        evaluate()
    if not shapes:
        raise SpecError("random gradients need an evaluation that calls the model")
    return shapes[0]


def _told(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{full} {tuple(shape)}" for full, shape in shapes.items())
