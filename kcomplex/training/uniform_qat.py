"""Quantisation-aware training with a uniform quantiser, the common baseline of the quantising methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.mode import WEIGHT_LAYERS, Mode
from kcomplex.training.parametrised import arithmetic_dtype, parametrise, share_of_zeros

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
        Patterns on names of parameters or modules, or on types; see `kcomplex.training.mode.chosen_parameters`. By
        default the weights of linear, convolution, embedding and attention layers.

    Raises
    ------
    SpecError
        The number of bits is out of range.

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
        if not 2 <= self.bits <= _FULL_PRECISION:
            raise SpecError(f"uniform_qat: bits must be 2 to {_FULL_PRECISION}, not {self.bits}")

    def prepare(self, model: nn.Module) -> None:
        """Attach to a model: the chosen weights are read through the quantiser from now on."""
        self.refuse_second_model()
        quantiser = _UniformQuantiser(self.bits, self.per_channel)
        quantised = parametrise(model, WEIGHT_LAYERS, self.include, self.exclude, lambda _: quantiser)
        object.__setattr__(self, "_quantised", tuple(quantised))
        self.attach_to(model)

    def report(self) -> dict[str, float]:
        """Return ``zeros``, the share of quantised weights that are zero."""
        return {"zeros": share_of_zeros(self.model, self.__dict__["_quantised"])}


def quantise_uniformly(weights: torch.Tensor, bits: int, per_channel: bool = False) -> torch.Tensor:
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
    """
    if bits >= _FULL_PRECISION or not weights.numel():
        return weights
    quantised: torch.Tensor = _QuantiseUniformly.apply(weights, bits, per_channel)  # type: ignore[no-untyped-call]
    return quantised


class _QuantiseUniformly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, bits: int, per_channel: bool) -> torch.Tensor:
        wide = weights.to(arithmetic_dtype(weights.dtype))
        top = 2 ** (bits - 1) - 1
        axes = tuple(range(1, weights.ndim)) if per_channel else tuple(range(weights.ndim))
        scale = (wide.abs().amax(axes, keepdim=True) if axes else wide.abs()) / top
        # Where all is zero any scale will do; this one spares the division by zero.
        scale = torch.where(scale == 0, 1, scale)
        codes = (wide / scale).round_().clamp_(-top, top)
        # Adding zero turns -0.0 into 0.0, which would otherwise be one value more to store.
        return codes.mul_(scale).to(weights.dtype).add_(0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


class _UniformQuantiser(nn.Module):
    def __init__(self, bits: int, per_channel: bool) -> None:
        super().__init__()
        self.bits = bits
        self.per_channel = per_channel

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        return quantise_uniformly(weights, self.bits, self.per_channel)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}"
