"""TAMADE: the largest magnitude threshold whose pruning the loss tolerates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from kcomplex.errors import SpecError, WeightsError


@dataclass(frozen=True)
class Threshold:
    """The outcome of a search: the magnitude below which parameters can go, the loss of what is left, evaluations."""

    threshold: float
    loss: float
    evaluations: int


def largest_threshold(
    loss_at: Callable[[float], float],
    upper: float,
    tolerance: float,
    baseline: float | None = None,
    resolution: float = 1e-7,
    absolute: bool = False,
) -> Threshold:
    """Return the largest threshold whose loss exceeds the unpruned one by no more than is tolerated.

    Bisects between 0 and ``upper``, as if the loss grew with the threshold. A threshold whose loss is NaN is too high.

    Parameters
    ----------
    loss_at
        Returns the loss with everything below a threshold pruned.
    upper
        Where to begin; twice the largest magnitude is enough.
    tolerance
        How much worse the loss may be, as a share of the magnitude of the unpruned one, or absolutely.
    baseline
        Loss of the unpruned network; None evaluates ``loss_at(0.0)``.
    resolution
        The search ends when the interval is no longer than this.
    absolute
        The tolerance is in the unit of the loss: for a share of mistakes, which may be zero.

    Raises
    ------
    SpecError
        The tolerance is negative, or the resolution isn't positive.
    WeightsError
        The unpruned network's loss is NaN or infinite, so that nothing can be compared with it.

    References
    ----------
    L. S. Barth, P. von Petersenn: Efficient compression of neural networks and datasets. arXiv:2505.17469, 2025
    (threshold-adaptive mask determination).
    """
    if not tolerance >= 0 or not resolution > 0:
        raise SpecError(f"tolerance must be 0 or more and resolution positive, not {tolerance} and {resolution}")
    evaluations = 0
    if baseline is None:
        baseline = loss_at(0.0)
        evaluations = 1
    if not math.isfinite(baseline):
        raise WeightsError(f"the loss of the unpruned network is {baseline}: no threshold can be compared with it")
    allowed = baseline + tolerance * (1.0 if absolute else abs(baseline))
    low, high, loss = 0.0, upper, baseline
    while high - low > resolution:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        probe = loss_at(middle)
        evaluations += 1
        if probe <= allowed:
            low, loss = middle, probe
        else:
            high = middle
    return Threshold(low, loss, evaluations)


@torch.no_grad()
def prune(parameters: Iterable[torch.Tensor], threshold: float) -> None:
    """Set every entry with a magnitude below the threshold to zero, in place."""
    for parameter in parameters:
        parameter.masked_fill_(parameter.abs() < threshold, 0)


def prune_tolerably(
    parameters: Iterable[torch.Tensor], evaluate: Callable[[], float], tolerance: float, absolute: bool = False
) -> Threshold:
    """Prune parameters in place by one global threshold, as much as the loss tolerates; return the search's outcome.

    `evaluate` returns the loss, or the share of mistakes, of the network that the parameters belong to, on held-out
    data. They are restored if it raises. Tolerance and errors are those of `largest_threshold`.
    """
    parameters = list(parameters)
    kept = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore() -> None:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)

    def loss_at(threshold: float) -> float:
        restore()
        prune(parameters, threshold)
        return evaluate()

    upper = 2 * max((float(values.abs().max()) for values in kept if values.numel()), default=0.0)
    try:
        found = largest_threshold(loss_at, upper, tolerance, absolute=absolute)
    finally:
        restore()
    prune(parameters, found.threshold)
    return found
