"""The learnable dead-zone quantiser behind `kcomplex.training.codeq`, with closed-form gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from kcomplex.training.parametrised import arithmetic_dtype

MIN_BITS = 2
# A plain number at fixed precision, a tensor without dimensions where the bits are learned.
Scalar: TypeAlias = "float | torch.Tensor"
# Half of the usual initial logit (3) opens the quantiser half.
_MIDDLE = 1.5


@dataclass(frozen=True)
class Scheme:
    """What a dead-zone quantiser doesn't learn; the fields are those of `kcomplex.training.codeq.CoDeQ`."""

    bits: int
    max_bits: int
    quantile: float
    reference: bool

    def openness(self, logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the openness p of a logit, in [0, 1], and its derivative."""
        if self.reference:
            bent = torch.tanh(logit)
            return bent.abs(), bent.sign() * (1 - bent.square())
        opened = torch.sigmoid(2 * (logit - _MIDDLE))
        return opened, 2 * opened * (1 - opened)

    def absmax(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the top level a: the quantile of the magnitudes or, where that is zero, their maximum."""
        quantile, largest = quantile_and_maximum(weights.detach().abs().flatten(), self.quantile)
        return quantile if self.reference else torch.where(quantile == 0, largest, quantile)

    def grid(self, absmax: torch.Tensor, logit_dead_zone: torch.Tensor, logit_bits: torch.Tensor | None) -> Grid:
        """Return the levels that a top level and the logits stand for."""
        bits: Scalar = float(self.bits)
        if logit_bits is not None:
            bits = torch.round(MIN_BITS + (self.max_bits - MIN_BITS) * self.openness(logit_bits)[0])
        top = 2 ** (bits - 1) - 1
        dead_zone = 2 * absmax * (1 - self.openness(logit_dead_zone)[0])
        if self.reference:
            step = (absmax - dead_zone / 2) / (top - 0.5) + 1e-8
        else:
            # Widened in proportion, so that the widest dead zone leaves a step. Where all is zero any step will do.
            step = (absmax * (1 + torch.finfo(absmax.dtype).eps) - dead_zone / 2) / (top - 0.5)
            step = torch.where(step == 0, 1, step)
        return Grid(absmax, bits, top, dead_zone, step, (dead_zone - step) / 2)


@dataclass(frozen=True)
class Grid:
    """The levels of one tensor: 0 and ``±(step * j + shift)`` for j = 1 to ``top``.

    Attributes
    ----------
    absmax
        The top level.
    bits, top
        Number of bits b, and ``2**(b - 1) - 1``.
    dead_zone, step, shift
        Width of the zero bin, width of the others, and half their difference.
    """

    absmax: torch.Tensor
    bits: Scalar
    top: Scalar
    dead_zone: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor

    def positions(self, weights: torch.Tensor) -> torch.Tensor:
        """Return where the magnitudes lie among the levels: 0 up to the shift, else in steps beyond it."""
        return weights.abs().sub_(self.shift).clamp_min_(0).div_(self.step)

    def codes(self, weights: torch.Tensor) -> torch.Tensor:
        """Return signed integers as floats; exact zeros get code 0."""
        return self.positions(weights).round_().clamp_max_(self.top).mul_(weights.sign())

    def values(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what codes stand for."""
        return _dequantise(codes, self.step, self.shift, dtype)


@dataclass(frozen=True)
class IntegerTensor:
    """A quantised tensor as integers.

    Attributes
    ----------
    bits
        Bits a code.
    dead_zone, step, shift
        Width of the zero bin, width of the others, and half their difference.
    codes
        int8 up to 8 bits, else int16; between ``-(2**(bits - 1) - 1)`` and ``2**(bits - 1) - 1``.
    dtype
        Of the weights.
    """

    bits: int
    dead_zone: float
    step: float
    shift: float
    codes: torch.Tensor
    dtype: torch.dtype

    def values(self) -> torch.Tensor:
        """Return ``step * codes + shift * sign(codes)``: bit for bit the weights that the network computes with."""
        return _dequantise(self.codes.to(arithmetic_dtype(self.dtype)), self.step, self.shift, self.dtype)


def _dequantise(codes: torch.Tensor, step: Scalar, shift: Scalar, dtype: torch.dtype) -> torch.Tensor:
    values = (codes * step).add_(codes.sign().mul_(shift)).to(dtype)
    # Adding zero turns -0.0 into 0.0, which would otherwise be one value more to store.
    return values.add_(0.0)


class DeadZoneQuantiser(nn.Module):
    """The parametrisation of one tensor.

    Parameters
    ----------
    scheme
        What isn't learned.
    learnable_bits
        Whether the number of bits is learned.
    initial_logit
        Of dead zone and bits.
    device
        Of the logits, which are float32.
    """

    def __init__(self, scheme: Scheme, learnable_bits: bool, initial_logit: float, device: torch.device) -> None:
        super().__init__()
        self.scheme = scheme
        self.logit_dead_zone = nn.Parameter(torch.tensor(initial_logit, dtype=torch.float32, device=device))
        self.logit_bits = nn.Parameter(self.logit_dead_zone.detach().clone()) if learnable_bits else None

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the quantised weights; gradients reach the weights and the logits."""
        quantised: torch.Tensor = _Quantise.apply(  # type: ignore[no-untyped-call]
            weights, self.logit_dead_zone, self.logit_bits, self.scheme
        )
        return quantised

    @torch.no_grad()
    def grid(self, weights: torch.Tensor) -> Grid:
        """Return the levels that these weights are quantised to."""
        wide = weights.to(arithmetic_dtype(weights.dtype))
        return self.scheme.grid(self.scheme.absmax(wide), self.logit_dead_zone, self.logit_bits)

    @torch.no_grad()
    def integers(self, weights: torch.Tensor) -> IntegerTensor:
        """Return the integer form of the quantised weights."""
        grid = self.grid(weights)
        codes = grid.codes(weights.to(arithmetic_dtype(weights.dtype)))
        return IntegerTensor(
            bits=int(grid.bits),
            dead_zone=float(grid.dead_zone),
            step=float(grid.step),
            shift=float(grid.shift),
            codes=codes.to(torch.int8 if grid.bits <= 8 else torch.int16),
            dtype=weights.dtype,
        )

    def extra_repr(self) -> str:
        """Return the scheme for the module's repr."""
        return str(self.scheme)


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        logit_dead_zone: torch.Tensor,
        logit_bits: torch.Tensor | None,
        scheme: Scheme,
    ) -> torch.Tensor:
        wide = weights.to(arithmetic_dtype(weights.dtype))
        absmax = scheme.absmax(wide)
        grid = scheme.grid(absmax, logit_dead_zone, logit_bits)
        ctx.save_for_backward(weights, absmax, logit_dead_zone, logit_bits)
        ctx.scheme = scheme
        return grid.values(grid.codes(wide), weights.dtype)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None]:
        # With round, clamp and relu passed straight through, e = sign(code) - sign(w) and r the signed position:
        # dw^/dd = e/2 - (code - r - e/2)/(2Q - 1) and dw^/dQ = -(a - d/2)(code - r - e/2)/(Q - 1/2)^2.
        # Both are sums of two terms, over the dead weights and over the rounding errors.
        weights, absmax, logit_dead_zone, logit_bits = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        to_weights = gradient * (weights != 0) if scheme.reference else gradient
        if not any(ctx.needs_input_grad[1:3]):
            return to_weights, None, None, None
        wide = weights.to(absmax.dtype)
        grid = scheme.grid(absmax, logit_dead_zone, logit_bits)
        positions = grid.positions(wide)
        codes = positions.round().clamp_max_(grid.top)
        if not scheme.reference:
            positions.clamp_max_(grid.top)
        outward = gradient.to(absmax.dtype) * wide.sign()
        dead = (outward * (codes == 0)).sum() / -2
        rounding = outward.mul_(codes.sub_(positions)).sum()
        share = 1 / (2 * grid.top - 1)
        slope = -2 * absmax * scheme.openness(logit_dead_zone)[1]
        to_dead_zone = ((1 + share) * dead - share * rounding) * slope
        if logit_bits is None:
            return to_weights, to_dead_zone.to(logit_dead_zone.dtype), None, None
        to_top = -(absmax - grid.dead_zone / 2) / (grid.top - 0.5) ** 2 * (rounding - dead)
        slope = math.log(2) * 2 ** (grid.bits - 1) * (scheme.max_bits - MIN_BITS) * scheme.openness(logit_bits)[1]
        return to_weights, to_dead_zone.to(logit_dead_zone.dtype), (to_top * slope).to(logit_bits.dtype), None


def quantile_and_maximum(magnitudes: torch.Tensor, quantile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the quantile (linear interpolation between ranks) and the maximum of non-negative numbers.

    Parameters
    ----------
    magnitudes
        One dimension, at least one entry, float32 or float64; on the CPU they are reordered in place.
    quantile
        In [0, 1].

    Notes
    -----
    One selection finds both neighbouring ranks. The values, and so the result, don't depend on the algorithm.
    """
    position = quantile * (len(magnitudes) - 1)
    lower = math.floor(position)
    upper = min(lower + 1, len(magnitudes) - 1)
    if magnitudes.device.type == "cpu":
        magnitudes.numpy().partition((lower, upper))
        low, high, largest = magnitudes[lower], magnitudes[upper], magnitudes[lower:].max()
    else:
        tail = torch.topk(magnitudes, len(magnitudes) - lower).values
        low, high, largest = tail[-1], tail[lower - upper - 1], tail[0]
    return low + (position - lower) * (high - low), largest
