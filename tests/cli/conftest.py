"""The command line, through the installed entry point, in processes of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from select import select
from subprocess import PIPE, CompletedProcess

import pytest

from tests.children import PATIENCE, Children
from tests.children import run as run_child

COMMAND = Path(sys.executable).with_name("kcomplex")


@pytest.fixture(scope="session")
def run_installed() -> Callable[..., CompletedProcess[str]]:
    """Return a function that runs the script ``kcomplex`` with arguments and returns the finished process."""

    def run_command(*arguments: str, cwd: Path | None = None) -> CompletedProcess[str]:
        return run_child([COMMAND, *arguments], env=environment(), cwd=cwd, check=False)

    return run_command


# Imports once what takes a process seconds, and forks for each command line. -P: like a script, it doesn't import what
# lies in the working directory.
_NURSERY = """
import json, os, sys
from importlib.metadata import entry_points
import torch
[command] = entry_points(group="console_scripts", name="kcomplex")
main = command.load()
for line in sys.stdin:
    arguments, folder, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for number, path in enumerate((os.devnull, out, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.argv = ["kcomplex", *arguments]
        sys.exit(main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., CompletedProcess[str]]]:
    """Return a function that does what the script would, in a process that has imported torch already."""
    folder = tmp_path_factory.mktemp("commands")
    with Children() as children:
        nursery = children.start(
            [sys.executable, "-P", "-c", _NURSERY], stdin=PIPE, stdout=PIPE, text=True, env=environment()
        )

        def run_command(*arguments: str | Path, cwd: Path = folder) -> CompletedProcess[str]:
            out, err = (folder / name for name in ("out", "err"))
            for path in (out, err):
                path.write_text("")
            command = list(map(str, arguments))
            print(json.dumps([command, str(cwd), str(out), str(err)]), file=nursery.stdin, flush=True)
            assert select([nursery.stdout], [], [], PATIENCE)[0], f"kcomplex {command} doesn't end"
            code = int(nursery.stdout.readline())
            return CompletedProcess(command, code, out.read_text(), err.read_text())

        yield run_command


def environment() -> dict[str, str]:
    return {**os.environ, "MPLBACKEND": "agg", "COLUMNS": "160"}


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
        answer = run_child([sys.executable, "-c", _ONE_PROCESS, json.dumps(commands)], env=environment())
        return [tuple(pair) for pair in json.loads(answer.stdout)]

    return run_commands
