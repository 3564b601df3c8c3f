"""Processes that tests start: each leads a process group of its own, which is ended whatever happens.

`Children` ends them when its block is left. A process that was killed leaves no block, so that a guard, which is a
process of its own, ends them when the tests' process is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

# Seconds to wait for what takes a few on an idle machine. Only what would never happen takes as long.
PATIENCE = 1800

_GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""
_guard: subprocess.Popen[str] | None = None


class Children:
    """Child processes, ended with all that they started when the block is left."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[Any]] = []
        self._groups: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _uninterrupted():
            for group in self._groups:
                kill_group(group)
            for process in self._processes:
                for pipe in (process.stdin, process.stdout, process.stderr):
                    _close(pipe)
                process.wait(PATIENCE)
            for group in self._groups:
                _tell_guard(f"-{group}")

    def start(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Return a process that leads a new session; options are those of `subprocess.Popen`."""
        with _uninterrupted():
            # From its first instant: a child that made its own group could be killed, or missed, before it has.
            process = subprocess.Popen(list(map(str, command)), start_new_session=True, **options)
            self._processes.append(process)
            self.adopt(process.pid)
        return process

    def adopt(self, group: int) -> None:
        """Have a process group ended too, which a child has made."""
        self._groups.append(group)
        _tell_guard(f"+{group}")


def run(
    command: Sequence[str | Path],
    *,
    check: bool = True,
    input: str | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Return a finished process with its output as text; ``check`` asserts that its exit code is 0."""
    pipe = subprocess.PIPE
    with Children() as children:
        stdin = subprocess.DEVNULL if input is None else pipe
        process = children.start(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=env)
        out, err = process.communicate(input, PATIENCE)
    assert not check or process.returncode == 0, f"exit code {process.returncode}: {err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(condition: Callable[[], bool]) -> None:
    """Return once a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def kill_group(group: int) -> None:
    """Kill the processes of a group, which may have ended already."""
    # A group of processes that nobody has waited for may not be signalled on some systems.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def is_gone(group: int) -> bool:
    """Return whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def interrupt(number: int, _: object) -> None:
    """Leave all blocks, as at Ctrl-C: a handler for signals that would end the tests' process at once."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def dismiss_guard() -> None:
    """End the guard."""
    global _guard
    if _guard is not None:
        _close(_guard.stdin)
        _guard.wait()
        _guard = None


def _tell_guard(line: str) -> None:
    global _guard
    if _guard is None:
        command = [sys.executable, "-I", "-S", "-c", _GUARD]
        _guard = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert _guard.stdin is not None
    print(line, file=_guard.stdin, flush=True)


def _close(pipe: IO[Any] | None) -> None:
    # What a killed process didn't read can't be written any more.
    with contextlib.suppress(BrokenPipeError):
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let signals wait until the end of the block, so that no child is forgotten between its start and its record."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)
