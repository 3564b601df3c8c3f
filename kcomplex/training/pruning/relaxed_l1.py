"""R-L1: the sum of magnitudes chooses the weights, and no longer pulls at them while they are fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.pruning.pruning import Pruning


@dataclass(frozen=True)
class RelaxedL1(Pruning):
    """Prices weights by their magnitude, prunes, and fine-tunes what is left free of the penalty.

    Relaxed, as in the relaxed lasso: the penalty's bias towards zero ends with the regularised phase. Its price is one
    of magnitude 1, not of a weight, so that the loss is a description length only in its unit.

    Parameters
    ----------
    bits_per_parameter, alpha, samples, rising_epochs, tolerance, error_tolerance, cleaning, include, exclude
        See `Pruning`; the price is of a magnitude of 1.
    l2
        Weight of the sum of squares, in nats a sample.

    References
    ----------
    N. Meinshausen: Relaxed lasso. Computational Statistics & Data Analysis 52, 2007. L. S. Barth, P. von Petersenn:
    Efficient compression of neural networks and datasets. arXiv:2505.17469, 2025.
    """

    l2: float = 0.0
    name: ClassVar[str] = "relaxed_l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_outside(self, l2="[0, inf)")

    def regulariser(self) -> torch.Tensor:
        """Return alpha times the sum of magnitudes, in nats a sample, and the squares."""
        state = self.pruned_state
        total = self.no_penalty()
        for weights in state.wide():
            total = total + state.present_price * weights.abs().sum()
            if self.l2:
                total = total + self.l2 * weights.square().sum()
        return total
