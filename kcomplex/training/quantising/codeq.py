"""CoDeQ: quantisation with a dead zone whose width, and optionally the number of bits, are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.protocol.mode import Evaluate, Mode, ParameterGroups, latent
from kcomplex.training.protocol.parametrised import effective, parametrise
from kcomplex.training.quantising.controller import INTERVAL, Controller
from kcomplex.training.quantising.dead_zone import MIN_BITS, DeadZoneQuantiser, IntegerTensor, Scheme

_MAX_BITS = 16
# Motion of the logits that shows how the share of zeros answers.
_PROBE = 0.05


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

    With a target the decay is left to a controller: it measures the share of zeros (or the mean bits) every ten steps
    and moves all logits by as much as it takes, whatever the optimiser; the loss still shares the zeros out among
    tensors. A target is reached some ``1 / learning rate`` steps after the start and held from then on;
    `begin_fine_tuning` fixes the logits for the last epochs.

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
    target_zeros
        Share of the quantised weights that shall be zero, in [0, 1), in place of the dead zones' decay.
    target_bits
        Mean bits a quantised weight, 2 to `max_bits`, in place of the bits' decay.
    per_channel
        A top level, and so a step, for each row of the first axis instead of one a tensor; the logits stay one a
        tensor.
    quantile
        Of the magnitudes, the top level, in (0, 1]; not differentiated.
    include, exclude
        See `Mode`.
    reference
        Exactly the published forms, for comparison: ``p = |tanh t|``, whose gradient is zero at t = 0; no gradient for
        weights that are exactly zero; a step widened by the absolute 1e-8; a = 0 where the quantile is 0. The default
        mends these: the quantile 0 is replaced by the maximum, the step is widened relative to a, weights that are
        zero have a gradient, and clipped weights don't move the levels.

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
    target_zeros: float | None = None
    target_bits: float | None = None
    per_channel: bool = False
    quantile: float = 0.99
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    reference: bool = False
    name: ClassVar[str] = "codeq"

    def __post_init__(self) -> None:
        refuse_outside(self, bits=f"[{MIN_BITS}, {_MAX_BITS}]", max_bits=f"[{MIN_BITS + 1}, {_MAX_BITS}]")
        refuse_outside(self, quantile="(0, 1]", target_zeros="[0, 1)")
        if self.target_bits is not None and not (self.learnable_bits and MIN_BITS <= self.target_bits <= self.max_bits):
            raise SpecError(
                f"codeq: target_bits={self.target_bits} needs learnable_bits=true, and to be {MIN_BITS} to max_bits="
                f"{self.max_bits}"
            )
        if self.reference and (self.per_channel or self.target_zeros is not None or self.target_bits is not None):
            raise SpecError("codeq: reference=true is the published method, without targets and channels")

    def attach(self, model: nn.Module) -> _State:
        """Return the quantisers that the chosen weights are read through from now on, and controllers of targets."""
        quantisers = parametrise(model, self.include, self.exclude, self._quantiser)
        controllers = {}
        if self.target_zeros is not None:
            controllers["dead_zone"] = Controller(self.target_zeros, self.dead_zone_lr)
        if self.target_bits is not None:
            # Fewer bits are more of what the controller raises. Whole bits of whole tensors come no closer than half of
            # the largest one's.
            sizes = [quantised.numel() for _, quantised in effective(model, quantisers)]
            controllers["bits"] = Controller(-self.target_bits, self.bits_lr, max(sizes) / sum(sizes) / 2)
        return _State(quantisers, controllers)

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> ParameterGroups:
        """Return three groups, or two at fixed precision: the model's own parameters, dead zones, bits."""
        dead_zones, bits = self.state.logits()
        own = {id(logit) for logit in (*dead_zones, *bits)}
        base = [part for part in self.model.parameters() if part.requires_grad and id(part) not in own]
        # A controller takes the place of the decay.
        decays = (
            self.dead_zone_weight_decay if self.target_zeros is None else 0.0,
            self.bits_weight_decay if self.target_bits is None else 0.0,
        )
        groups: ParameterGroups = [
            {"params": base, "lr": lr, "weight_decay": weight_decay},
            {"params": dead_zones, "lr": self.dead_zone_lr, "weight_decay": decays[0]},
        ]
        if bits:
            groups.append({"params": bits, "lr": self.bits_lr, "weight_decay": decays[1]})
        return groups

    def after_step(self) -> None:
        """Move the logits towards the targets, where there are some."""
        state: _State = self.state
        if state.fixed or not state.controllers:
            return
        state.steps += 1
        if state.steps % INTERVAL:
            return
        dead_zones, bits = state.logits()
        if "dead_zone" in state.controllers:
            zeros = self._share_of_zeros()
            answer = (self._share_of_zeros(-_PROBE) - zeros) / _PROBE
            state.controllers["dead_zone"].move(dead_zones, zeros, answer)
        if "bits" in state.controllers:
            answer = self._mean(lambda quantiser, _: quantiser.slope_of_bits)
            state.controllers["bits"].move(bits, -self._mean_bits(), answer)

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Fix dead zones and bits, so that the last epochs adapt the weights to them."""
        self._fix(fixed=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what the controllers remember, and whether the logits are fixed."""
        state = self.state
        pressures = {name: controller.pressure for name, controller in state.controllers.items()}
        return {"steps": state.steps, "pressures": pressures, "fixed": state.fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; see `Mode.load_state_dict`."""
        mine = self.state
        if state["pressures"].keys() != mine.controllers.keys():
            raise SpecError(f"the state isn't one of {self.spec!r}: it has targets of {list(state['pressures'])}")
        mine.steps = state["steps"]
        for name, pressure in state["pressures"].items():
            mine.controllers[name].pressure = pressure
        self._fix(fixed=state["fixed"])

    def report(self) -> dict[str, float]:
        """Return ``zeros``, the share of quantised weights that are zero, and ``bits``, the mean over the weights."""
        return {"zeros": self._share_of_zeros(), "bits": self._mean_bits()}

    def integers(self) -> dict[str, IntegerTensor]:
        """Return the integer form of every quantised parameter by its full name; see `integers`."""
        return {full: quantiser.integers(weights.detach()) for full, quantiser, weights in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, DeadZoneQuantiser, nn.Parameter]]:
        for full, quantiser in self.state.quantisers.items():
            path, _, name = full.rpartition(".")
            yield full, quantiser, latent(self.model.get_submodule(path), name)

    def _share_of_zeros(self, offset: float = 0.0) -> float:
        return self._mean(lambda quantiser, weights: quantiser.zeros(weights, offset) / weights.numel())

    def _mean_bits(self) -> float:
        return self._mean(lambda quantiser, _: quantiser.bits)

    def _mean(self, of: Callable[[DeadZoneQuantiser, nn.Parameter], float]) -> float:
        """Return a mean over the quantised weights."""
        total, elements = 0.0, 0
        for _, quantiser, weights in self._tensors():
            total += of(quantiser, weights) * weights.numel()
            elements += weights.numel()
        return total / elements

    def _fix(self, *, fixed: bool) -> None:
        state = self.state
        state.fixed = fixed
        for logits in state.logits():
            for logit in logits:
                logit.requires_grad_(not fixed)
                logit.grad = None

    def _quantiser(self, parameter: nn.Parameter) -> DeadZoneQuantiser:
        scheme = Scheme(self.bits, self.max_bits, self.quantile, self.reference, self.per_channel)
        return DeadZoneQuantiser(scheme, self.learnable_bits, self.initial_logit, parameter.device)


@dataclass
class _State:
    quantisers: dict[str, DeadZoneQuantiser]
    controllers: dict[str, Controller]
    steps: int = 0
    fixed: bool = False

    def logits(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the logits of dead zones and of bits."""
        quantisers = self.quantisers.values()
        bits = [quantiser.logit_bits for quantiser in quantisers if quantiser.logit_bits is not None]
        return [quantiser.logit_dead_zone for quantiser in quantisers], bits
