"""Baseline: the plain network, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from kcomplex.training.protocol.mode import Mode


@dataclass(frozen=True)
class Baseline(Mode):
    """Trains the network as it is."""

    name: ClassVar[str] = "baseline"

    def attach(self, model: nn.Module) -> None:
        """Keep nothing of a model, which isn't changed."""
