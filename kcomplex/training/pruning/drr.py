"""DRR: a smooth count of the non-zero weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch

from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.pruning.pruning import Pruning


@dataclass(frozen=True)
class DRR(Pruning):
    r"""Prices weights by a smooth count, which saturates: large weights aren't pulled.

    .. math:: \alpha \sum_i \nu_i (1 - e^{-\beta |\theta_i|}) + \rho \sum_i \theta_i^2

    The slope at zero is alpha beta; with growing beta the sum becomes the number of non-zero weights. `Pruning` tells
    what happens after the regularised phase.

    Parameters
    ----------
    bits_per_parameter, alpha, samples, rising_epochs, tolerance, error_tolerance, cleaning, include, exclude
        See `Pruning`.
    beta
        Sharpness of the count, positive.
    l2
        The weight rho of the squares, in nats a sample.
    per_layer
        Weigh a layer by ``nu = total / (its weights * number of layers)``, so that every layer counts alike; otherwise
        nu is 1 everywhere. A layer is the module that the parameters are in.

    References
    ----------
    A. de Resende Oliveira, N. Batista, R. Seara: arXiv:2109.05075, 2021. L. S. Barth, P. von Petersenn: Efficient
    compression of neural networks and datasets. arXiv:2505.17469, 2025.
    """

    beta: float = 5.0
    l2: float = 0.0
    per_layer: bool = False
    name: ClassVar[str] = "drr"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_outside(self, beta="(0, inf)", l2="[0, inf)")

    def regulariser(self) -> torch.Tensor:
        """Return the smooth count in nats a sample, and the squares."""
        state = self.pruned_state
        total = self.no_penalty()
        for weights, factor in zip(state.wide(), self.layer_factors().values(), strict=True):
            total = total - state.present_price * factor * torch.expm1(weights.abs() * -self.beta).sum()
            if self.l2:
                total = total + self.l2 * weights.square().sum()
        return total

    def layer_factors(self) -> dict[str, float]:
        """Return nu by parameter."""
        weights = self.pruned_state.weights
        if not self.per_layer:
            return dict.fromkeys(weights, 1.0)
        sizes: Counter[str] = Counter()
        for full, parameter in weights.items():
            sizes[full.rpartition(".")[0]] += parameter.numel()
        return {full: sizes.total() / (sizes[full.rpartition(".")[0]] * len(sizes)) for full in weights}
