"""The measuring process: takes the snapshots that wait in a run store, measures them, and records the descriptions."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kcomplex.estimators.description import Description
    from kcomplex.estimators.estimator import Estimator
    from kcomplex.tracking.store import RunStore

# Above the training process's own niceness: enough for the training to come first where cores are scarce, and not so
# much that other people's jobs starve the measuring.
NICENESS = 10
# A snapshot that ends the process that measures it (out of memory, say) mustn't block those behind it.
MOST_ATTEMPTS = 3


def measure_pending(run: str | PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> int:
    """Return how many snapshots of a run were measured: all that were waiting, in this process.

    Parameters
    ----------
    run
        Folder of the run; it may be written, and measured by another process, at the same time.
    progress
        Called after each snapshot with the number done and the number known to wait at that moment.

    Raises
    ------
    RunError
        There is no run, or it can't be read.
    """
    from kcomplex.tracking.store import RunStore

    done = 0
    with RunStore(run) as store:
        info = store.info()
        while pending := store.pending():
            snapshot, file = pending[0]
            if store.begin_measuring(snapshot) > MOST_ATTEMPTS:
                store.add_descriptions(snapshot, [], [f"{file}: measuring it ended the process {MOST_ATTEMPTS} times"])
                continue
            descriptions, failures = _measure(Path(run), file, info.estimators, store.initial_file())
            done += _record(store, snapshot, descriptions, failures)
            store.discard_files(info.settings["keep"])
            if progress is not None:
                progress(done, len(pending) - 1)
    return done


def _measure(run: Path, file: str, specs: Iterable[str], initial: str | None) -> tuple[list[Description], list[str]]:
    """Return the descriptions of a snapshot file, and a message for each estimator that failed."""
    from kcomplex.tracking.snapshot import open_snapshot

    descriptions: list[Description] = []
    failures, path = [], run / file
    try:
        with open_snapshot(path) as weights:
            for spec in specs:
                try:
                    descriptions.append(_estimator(spec, run, initial).describe(weights))
                except Exception as error:
                    failures.append(f"{path.name}: {spec}: {type(error).__name__}: {error}")
    except Exception as error:
        failures.append(str(error))
    return descriptions, failures


def _estimator(spec: str, run: Path, initial: str | None) -> Estimator:
    """Return the estimator of a specification, in which what is given may be the run's first snapshot."""
    from dataclasses import replace

    from kcomplex.errors import RunError
    from kcomplex.estimators.given import INITIAL, GivenCheckpoint, GivenWeights, digest_of_weights
    from kcomplex.estimators.pipeline import build_estimator
    from kcomplex.estimators.relative import GivenCode
    from kcomplex.tracking.snapshot import open_snapshot

    estimator = build_estimator(spec)
    if not isinstance(estimator, GivenCode) or estimator.given != GivenCheckpoint(INITIAL):
        return estimator
    if initial is None:
        raise RunError(f"{run}: the first snapshot wasn't kept")
    weights = open_snapshot(run / initial)
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


def main(run: str) -> int:
    """Measure what waits whenever a line comes on standard input; on ``end`` or its end, finish and return 0."""
    # Ctrl-C reaches every process of a terminal; this one ends when the training process has told it so, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(NICENESS)
    import torch

    torch.set_num_threads(1)
    measure_pending(run)
    for line in sys.stdin.buffer:
        measure_pending(run)
        if line == b"end\n":
            return 0
    measure_pending(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
