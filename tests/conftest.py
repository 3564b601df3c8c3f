"""What holds for every test."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests import what they share as `tests.…`, however pytest was started.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# In child processes, too: small networks are slower in several threads, and much slower on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.children import Children, dismiss_guard, interrupt

# How long an example takes depends on what else the machine does.
_UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", **_UNTIMED)
settings.register_profile("ci", **_UNTIMED, derandomize=True, database=None, print_blob=True)
settings.load_profile("default")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    # At once, these would leave what fixtures end.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


def pytest_unconfigure() -> None:
    dismiss_guard()


@pytest.fixture
def children() -> Iterator[Children]:
    """Processes that are ended, with all that they started, when the test has ended."""
    with Children() as started:
        yield started
