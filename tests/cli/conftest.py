"""The real command line, through the installed entry point."""

from __future__ import annotations

import json
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


# The entry point, once for each of several command lines.
_ONE_PROCESS = """
import contextlib, io, json, sys, traceback
from kcomplex.cli.main import main
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:], told, code = arguments, io.StringIO(), 0
    with contextlib.redirect_stderr(told):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    answers.append([code, told.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def run_all() -> Callable[[list[list[str]]], list[tuple[int, str]]]:
    """Return a function that runs several command lines in one process, which takes seconds to import torch.

    It returns the exit code of each, and what it wrote to standard error.
    """

    def run_commands(commands: list[list[str]]) -> list[tuple[int, str]]:
        answer = subprocess.run(
            [sys.executable, "-c", _ONE_PROCESS, json.dumps(commands)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "MPLBACKEND": "agg", "COLUMNS": "160"},
            check=True,
        )
        return [tuple(pair) for pair in json.loads(answer.stdout)]

    return run_commands
