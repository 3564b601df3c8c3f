"""Fixtures shared by the tests of the analyses."""

from __future__ import annotations

from functools import partial

import pytest

from kcomplex.analyses.experiments import run as running
from kcomplex.tracking.tracker import attach


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs keep their snapshots unmeasured: starting the measuring process takes seconds."""
    monkeypatch.setattr(running, "attach", partial(attach, measure=False))
