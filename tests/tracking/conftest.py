"""A small network and its unchanged training loop, for the tests of tracking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kcomplex.tracking.tracker import Tracker, attach
from kcomplex.tracking.worker import measure_pending
from tests.children import PATIENCE

ESTIMATORS = ("zstd", "raw")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    """A network with buffers, an integer buffer among them."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
    """A training loop of so many steps that knows nothing of tracking."""

    def loop(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()

    return loop


@pytest.fixture
def track(model: nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path) -> Iterator[Callable[..., Tracker]]:
    """`attach`, with the measuring left to the test's own process: it needs no seconds to start."""
    with ExitStack() as stack:

        def begin(**options: Any) -> Tracker:
            given = {
                "model": model, "optimizer": optimizer, "run": tmp_path / "run", "every": None,
                "estimators": ESTIMATORS, "measure": False,
            }  # fmt: skip
            tracker = attach(**{**given, **options})
            stack.callback(leave, tracker)
            return tracker

        yield begin


def leave(tracker: Tracker) -> None:
    """Close a tracker that a test may have left open, and end its measuring process whatever happens."""
    try:
        tracker.close(PATIENCE)
    finally:
        process = tracker._writer.process
        if process is not None:
            process.kill()
            process.wait()


@pytest.fixture
def finish() -> Callable[[Tracker], None]:
    """Close a tracker and measure what it left."""

    def close(tracker: Tracker) -> None:
        tracker.close()
        measure_pending(tracker.run)

    return close
