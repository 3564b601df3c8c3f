"""Packages installed into folders of their own, and Python processes that see them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.children import run as run_child

Install = Callable[[Path, Path], None]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def install() -> Install:
    """Return a function that installs a project's folder into a target folder, without its dependencies."""

    def install_into(project: Path, target: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        answer = run_child(
            [*command, "--disable-pip-version-check", "--target", str(target), str(project)],
            check=False,
        )
        assert answer.returncode == 0, answer.stderr

    return install_into


@pytest.fixture(scope="session")
def python() -> Python:
    """Return a function that runs Python in a folder, with another folder before everything else on its path."""

    def run(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if path is not None:
            environment["PYTHONPATH"] = str(path)
        return run_child([sys.executable, *arguments], check=False, cwd=cwd, env=environment)

    return run
