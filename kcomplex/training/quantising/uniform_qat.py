"""Quantisation-aware training with a uniform quantiser, the common baseline of the quantising methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.protocol.mode import Mode
from kcomplex.training.protocol.parametrised import HoldingQuantiser, arithmetic_dtype, parametrise, share_of_zeros

# From here on a float32 weight is kept as it is.
_FULL_PRECISION = 32


@dataclass(frozen=True)
class UniformQAT(Mode):
    """Trains through a symmetric uniform quantiser with the straight-through estimator.

    Parameters
    ----------
    bits
        Bits a weight, 2 to 32; ``2**bits - 1`` levels. 32 leaves the weights as they are.
    per_channel
        One scale for each row of the first axis instead of one a tensor.
    include, exclude
        See `Mode`.

    References
    ----------
    Y. Bengio, N. Léonard, A. Courville: Estimating or propagating gradients through stochastic neurons for conditional
    computation. arXiv:1308.3432, 2013 (the straight-through estimator). B. Jacob et al.: Quantization and training of
    neural networks for efficient integer-arithmetic-only inference. CVPR 2018.
    """

    bits: int = 4
    per_channel: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    name: ClassVar[str] = "uniform_qat"

    def __post_init__(self) -> None:
        refuse_outside(self, bits=f"[2, {_FULL_PRECISION}]")

    def attach(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the chosen weights, which are read through the quantiser from now on."""
        made = parametrise(model, self.include, self.exclude, lambda _: UniformQuantiser(self.bits, self.per_channel))
        return tuple(made)

    def report(self) -> dict[str, float]:
        """Return ``zeros``, the share of quantised weights that are zero."""
        return {"zeros": share_of_zeros(self.model, self.state)}


def quantise_uniformly(
    weights: torch.Tensor, bits: int, per_channel: bool = False, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return weights rounded to multiples of ``scale = max|w| / q`` with ``q = 2**(bits - 1) - 1``.

    The gradient passes straight through. Rounding is half to even; zeros are positive zeros; an all-zero tensor stays.

    Parameters
    ----------
    weights
        Floating-point tensor of any shape. Shorter dtypes than float32 are quantised in float32.
    bits
        2 or more; from 32 on the weights are returned as they are.
    per_channel
        One scale for each row of the first axis instead of one a tensor.
    scale
        Another scale than `uniform_scale`; what is beyond the last level is clipped.
    """
    if bits >= _FULL_PRECISION or not weights.numel():
        return weights
    if scale is None:
        scale = uniform_scale(weights, bits, per_channel)
    quantised: torch.Tensor = _QuantiseUniformly.apply(weights, bits, scale)  # type: ignore[no-untyped-call]
    return quantised


def uniform_scale(weights: torch.Tensor, bits: int, per_channel: bool = False) -> torch.Tensor:
    """Return ``max|w| / (2**(bits - 1) - 1)``, of a shape that broadcasts against the weights; 1 where all is zero."""
    wide = weights.detach().to(arithmetic_dtype(weights.dtype))
    axes = tuple(range(1, weights.ndim)) if per_channel else tuple(range(weights.ndim))
    scale = (wide.abs().amax(axes, keepdim=True) if axes else wide.abs()) / (2 ** (bits - 1) - 1)
    # Where all is zero any scale will do; this one spares the division by zero.
    return torch.where(scale == 0, 1, scale)


class _QuantiseUniformly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, bits: int, scale: torch.Tensor) -> torch.Tensor:
        top = 2 ** (bits - 1) - 1
        symbols = (weights.to(scale.dtype) / scale).round_().clamp_(-top, top)
        # Adding zero turns -0.0 into 0.0, which would otherwise be one value more to store.
        return symbols.mul_(scale).to(weights.dtype).add_(0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


class UniformQuantiser(HoldingQuantiser):
    """The parametrisation of one tensor; see `UniformQAT`."""

    def __init__(self, bits: int, per_channel: bool) -> None:
        super().__init__()
        self._bits = bits
        self.per_channel = per_channel

    @property
    def bits(self) -> int:
        """Bits a symbol."""
        return self._bits

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the quantised weights."""
        return quantise_uniformly(weights, self.bits, self.per_channel, self.held)

    def hold(self, weights: torch.Tensor) -> None:
        """Keep the scale that these weights have."""
        self.held = uniform_scale(weights, self.bits, self.per_channel)

    def coordinates(self, weights: torch.Tensor) -> torch.Tensor:
        """Return ``w / scale``."""
        scale = self._scale(weights)
        return weights.detach().to(scale.dtype) / scale

    def weights_at(self, coordinates: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return ``scale * coordinates``."""
        scale = self._scale(like)
        return (coordinates.to(scale) * scale).to(like.dtype).add_(0.0)

    def _scale(self, weights: torch.Tensor) -> torch.Tensor:
        return uniform_scale(weights, self.bits, self.per_channel) if self.held is None else self.held

    def extra_repr(self) -> str:
        """Return the configuration for the module's repr."""
        return f"bits={self.bits}, per_channel={self.per_channel}"
