"""The measuring process: takes the snapshots that wait in a run store, measures them, and records the descriptions."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kcomplex.estimators.description import Description
    from kcomplex.estimators.estimator import Estimator
    from kcomplex.tracking.store import RunInfo, RunStore

# Above the training process's own niceness: enough for the training to come first where cores are scarce, and not so
# much that other people's jobs starve the measuring.
NICENESS = 10
# A snapshot that ends the process that measures it (out of memory, say) mustn't block those behind it.
MOST_ATTEMPTS = 3


def measure_pending(
    run: str | PathLike[str],
    *,
    given: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
    more: Iterable[object] = (),
) -> int:
    """Return how many snapshots of a run were measured: all that were waiting, in this process.

    Parameters
    ----------
    run
        Folder of the run; it may be written, and measured by other processes, at the same time.
    given
        Checkpoints and recipes that the run's estimators may use, as they stand after ``given:`` there. A run names
        what it was measured with, and whoever made it may have named anything: nothing else is opened, or called.
    progress
        Called after each snapshot with the number done and the number known to wait at that moment.
    more
        At each of its items, what waits then is measured too.

    Raises
    ------
    RunError
        There is no run, it is damaged, it can't be written, or it is measured given what isn't in ``given``.
    """
    from kcomplex.tracking.database import reading
    from kcomplex.tracking.plan import check_given
    from kcomplex.tracking.store import RunStore

    with RunStore(run) as store, reading(store.path):
        store.check()
        info = store.info()
        check_given(info.estimators, given, store.run)
        # The file of a measured snapshot is deleted: by then the disk must hold what was measured.
        store.connection.execute("PRAGMA synchronous = FULL")
        done = _measure_all(store, info, progress)
        for _ in more:
            done += _measure_all(store, info, progress)
    return done


def _measure_all(store: RunStore, info: RunInfo, progress: Callable[[int, int], None] | None) -> int:
    done = 0
    while True:
        with store.claimed() as claimed:
            if claimed is None:
                return done
            done += _measure_claimed(store, info, *claimed)
            store.discard_files(info.settings["keep"])
        if progress is not None:
            progress(done, len(store.pending()))


def _measure_claimed(store: RunStore, info: RunInfo, snapshot: int, file: str) -> bool:
    """Measure a snapshot, and return whether that was recorded as a measurement."""
    if store.begin_measuring(snapshot) > MOST_ATTEMPTS:
        store.add_descriptions(snapshot, [], [f"{file}: measuring it ended the process {MOST_ATTEMPTS} times"])
        return False
    try:
        return _record(store, snapshot, *_measure(store, file, info.estimators))
    except BaseException:
        store.give_up_measuring(snapshot)
        raise


def _measure(store: RunStore, file: str, specs: Iterable[str]) -> tuple[list[Description], list[str]]:
    """Return the descriptions of a snapshot file, and a message for each estimator that failed."""
    from kcomplex.tracking.folder import snapshot_path
    from kcomplex.tracking.snapshot import open_snapshot

    descriptions: list[Description] = []
    failures = []
    try:
        with open_snapshot(snapshot_path(store.run, file)) as weights:
            for spec in specs:
                try:
                    descriptions.append(_estimator(spec, store).describe(weights))
                except Exception as error:
                    failures.append(f"{file}: {spec[:200]}: {type(error).__name__}: {error}")
    except Exception as error:
        failures.append(str(error))
    return descriptions, failures


def _estimator(spec: str, store: RunStore) -> Estimator:
    """Return the estimator of a specification, in which what is given may be the run's first snapshot."""
    from dataclasses import replace

    from kcomplex.errors import RunError
    from kcomplex.estimators.given import INITIAL, GivenCheckpoint, GivenWeights, digest_of_weights
    from kcomplex.estimators.pipeline import build_estimator
    from kcomplex.estimators.relative import GivenCode
    from kcomplex.tracking.folder import snapshot_path
    from kcomplex.tracking.snapshot import open_snapshot

    estimator = build_estimator(spec)
    if not isinstance(estimator, GivenCode) or estimator.given != GivenCheckpoint(INITIAL):
        return estimator
    initial = store.initial_file()
    if initial is None:
        raise RunError(f"{store.run}: the first snapshot wasn't kept")
    weights = open_snapshot(snapshot_path(store.run, initial))
    return replace(estimator, given=GivenWeights(digest_of_weights(weights), weights, INITIAL))


def _record(store: RunStore, snapshot: int, descriptions: list[Description], failures: list[str]) -> bool:
    try:
        return store.add_descriptions(snapshot, descriptions, failures)
    except sqlite3.OperationalError:
        raise
    except Exception as error:
        # A plug-in's description with values that the store can't hold; it must not stop the measuring of the rest.
        told = f"snapshot {snapshot}: a description can't be recorded: {type(error).__name__}: {error}"
        return store.add_descriptions(snapshot, [], [*failures, told])


def main(run: str, *given: str) -> int:
    """Measure what waits whenever a line comes on standard input; on ``end`` or its end, finish and return 0."""
    # An end from outside isn't the snapshot's doing.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Ctrl-C reaches every process of a terminal; this one ends when the training process has told it so, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(NICENESS)
    import torch

    torch.set_num_threads(1)
    measure_pending(run, given=given, more=_lines())
    return 0


def _lines() -> Iterator[bytes]:
    """Yield the lines on standard input, the last one being ``end`` or an empty one at its end."""
    for line in sys.stdin.buffer:
        yield line
        if line == b"end\n":
            return
    yield b""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
