"""Low-rank training: a nuclear norm, and truncation of the singular values from time to time."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.protocol.mode import Evaluate, Mode, chosen_weights
from kcomplex.training.protocol.parametrised import arithmetic_dtype, share_of_zeros

Factors = tuple[torch.Tensor, torch.Tensor]
# Share of the squared singular values that rounding may leave beyond the rank.
_NOTHING = 1e-8


@dataclass
class _State:
    weights: dict[str, nn.Parameter]
    slopes: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    fixed: bool = False


@dataclass(frozen=True)
class LowRank(Mode):
    """Trained rank pruning: weights, as matrices with a row for each output, are brought to low rank while they train.

    Every so many steps the smallest singular values that hold no more than a share of the squares go. In between the
    nuclear norm pulls at all of them, through its subgradient ``U V^T`` at the last truncation.

    Parameters
    ----------
    nuclear
        Weight of the nuclear norms' sum, in nats a sample.
    energy
        Share of a matrix' squared singular values that a truncation keeps, at least, in (0, 1].
    every
        Steps from one truncation to the next; the end of an epoch is one too.
    include, exclude
        See `Mode`.

    Notes
    -----
    `begin_fine_tuning` truncates and fixes the ranks; from then on every truncation goes to those. `convert` gives
    dense weights of low rank, `factors` the two thin matrices, and `factorised` a network of thin layers.

    References
    ----------
    Y. Xu et al.: TRP: trained rank pruning for efficient deep neural networks. IJCAI 2020, arXiv:2004.14566.
    """

    nuclear: float = 3e-4
    energy: float = 0.98
    every: int = 20
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    name: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        refuse_outside(self, nuclear="[0, inf)", energy="(0, 1]", every="[1, inf)")

    def attach(self, model: nn.Module) -> _State:
        """Return the chosen weights of a model, which isn't changed, and their subgradients."""
        state = _State(chosen_weights(model, self.include, self.exclude))
        for full, weights in state.weights.items():
            u, _, v = _decomposed(weights)
            state.slopes[full] = u @ v
        return state

    def penalty(self) -> torch.Tensor:
        """Return ``nuclear * sum <W, U V^T>``, the norms' linearisation; zero while fine-tuning."""
        state: _State = self.state
        if state.fixed or not self.nuclear:
            return super().penalty()
        terms = [
            torch.dot(_matrix(weights).flatten(), state.slopes[full].flatten())
            for full, weights in state.weights.items()
        ]
        return self.nuclear * torch.stack([term.to(terms[0]) for term in terms]).sum()

    def after_step(self) -> None:
        """Truncate, where it is time."""
        state: _State = self.state
        state.steps += 1
        if state.steps % self.every == 0:
            self._truncate()

    def after_epoch(self) -> None:
        """Truncate, so that what is validated is what `convert` gives."""
        self._truncate()

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Truncate, and fix the ranks."""
        self._truncate()
        self.state.fixed = True

    def convert(self, model: nn.Module) -> nn.Module:
        """Return a plain copy whose weights are truncated."""
        plain = super().convert(model)
        with torch.no_grad():
            for full in self.state.weights:
                weights = plain.get_parameter(full)
                left, right = self._factors(full, weights)
                weights.copy_((left @ right).reshape(weights.shape))
        return plain

    def factors(self) -> dict[str, Factors]:
        """Return, by full name, matrices of shapes (outputs, r) and (r, inputs) that make the truncated weight."""
        return {full: self._factors(full, weights) for full, weights in self.state.weights.items()}

    def factorised(self, model: nn.Module) -> nn.Module:
        """Return a plain copy with two thin layers for every linear or convolution layer that gets smaller by it."""
        plain = super().convert(model)
        for full, (left, right) in self.factors().items():
            path, _, name = full.rpartition(".")
            layer = plain.get_submodule(path)
            smaller = left.numel() + right.numel() < left.shape[0] * right.shape[1]
            thin = _thin(layer, left, right) if smaller and name == "weight" and path else None
            if thin is not None:
                plain.set_submodule(path, thin)
                continue
            with torch.no_grad():
                weights = plain.get_parameter(full)
                weights.copy_((left @ right).reshape(weights.shape))
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Return subgradients, ranks and counters."""
        state: _State = self.state
        slopes = {full: slope.clone() for full, slope in state.slopes.items()}
        return {"slopes": slopes, "ranks": dict(state.ranks), "steps": state.steps, "fixed": state.fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; see `Mode.load_state_dict`."""
        mine: _State = self.state
        if {f: s.shape for f, s in state["slopes"].items()} != {f: s.shape for f, s in mine.slopes.items()}:
            raise SpecError(f"the state of low_rank is of other parameters: {', '.join(state['slopes'])}")
        for full, slope in state["slopes"].items():
            mine.slopes[full] = slope.to(mine.slopes[full], copy=True)
        mine.ranks, mine.steps, mine.fixed = dict(state["ranks"]), state["steps"], state["fixed"]

    def report(self) -> dict[str, float]:
        """Return ``rank``, as a share of the largest possible; ``parameters`` of thin matrices; share of ``zeros``."""
        state: _State = self.state
        ranks = full_ranks = parameters = 0
        for full, weights in state.weights.items():
            rows, columns = _matrix(weights).shape
            rank = state.ranks.get(full, min(rows, columns))
            ranks += rank
            full_ranks += min(rows, columns)
            parameters += min(rank * (rows + columns), rows * columns)
        zeros = share_of_zeros(self.model, state.weights)
        return {"rank": ranks / full_ranks, "parameters": float(parameters), "zeros": zeros}

    @torch.no_grad()
    def _truncate(self) -> None:
        state: _State = self.state
        for full, weights in state.weights.items():
            u, s, v = _decomposed(weights)
            rank = self._rank(full, s)
            state.ranks[full] = rank
            state.slopes[full] = u[:, :rank] @ v[:rank]
            weights.copy_(((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(weights.shape))

    @torch.no_grad()
    def _factors(self, full: str, weights: torch.Tensor) -> Factors:
        u, s, v = _decomposed(weights)
        rank = self._rank(full, s)
        return u[:, :rank] * s[:rank], v[:rank]

    def _rank(self, full: str, singular: torch.Tensor) -> int:
        """Return the rank to truncate to."""
        state: _State = self.state
        squares = singular.double().square()
        # Relative to the whole; rounding must not make that fall short of a share of one.
        shares = torch.cumsum(squares, 0) / squares.sum().clamp_min(1e-300) + 1e-12
        known = state.ranks.get(full)
        if known is not None and (state.fixed or shares[known - 1] >= 1 - _NOTHING):
            # What is truncated already would lose a share of what is left, again and again.
            return known
        return int(torch.argmax((shares >= self.energy).to(torch.uint8))) + 1


def _matrix(weights: torch.Tensor) -> torch.Tensor:
    """Return weights as a matrix with a row for each output, in the dtype of arithmetic."""
    return weights.to(arithmetic_dtype(weights.dtype)).reshape(len(weights) if weights.ndim > 1 else 1, -1)


@torch.no_grad()
def _decomposed(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, v = torch.linalg.svd(_matrix(weights.detach()), full_matrices=False)
    return u, s, v


def _thin(layer: nn.Module, left: torch.Tensor, right: torch.Tensor) -> nn.Sequential | None:
    """Return two layers that do what one of low rank does, or None where there is no such pair."""
    rank = left.shape[1]
    if type(layer) is nn.Linear:
        first: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
        second: nn.Module = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
    elif type(layer) is nn.Conv2d and layer.groups == 1:
        first = nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=layer.padding_mode,
        )
        second = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
    else:
        return None
    weights = layer.get_parameter("weight")
    pair = nn.Sequential(first, second).to(weights.device, weights.dtype)
    with torch.no_grad():
        for part, factor in zip(pair, (right, left), strict=True):
            part.get_parameter("weight").copy_(factor.reshape(part.get_parameter("weight").shape))
        if layer.bias is not None:
            second.bias = copy.deepcopy(layer.bias)
    return pair
