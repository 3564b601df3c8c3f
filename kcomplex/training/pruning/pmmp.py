"""PMMP: probabilistic minimax pruning, an exact reformulation of the number of non-zero weights without sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.protocol.mode import ParameterGroups
from kcomplex.training.protocol.parametrised import arithmetic_dtype, compiled_loops_serve
from kcomplex.training.pruning import pmmp_kernels
from kcomplex.training.pruning.pruning import PrunedState, Pruning

_COMPANIONS = ("w", "gamma", "u")
# The regularised phase isn't over while more of the gammas than this are in the open part of [0, 1].
_MOST_UNDECIDED = 0.01


@dataclass(frozen=True)
class PMMP(Pruning):
    r"""Prices every non-zero weight, in bits.

    Each weight theta gets three companions: w, a probability gamma of being needed, and a multiplier u. The saddle

    .. math:: \min_{\theta, w, \gamma} \max_u \; L(\theta) + \alpha \sum \gamma
              + \sum u [(\theta - w\gamma)^2 + w^2 \gamma (1 - \gamma)]

    is where :math:`\sum \gamma` is the number of non-zero weights: the bracket, which is the expectation of
    :math:`(\theta - wz)^2` for Bernoulli z with mean gamma, vanishes there. Training only brings weights close to
    zero; `begin_fine_tuning` prunes them, by the largest magnitude that the held-out loss tolerates.

    The defaults of the companions' own parameter groups are meant for Adam or AdamW; with SGD, gamma hardly moves at
    them.

    Parameters
    ----------
    bits_per_parameter, alpha, samples, rising_epochs, tolerance, error_tolerance, cleaning, include, exclude
        See `Pruning`.
    u0, p0
        Where u and gamma begin. A weight below ``sqrt(alpha / u0)`` begins by losing its gamma; with ``u0 = 0`` all do.
        Since u only grows, this threshold decides much of what is pruned in the end: for a threshold t, give
        ``alpha / t^2``.
    gamma_lr, u_lr
        Learning rates of gamma and u. Gamma has to travel from 1 to 0 while the training lasts: with an adaptive
        optimiser in some ``1 / gamma_lr`` steps, with SGD in ``1 / (gamma_lr * alpha)``.

    Notes
    -----
    The optimiser must know `maximize` for a parameter group, as those of `torch.optim` do: u is ascended. Put the model
    on its device before `prepare`; the companions follow the weights, and aren't part of the model.

    References
    ----------
    L. S. Barth, P. von Petersenn: Efficient compression of neural networks and datasets. arXiv:2505.17469, 2025.
    """

    u0: float = 1.0
    p0: float = 1.0
    gamma_lr: float = 1e-2
    u_lr: float = 1e-3
    name: ClassVar[str] = "pmmp"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_outside(self, u0="[0, inf)", gamma_lr="[0, inf)", u_lr="[0, inf)", p0="[0, 1]")

    def attach(self, model: nn.Module) -> PrunedState:
        """Return what `Pruning.attach` does, with companions of the chosen weights."""
        state = super().attach(model)
        for full, weights in state.weights.items():
            w = weights.detach().to(arithmetic_dtype(weights.dtype), copy=True)
            starts = (w, torch.full_like(w, self.p0), torch.full_like(w, self.u0))
            state.companions[full] = {key: nn.Parameter(start) for key, start in zip(_COMPANIONS, starts, strict=True)}
        return state

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> ParameterGroups:
        """Return four groups: the model's own parameters, w, gamma, and u, which is to be maximised."""
        groups = super().parameter_groups(lr, weight_decay)
        rates = {"w": lr, "gamma": self.gamma_lr, "u": self.u_lr}
        for key, rate in rates.items():
            parameters = [companions[key] for companions in self.companions.values()]
            groups.append({"params": parameters, "lr": rate, "weight_decay": 0.0, "maximize": key == "u"})
        return groups

    def regulariser(self) -> torch.Tensor:
        """Return ``alpha sum(gamma) + sum(u (theta^2 - 2 theta w gamma + w^2 gamma))``, in nats a sample."""
        return saddle(self.pruned_state.present_price, self.quadruples())

    def quadruples(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield each weight tensor with its companions: theta, w, gamma, u."""
        for full, companions in self.companions.items():
            yield self.pruned_state.weights[full], *companions.values()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep gamma in [0, 1] and u non-negative; while fine-tuning, keep what was pruned at zero."""
        super().after_step()
        if not self.pruned_state.fine_tuning:
            for companions in self.companions.values():
                companions["gamma"].clamp_(0, 1)
                companions["u"].clamp_min_(0)

    def settled(self) -> bool:
        """Return whether the price has risen and at most 1 % of the gammas are between 0.1 and 0.9."""
        return self.pruned_state.fine_tuning or (super().settled() and self._undecided() <= _MOST_UNDECIDED)

    def convert(self, model: nn.Module) -> nn.Module:
        """Return a plain copy in which the pruned weights are exactly zero.

        Before `begin_fine_tuning` nothing is pruned yet; the weights with gamma below 1/2 are then zero in the copy.
        """
        plain = super().convert(model)
        if not self.pruned_state.fine_tuning:
            with torch.no_grad():
                for full, companions in self.companions.items():
                    plain.get_parameter(full).masked_fill_(companions["gamma"] < 0.5, 0)
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Return the companions by parameter, and what `Pruning.state_dict` does."""
        companions = {
            full: {key: part.detach() for key, part in parts.items()} for full, parts in self.companions.items()
        }
        return {"companions": companions, **super().state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; an optimiser that holds the companions keeps them."""
        self.refuse_other_shapes({full: parts["w"].shape for full, parts in state["companions"].items()})
        super().load_state_dict(state)
        for full, companions in self.companions.items():
            for key, tensor in companions.items():
                tensor.copy_(state["companions"][full][key])

    def report(self) -> dict[str, float]:
        """Return shares of the weights: ``zeros``, ``kept`` (mean gamma) and ``undecided`` (gamma in 0.1 to 0.9)."""
        gamma = self._gamma()
        return {**super().report(), "kept": float(gamma.mean()), "undecided": self._undecided()}

    @property
    def companions(self) -> dict[str, dict[str, nn.Parameter]]:
        """The companions w, gamma and u by full name of the parameter; `prepare` made them."""
        return self.pruned_state.companions

    def _gamma(self) -> torch.Tensor:
        return torch.cat([companions["gamma"].detach().flatten() for companions in self.companions.values()])

    def _undecided(self) -> float:
        gamma = self._gamma()
        return float(((gamma > 0.1) & (gamma < 0.9)).double().mean())


def saddle(price: float, quadruples: Iterable[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return ``price sum(gamma) + sum(u bracket)`` of quadruples theta, w, gamma, u, differentiable in all four.

    The price is in nats a sample. The tensors of a quadruple have one shape; theta may have a shorter dtype.
    """
    tensors = [tensor for quadruple in quadruples for tensor in quadruple]
    penalty: torch.Tensor = _Penalty.apply(price, *tensors)  # type: ignore[no-untyped-call]
    return penalty


def bracket_of(theta: torch.Tensor, w: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Return ``theta^2 + w gamma (w - 2 theta)``: the expectation of ``(theta - wz)^2``, linear in gamma."""
    return torch.sub(w, theta, alpha=2).mul_(w).mul_(gamma).addcmul_(theta, theta)


class _Penalty(torch.autograd.Function):
    """The penalty of theta, w, gamma, u, theta, w, gamma, u ..."""

    @staticmethod
    def forward(ctx: Any, price: float, *tensors: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=tensors[1].dtype, device=tensors[0].device)
        slopes: list[torch.Tensor] = []
        for theta, w, gamma, u in _quadruples(tensors):
            if compiled_loops_serve(theta):
                slopes += _compiled_slopes(price, theta, w, gamma, u)
                bracket = slopes[-1]
            else:
                bracket = bracket_of(theta, w, gamma)
            total += (price * gamma.sum() + torch.dot(bracket.flatten(), u.flatten())).to(total)
        ctx.price = price
        ctx.save_for_backward(*tensors, *slopes)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 1
        tensors, slopes = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        # The compiled loop can't be differentiated once more.
        if not slopes or torch.is_grad_enabled():
            slopes = tuple(part for quadruple in _quadruples(tensors) for part in _slopes(ctx.price, *quadruple))
        return None, *(slope * gradient.to(slope) for slope in slopes)


def _compiled_slopes(
    price: float, theta: torch.Tensor, w: torch.Tensor, gamma: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return what `_slopes` does, from one pass over the four tensors."""
    into = tuple(torch.empty(theta.shape, dtype=u.dtype) for _ in range(4))
    arrays = (_array(into[0]), _array(into[1]), _array(into[2]), _array(into[3]))
    pmmp_kernels.slopes(price, (_array(theta), _array(w), _array(gamma), _array(u)), arrays)
    return into


def _slopes(
    price: float, theta: torch.Tensor, w: torch.Tensor, gamma: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the penalty in theta, w, gamma and u; the last one is the bracket."""
    pull = 2 * u
    to_theta = torch.addcmul(theta, w, gamma, value=-1) * pull
    to_w = (w - theta) * gamma * pull
    to_gamma = price + u * w * torch.sub(w, theta, alpha=2)
    return to_theta, to_w, to_gamma, bracket_of(theta, w, gamma)


def _array(tensor: torch.Tensor) -> NDArray[np.floating[Any]]:
    array: NDArray[np.floating[Any]] = tensor.detach().contiguous().numpy()
    return array.reshape(-1)


def _quadruples(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield theta, w, gamma, u of one parameter after the other, in the companions' dtype."""
    for start in range(0, len(tensors), 4):
        theta, *companions = tensors[start : start + 4]
        yield theta.to(companions[0].dtype), *companions
