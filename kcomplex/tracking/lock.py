"""One tracker a run: two would record the same steps twice, and clean up each other's files."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from kcomplex.errors import RunError

_LOCK = "tracker.lock"
_PATIENCE_SECONDS = 3.0


def lock_run(run: Path) -> FileLock:
    """Return the lock of a run's folder, held; the folder is made. It ends with the process, however that ends.

    Raises
    ------
    RunError
        Another tracker follows the run, or the folder can't be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / _LOCK, thread_local=False)
        # A process that was killed a moment ago may not have let go yet.
        lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.05)
    except Timeout:
        raise RunError(f"{run}: another tracker follows this run; close() it first, or choose another name") from None
    except OSError as error:
        raise RunError(f"{run}: the run can't be created: {error}") from error
    return lock
