"""PMMP: probabilistic minimax pruning, an exact reformulation of the number of non-zero weights without sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.errors import SpecError, WeightsError
from kcomplex.training.mode import WEIGHT_LAYERS, Evaluate, Mode, ParameterGroups, chosen_parameters
from kcomplex.training.parametrised import arithmetic_dtype, share_of_zeros
from kcomplex.training.tamade import prune_tolerably

_COMPANIONS = ("w", "gamma", "u")


@dataclass(frozen=True)
class PMMP(Mode):
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
    bits_per_parameter
        Price c of a non-zero weight in bits. The penalty's weight is then ``alpha = c ln2 / samples``: with the mean
        loss in nats, `samples` times the training loss is a description length of model and data.
    alpha
        The penalty's weight itself, in nats a sample; it takes the place of the price in bits.
    samples
        Number of training samples; needed unless alpha is given.
    u0, p0
        Where u and gamma begin. A weight below ``sqrt(alpha / u0)`` begins by losing its gamma; with ``u0 = 0`` all do.
    gamma_lr, u_lr
        Learning rates of gamma and u. Gamma has to travel from 1 to 0 while the training lasts: with an adaptive
        optimiser in some ``1 / gamma_lr`` steps, with SGD in ``1 / (gamma_lr * alpha)``.
    tolerance
        Share by which pruning may make the held-out loss worse.
    include, exclude
        Shell-style globs on parameter names. By default the weights of linear, convolution, embedding
        and attention layers.

    Raises
    ------
    SpecError
        A value is out of range.

    Notes
    -----
    The optimiser must know `maximize` for a parameter group, as those of `torch.optim` do: u is ascended. Put the model
    on its device before `prepare`; the companions follow the weights, and aren't part of the model.

    References
    ----------
    L. S. Barth, P. von Petersenn: Efficient compression of neural networks and datasets. arXiv:2505.17469, 2025.
    """

    bits_per_parameter: float = 8.0
    alpha: float | None = None
    samples: int | None = None
    u0: float = 1.0
    p0: float = 1.0
    gamma_lr: float = 1e-2
    u_lr: float = 1e-3
    tolerance: float = 0.01
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    name: ClassVar[str] = "pmmp"

    def __post_init__(self) -> None:
        for field in ("bits_per_parameter", "alpha", "u0", "gamma_lr", "u_lr", "tolerance"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < math.inf:
                raise SpecError(f"pmmp: {field} must be 0 or more, not {value}")
        if not 0 <= self.p0 <= 1:
            raise SpecError(f"pmmp: p0 must be in [0, 1], not {self.p0}")
        if self.samples is not None and self.samples < 1:
            raise SpecError(f"pmmp: samples must be 1 or more, not {self.samples}")

    @property
    def price(self) -> float:
        """The penalty's weight alpha, in nats a sample and non-zero weight.

        Raises
        ------
        SpecError
            Neither alpha nor the number of samples is given.
        """
        if self.alpha is not None:
            return self.alpha
        if self.samples is None:
            raise SpecError(
                "pmmp: a price in bits needs the number of training samples: give pmmp:bits_per_parameter="
                f"{self.bits_per_parameter},samples=..., or the penalty's weight itself, pmmp:alpha=..."
            )
        return self.bits_per_parameter * math.log(2) / self.samples

    def prepare(self, model: nn.Module) -> None:
        """Attach to a model, which isn't changed, and give every chosen weight its companions.

        Raises
        ------
        SpecError
            There is no price, nothing to work on, or the mode is already attached.
        """
        price = self.price
        companions = {}
        for module, name, full in chosen_parameters(model, WEIGHT_LAYERS, self.include, self.exclude):
            theta = module.get_parameter(name).detach()
            w = theta.to(arithmetic_dtype(theta.dtype), copy=True)
            starts = (w, torch.full_like(w, self.p0), torch.full_like(w, self.u0))
            companions[full] = {key: nn.Parameter(start) for key, start in zip(_COMPANIONS, starts, strict=True)}
        pruned: dict[str, torch.Tensor] = {}
        self.attach_to(model)
        object.__setattr__(self, "_state", _State(price, companions, pruned))

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> ParameterGroups:
        """Return four groups: the model's own parameters, w, gamma, and u, which is to be maximised."""
        groups = super().parameter_groups(lr, weight_decay)
        rates = {"w": lr, "gamma": self.gamma_lr, "u": self.u_lr}
        for key, rate in rates.items():
            parameters = [companions[key] for companions in self._attached().companions.values()]
            groups.append({"params": parameters, "lr": rate, "weight_decay": 0.0, "maximize": key == "u"})
        return groups

    def penalty(self) -> torch.Tensor:
        """Return ``alpha sum(gamma) + sum(u (theta^2 - 2 theta w gamma + w^2 gamma))``; zero while fine-tuning."""
        state = self._attached()
        if state.pruned:
            return super().penalty()
        tensors = [tensor for theta, companions in self._pairs() for tensor in (theta, *companions.values())]
        penalty: torch.Tensor = _Penalty.apply(state.price, *tensors)  # type: ignore[no-untyped-call]
        return penalty

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep gamma in [0, 1] and u non-negative; while fine-tuning, keep what was pruned at zero."""
        state = self._attached()
        for full, pruned in state.pruned.items():
            self.model.get_parameter(full).masked_fill_(pruned, 0)
        if not state.pruned:
            for companions in state.companions.values():
                companions["gamma"].clamp_(0, 1)
                companions["u"].clamp_min_(0)

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Prune by magnitude as much as the held-out loss tolerates, and fix what is pruned; see `tamade`."""
        state = self._attached()
        prune_tolerably((theta for theta, _ in self._pairs()), evaluate, self.tolerance)
        for full in state.companions:
            state.pruned[full] = self.model.get_parameter(full).detach() == 0

    def convert(self, model: nn.Module) -> nn.Module:
        """Return a plain copy in which the pruned weights are exactly zero.

        Before `begin_fine_tuning` nothing is pruned yet; the weights with gamma below 1/2 are then zero in the copy.
        """
        plain = super().convert(model)
        state = self._attached()
        with torch.no_grad():
            for full, companions in state.companions.items():
                pruned = state.pruned[full] if state.pruned else companions["gamma"] < 0.5
                plain.get_parameter(full).masked_fill_(pruned, 0)
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Return the companions by parameter and, while fine-tuning, what was pruned."""
        state = self._attached()
        companions = {
            full: {key: tensor.detach() for key, tensor in parts.items()} for full, parts in state.companions.items()
        }
        return {"companions": companions, "pruned": dict(state.pruned)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; an optimiser that holds the companions keeps them.

        Raises
        ------
        WeightsError
            The state belongs to another model.
        """
        mine = self._attached()
        shapes = {full: companions["w"].shape for full, companions in mine.companions.items()}
        given = {full: companions["w"].shape for full, companions in state["companions"].items()}
        if given != shapes:
            raise WeightsError(f"the state of pmmp is of other parameters ({', '.join(given)} for {', '.join(shapes)})")
        for full, companions in mine.companions.items():
            for key, tensor in companions.items():
                tensor.copy_(state["companions"][full][key])
        mine.pruned.clear()
        for full, pruned in state["pruned"].items():
            mine.pruned[full] = pruned.to(mine.companions[full]["w"].device, copy=True)

    def report(self) -> dict[str, float]:
        """Return shares of the weights: ``zeros``, ``kept`` (mean gamma) and ``undecided`` (gamma in 0.1 to 0.9)."""
        gamma = torch.cat([parts["gamma"].detach().flatten() for parts in self._attached().companions.values()])
        return {
            "zeros": share_of_zeros(self.model, self._attached().companions),
            "kept": float(gamma.mean()),
            "undecided": float(((gamma > 0.1) & (gamma < 0.9)).double().mean()),
        }

    def _attached(self) -> _State:
        if "_state" not in self.__dict__:
            raise SpecError("the mode 'pmmp' isn't attached: call prepare(model) first")
        state: _State = self.__dict__["_state"]
        return state

    def _pairs(self) -> Iterator[tuple[nn.Parameter, dict[str, nn.Parameter]]]:
        for full, companions in self._attached().companions.items():
            yield self.model.get_parameter(full), companions


@dataclass(frozen=True)
class _State:
    price: float
    companions: dict[str, dict[str, nn.Parameter]]
    pruned: dict[str, torch.Tensor]


class _Penalty(torch.autograd.Function):
    """The penalty of theta, w, gamma, u, theta, w, gamma, u ..."""

    @staticmethod
    def forward(ctx: Any, price: float, *tensors: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=tensors[1].dtype, device=tensors[0].device)
        brackets = []
        for theta, w, gamma, u in _quadruples(tensors):
            # theta^2 + w gamma (w - 2 theta), which is linear in gamma.
            bracket = torch.sub(w, theta, alpha=2).mul_(w).mul_(gamma).addcmul_(theta, theta)
            total += (price * gamma.sum() + torch.dot(bracket.flatten(), u.flatten())).to(total)
            brackets.append(bracket)
        ctx.price = price
        ctx.save_for_backward(*tensors, *brackets)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 5
        tensors, brackets = ctx.saved_tensors[: 4 * count], ctx.saved_tensors[4 * count :]
        gradients = []
        for (theta, w, gamma, u), bracket in zip(_quadruples(tensors), brackets, strict=True):
            here = gradient.to(u)
            pull = u * (2 * here)
            to_theta = torch.mul(w, gamma).neg_().add_(theta).mul_(pull)
            to_w = torch.sub(w, theta).mul_(gamma).mul_(pull)
            to_gamma = torch.sub(w, theta, alpha=2).mul_(w).mul_(u).add_(ctx.price).mul_(here)
            gradients += [to_theta, to_w, to_gamma, bracket * here]
        return None, *gradients


def _quadruples(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield theta, w, gamma, u of one parameter after the other, in the companions' dtype."""
    for start in range(0, len(tensors), 4):
        theta, *companions = tensors[start : start + 4]
        yield theta.to(companions[0].dtype), *companions
