"""Waiting for the measuring process at the end of a run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from kcomplex.machine.terminal import printable
from kcomplex.tracking.folder import WORKER_LOG
from kcomplex.tracking.store import RunStore

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 1.0
# Processes that were left to finish alone: their objects mustn't be collected while they run.
_LEFT: list[subprocess.Popen[bytes]] = []


def wait_for_worker(process: subprocess.Popen[bytes] | None, run: Path, timeout: float | None) -> list[str]:
    """Return what went wrong in the measuring process, after waiting for its end.

    A progress bar appears on a terminal when it takes more than a second.

    Parameters
    ----------
    process
        The measuring process, which was told to end; None if there was none.
    run
        Folder of the run.
    timeout
        Seconds to wait; None waits as long as it takes. A process that runs on is left to finish alone.
    """
    if process is None:
        return []
    start = time.monotonic()
    with ExitStack() as stack:
        show: Callable[[], None] | None = None
        while process.poll() is None:
            waited = time.monotonic() - start
            if timeout is not None and waited >= timeout:
                _LEFT.append(process)
                return []
            if show is None and waited > _PATIENCE_SECONDS and sys.stderr.isatty():
                show = _progress(run, stack)
            if show is not None:
                show()
            try:
                process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    log = run / WORKER_LOG
    if process.returncode == 0:
        if log.is_file() and log.stat().st_size == 0:
            log.unlink()
        return []
    return [
        f"the measuring process ended with exit code {process.returncode} (see {log}); "
        f"what waits is measured by kcomplex.tracking.worker.measure_pending({str(run)!r})"
    ]


def _progress(run: Path, stack: ExitStack) -> Callable[[], None]:
    """Return a function that updates a progress bar of the snapshots that wait."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    store = stack.enter_context(RunStore(run, read_only=True))
    total = len(store.pending())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    stack.enter_context(bar)
    task = bar.add_task(f"measuring {printable(run.name)}", total=total)
    return lambda: bar.update(task, completed=total - len(store.pending()))
