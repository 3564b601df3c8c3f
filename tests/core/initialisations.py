"""Factories that recipes name in the tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

CALLED = "KCOMPLEX_TEST_CALLED"


def two_layers(width: int = 30) -> nn.Module:
    """A small network; leaves a file behind where the environment asks for it, so that a test sees whether it ran."""
    if CALLED in os.environ:
        Path(os.environ[CALLED]).touch()
    return nn.Sequential(nn.Linear(20, width), nn.BatchNorm1d(width), nn.Linear(width, 5))


def state_dict() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(40, 30)}


def broken() -> nn.Module:
    raise RuntimeError("no such network")
