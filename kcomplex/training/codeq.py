"""CoDeQ: quantisation with a dead zone whose width, and optionally the number of bits, are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.dead_zone import MIN_BITS, DeadZoneQuantiser, IntegerTensor, Scheme
from kcomplex.training.mode import WEIGHT_LAYERS, Mode, ParameterGroups
from kcomplex.training.parametrised import parametrise

_MAX_BITS = 16


@dataclass(frozen=True)
class CoDeQ(Mode):
    r"""Trains through a dead-zone quantiser: pruning and quantisation learned together.

    A tensor's levels are 0 and :math:`\pm(d/2 + (j - 1/2)s)`, :math:`j = 1 \ldots Q`, with the dead zone
    :math:`d = 2a(1 - p)`, the step :math:`s = (a - d/2)/(Q - 1/2)`, :math:`Q = 2^{b-1} - 1`, and a the `quantile` of
    :math:`|w|`, which is the top level. What is below :math:`d/2` becomes zero, what is above a is clipped. The logit t
    opens the quantiser, :math:`p = 1/(1 + e^{3 - 2t})`: t = 3 is a narrow dead zone (d = 0.09 a), t = 0 a wide one
    (d = 1.9 a). Learned bits are :math:`b = \mathrm{round}(2 + (b_{max} - 2)p)` of a logit of their own.

    The pressure is weight decay on the logits, which pulls them to 0. The logits' own parameter groups are meant for
    AdamW, which decouples it: then learning rate x weight decay is the speed (a share of the logit per step) and
    1 / weight decay the target, because the loss's pull, at most one learning rate a step, balances the decay at
    ``t <= 1 / weight decay``. SGD doesn't normalise the loss's pull: it needs far smaller rates for the logits.

    Parameters
    ----------
    bits
        Bits a weight, 2 to 16, at fixed precision.
    learnable_bits
        Learn every tensor's bits, 2 to ``max_bits``, and ignore ``bits``.
    max_bits
        3 to 16.
    initial_logit
        Of dead zones and bits.
    dead_zone_lr, dead_zone_weight_decay
        Of the dead zones' logits.
    bits_lr, bits_weight_decay
        Of the bits' logits.
    quantile
        Of the magnitudes, the top level, in (0, 1]; not differentiated.
    include, exclude
        Shell-style globs on parameter names. By default the weights of linear, convolution, embedding
        and attention layers.
    reference
        Exactly the published forms, for comparison: ``p = |tanh t|``, whose gradient is zero at t = 0; no gradient for
        weights that are exactly zero; a step widened by the absolute 1e-8; a = 0 where the quantile is 0. The default
        mends these: the quantile 0 is replaced by the maximum, the step is widened relative to a, weights that are
        zero have a gradient, and clipped weights don't move the levels.

    Raises
    ------
    SpecError
        A value is out of range.

    Notes
    -----
    The logits are parameters of the model's parametrisations, so the model's own state dict holds them.

    References
    ----------
    J. Wenshøj, T. Chen, B. Pepin, R. Selvan: CoDeQ: end-to-end joint model compression with dead-zone quantizer for
    high-sparsity and low-precision networks. arXiv:2512.12981, 2025.
    """

    bits: int = 4
    learnable_bits: bool = False
    max_bits: int = 8
    initial_logit: float = 3.0
    dead_zone_lr: float = 3e-3
    dead_zone_weight_decay: float = 1.0
    bits_lr: float = 3e-3
    bits_weight_decay: float = 1.0
    quantile: float = 0.99
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    reference: bool = False
    name: ClassVar[str] = "codeq"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= _MAX_BITS:
            raise SpecError(f"codeq: bits must be {MIN_BITS} to {_MAX_BITS}, not {self.bits}")
        if not MIN_BITS < self.max_bits <= _MAX_BITS:
            raise SpecError(f"codeq: max_bits must be {MIN_BITS + 1} to {_MAX_BITS}, not {self.max_bits}")
        if not 0 < self.quantile <= 1:
            raise SpecError(f"codeq: quantile must be in (0, 1], not {self.quantile}")

    def prepare(self, model: nn.Module) -> None:
        """Attach to a model: the chosen weights are read through the quantiser from now on."""
        self.refuse_second_model()
        quantisers = parametrise(model, WEIGHT_LAYERS, self.include, self.exclude, self._quantiser)
        object.__setattr__(self, "_quantisers", quantisers)
        self.attach_to(model)

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> ParameterGroups:
        """Return three groups, or two at fixed precision: the model's own parameters, dead zones, bits."""
        model, quantisers = self._attached()
        dead_zones = [quantiser.logit_dead_zone for quantiser in quantisers.values()]
        bits = [quantiser.logit_bits for quantiser in quantisers.values() if quantiser.logit_bits is not None]
        own = {id(logit) for logit in (*dead_zones, *bits)}
        base = [part for part in model.parameters() if part.requires_grad and id(part) not in own]
        groups: ParameterGroups = [
            {"params": base, "lr": lr, "weight_decay": weight_decay},
            {"params": dead_zones, "lr": self.dead_zone_lr, "weight_decay": self.dead_zone_weight_decay},
        ]
        if bits:
            groups.append({"params": bits, "lr": self.bits_lr, "weight_decay": self.bits_weight_decay})
        return groups

    def report(self) -> dict[str, float]:
        """Return ``zeros``, the share of quantised weights that are zero, and ``bits``, the mean over the weights."""
        zeros = bits = elements = 0
        for tensor in self.integers().values():
            zeros += int((tensor.codes == 0).sum())
            bits += tensor.bits * tensor.codes.numel()
            elements += tensor.codes.numel()
        return {"zeros": zeros / elements, "bits": bits / elements}

    def integers(self) -> dict[str, IntegerTensor]:
        """Return the integer form of every quantised parameter by its full name."""
        model, quantisers = self._attached()
        integers = {}
        for full, quantiser in quantisers.items():
            path, _, name = full.rpartition(".")
            latent = model.get_submodule(path).get_parameter(f"parametrizations.{name}.original")
            integers[full] = quantiser.integers(latent.detach())
        return integers

    def _attached(self) -> tuple[nn.Module, dict[str, DeadZoneQuantiser]]:
        return self.model, self.__dict__["_quantisers"]

    def _quantiser(self, parameter: nn.Parameter) -> DeadZoneQuantiser:
        scheme = Scheme(self.bits, self.max_bits, self.quantile, self.reference)
        return DeadZoneQuantiser(scheme, self.learnable_bits, self.initial_logit, parameter.device)
