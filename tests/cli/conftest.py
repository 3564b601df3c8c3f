"""The real command line, through the installed entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("kcomplex")


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``kcomplex`` with arguments and returns the finished process."""

    def run_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MPLBACKEND": "agg", "COLUMNS": "160"}
        return subprocess.run(
            [str(COMMAND), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            cwd=cwd,
            check=False,
        )

    return run_command
