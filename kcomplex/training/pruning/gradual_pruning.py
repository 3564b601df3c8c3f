"""Gradual pruning: magnitude pruning on a cubic schedule, the usual baseline of the pruning methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.protocol.mode import Evaluate
from kcomplex.training.pruning.masked import Masked


@dataclass(frozen=True)
class GradualPruning(Masked):
    r"""Prunes more and more of the smallest weights: :math:`s_t = s_f + (s_i - s_f)(1 - (t - t_0)/T)^3`.

    Parameters
    ----------
    scope, include, exclude
        See `Masked`.
    zeros
        The final share s_f of pruned weights, in [0, 1).
    initial_zeros
        The share s_i at the beginning, at most `zeros`.
    begin
        The step t_0 at which pruning begins.
    span
        Number T of steps from there to the final share. Where fine-tuning begins earlier, the rest is pruned then.
    every
        Steps from one pruning to the next.

    References
    ----------
    M. Zhu, S. Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression.
    arXiv:1710.01878, 2017 (equation 1; there every tensor is pruned to the same share).
    """

    zeros: float = 0.9
    initial_zeros: float = 0.0
    begin: int = 0
    span: int = 1000
    every: int = 50
    name: ClassVar[str] = "gradual_pruning"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_outside(self, zeros="[0, 1)", initial_zeros=f"[0, {self.zeros}]", begin="[0, inf)")
        refuse_outside(self, span="[1, inf)", every="[1, inf)")

    def zeros_at(self, step: int) -> float:
        """Return the share that is pruned after a step, as the schedule has it."""
        if step < self.begin:
            return 0.0
        left = max(0.0, 1 - (step - self.begin) / self.span)
        return self.zeros + (self.initial_zeros - self.zeros) * left**3

    def after_step(self) -> None:
        """Prune, where it is time, and keep at zero what is pruned."""
        state = self.state
        state.steps += 1
        since = state.steps - self.begin
        due = 0 <= since < self.span and since % self.every == 0
        if (due or since == self.span) and not state.rest.get("final"):
            self.prune_to(self.zeros_at(state.steps))
        else:
            self.apply_masks()

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Prune to the final share."""
        self.state.rest["final"] = True
        self.prune_to(self.zeros)
