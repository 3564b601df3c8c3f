"""The folder of a run: what is its own in it, and the lock of the tracker that follows it."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kcomplex.errors import RunError
from kcomplex.tracking.columns import storable

DATABASE = "run.sqlite"
SNAPSHOTS = "snapshots"
WORKER_LOG = "worker.log"
_LOCK = "tracker.lock"
_SNAPSHOT = re.compile(rf"{SNAPSHOTS}/[A-Za-z0-9-]+\.safetensors")
# What SQLite keeps beside a database. A journal may name files of anybody, which SQLite then deletes; a run has none.
_LOGS = (f"{DATABASE}-wal", f"{DATABASE}-shm")
_JOURNAL = f"{DATABASE}-journal"
_PATIENCE_SECONDS = 3.0
# After the name of a snapshot's file, while a process measures it.
CLAIM_SUFFIX = ".lock"


def check_folder(run: Path) -> None:
    """Check that what is written in a run's folder is the folder's own.

    Raises
    ------
    RunError
        Something of it is a link, which may lead anywhere, or a journal.
    """
    for name in (DATABASE, *_LOGS, SNAPSHOTS, WORKER_LOG, _LOCK):
        if (run / name).is_symlink():
            raise RunError(
                f"{run / name}: is a link, which a run's own files aren't: put in its place what it leads to"
            )
    if (run / _JOURNAL).exists() or (run / _JOURNAL).is_symlink():
        raise RunError(
            f"{run / _JOURNAL}: no run has a journal; it isn't kcomplex's, and opening the run would obey it"
        )
    if any((run / name).exists() for name in _LOGS) and not (run / DATABASE).exists():
        raise RunError(
            f"{run}: holds the log of a run store that is gone ({_LOGS[0]}): remove it, or take another name"
        )


def snapshot_path(run: Path, file: str) -> Path:
    """Return the path of a snapshot's file, as the run store names it.

    Raises
    ------
    RunError
        It isn't a plain file in the run's folder of snapshots.
    """
    path = run / file
    plain = _SNAPSHOT.fullmatch(file) is not None
    # Another process may delete it at any moment.
    with suppress(FileNotFoundError):
        plain = plain and stat.S_ISREG(path.lstat().st_mode)
    if not plain:
        raise RunError(f"{run}: the run store names {file[:80]!r}, which is no snapshot of the run")
    return path


@contextmanager
def claim(run: Path, file: str) -> Iterator[bool]:
    """Yield whether a snapshot is this process's to measure until the end of the block; then no other has claimed it.

    Raises
    ------
    RunError
        The file isn't the run's own, or its folder can't be written.
    """
    path = snapshot_path(run, file)
    path = path.with_name(path.name + CLAIM_SUFFIX)
    if path.is_symlink():
        raise RunError(f"{path}: is a link, which a run's own files aren't: remove it")
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise RunError(f"{run}: what waits can't be measured here: {error}") from error
    try:
        yield True
    finally:
        lock.release()
        # Who waits for this very file finds the snapshot measured.
        path.unlink(missing_ok=True)


def lock_run(run: Path) -> FileLock:
    """Return the lock of a run's folder, held; the folder is made. It ends with the process, however that ends.

    One tracker a run: two would record the same steps twice, and clean up each other's files.

    Raises
    ------
    RunError
        Another tracker follows the run, or the folder can't be written.
    """
    if storable(str(run)) != str(run):
        raise RunError(f"{run}: the path isn't UTF-8 text, by which alone safetensors opens files: take another name")
    try:
        run.mkdir(parents=True, exist_ok=True)
        check_folder(run)
        lock = FileLock(run / _LOCK, thread_local=False)
        # A process that was killed a moment ago may not have let go yet.
        lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.05)
    except Timeout:
        raise RunError(f"{run}: another tracker follows this run; close() it first, or choose another name") from None
    except OSError as error:
        raise RunError(f"{run}: the run can't be created: {error}") from error
    return lock


def is_followed(run: Path) -> bool:
    """Return whether the process of a tracker that follows a run lives; True where the lock can't be asked."""
    if not (run / _LOCK).is_file():
        return False
    try:
        with FileLock(run / _LOCK).acquire(blocking=False):
            return False
    except (Timeout, OSError):
        return True
