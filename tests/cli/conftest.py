"""The command line, through the installed entry point, in processes of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from select import select
from subprocess import PIPE, CompletedProcess
from threading import Thread

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
# lies in the working directory. Whoever started the tests may ignore SIGINT.
_NURSERY = """
import json, os, signal, sys
from importlib.metadata import entry_points
import pandas, torch, kcomplex
for name in kcomplex.__all__:
    getattr(kcomplex, name)
signal.signal(signal.SIGINT, signal.default_int_handler)
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
        try:
            main()
        except SystemExit as end:
            # All of what was imported isn't taken down once for each command, which takes longer than the command.
            os._exit(end.code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """A process that has imported torch, and does what the script would in processes of its own, one at a time."""

    def __init__(self, children: Children) -> None:
        command = [sys.executable, "-P", "-c", _NURSERY]
        self._process = children.start(command, stdin=PIPE, stdout=PIPE, text=True, env=environment())

    def start(self, *arguments: str | Path, cwd: Path, out: str | Path, err: str | Path) -> int:
        """Return the number of a process that begins."""
        order = json.dumps([list(map(str, arguments)), str(cwd), str(out), str(err)])
        print(order, file=self._process.stdin, flush=True)
        return self._answer()

    def end(self) -> int:
        """Return the exit code of the process once it has ended; that of a signal is negative."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        assert select([self._process.stdout], [], [], PATIENCE)[0], "kcomplex doesn't end"
        return int(self._process.stdout.readline())


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Children() as children:
        yield Nursery(children)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Callable[..., CompletedProcess[str]]:
    """Return a function that does what the script would, in a process that has imported torch already."""
    folder = tmp_path_factory.mktemp("commands")

    def run_command(*arguments: str | Path, cwd: Path = folder) -> CompletedProcess[str]:
        out, err = (folder / name for name in ("out", "err"))
        for path in (out, err):
            path.write_text("")
        nursery.start(*arguments, cwd=cwd, out=out, err=err)
        return CompletedProcess(list(map(str, arguments)), nursery.end(), out.read_text(), err.read_text())

    return run_command


@pytest.fixture(scope="session")
def run_on_terminal(
    tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> Callable[..., CompletedProcess[bytes]]:
    """Return a function like `run`, but all output is on a terminal; what came there is the standard output."""
    folder = tmp_path_factory.mktemp("terminal")

    def run_command(*arguments: str | Path, cwd: Path = folder) -> CompletedProcess[bytes]:
        terminal, screen = os.openpty()
        shown: list[bytes] = []
        reader = Thread(target=lambda: shown.extend(_all_of(terminal)))
        reader.start()
        nursery.start(*arguments, cwd=cwd, out=os.ttyname(screen), err=os.ttyname(screen))
        code = nursery.end()
        os.close(screen)
        reader.join()
        os.close(terminal)
        return CompletedProcess(list(map(str, arguments)), code, b"".join(shown), b"")

    return run_command


def _all_of(terminal: int) -> Iterator[bytes]:
    # An error where nobody has it open any more.
    with suppress(OSError):
        while data := os.read(terminal, 65536):
            yield data


def environment() -> dict[str, str]:
    return {**os.environ, "MPLBACKEND": "agg", "COLUMNS": "160", "TERM": "xterm"}


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
