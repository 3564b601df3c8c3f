"""A controller that brings a measured mean to a target by moving logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# Steps from one measurement to the next.
INTERVAL = 10
# Share of an error that a measurement adds to the pressure. The error itself is corrected at once, so that what is left
# obeys z^2 - z + 0.3 = 0, which is well damped.
_INTEGRAL = 0.3
# An optimiser that normalises the loss's pull moves a logit by at most a learning rate a step: this overcomes it.
_FASTEST = 3.0
# Beyond these the quantiser is as good as closed or open, and a logit would take long to come back.
_LOWEST, _HIGHEST = -1.5, 4.5
# Where the mean hardly answers, the motion is as fast as it may be.
_FLATTEST = 1e-3


@dataclass
class Controller:
    """Control of a mean that falls as logits rise; between measurements the loss pulls at the logits.

    Attributes
    ----------
    target
        Of the mean.
    speed
        Learning rate of the logits, which move by at most three of it a step.
    tolerance
        Errors up to this are left alone, for means that can't take every value.
    pressure
        What an interval's pull of the loss is worth, in units of the logits.
    """

    target: float
    speed: float
    tolerance: float = 0.0
    pressure: float = 0.0

    @torch.no_grad()
    def move(self, logits: Iterable[torch.Tensor], measured: float, answer: float) -> None:
        """Move logits, all alike, down for the `INTERVAL` steps to come, or up where that is negative.

        ``measured`` is the mean now, and ``answer`` by how much it would grow if the logits fell by one, not negative.
        """
        error = self.target - measured
        way = 0.0 if abs(error) <= self.tolerance else error / max(answer, _FLATTEST)
        farthest = _FASTEST * INTERVAL * self.speed
        # On a long way the integral would pile up and overshoot.
        if abs(way) < farthest:
            self.pressure = max(-farthest, min(farthest, self.pressure + _INTEGRAL * way))
        drift = max(-farthest, min(farthest, self.pressure + way))
        for logit in logits:
            logit.sub_(drift).clamp_(_LOWEST, _HIGHEST)
