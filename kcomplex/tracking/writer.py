"""The writer: a thread that does all of a training process's writing to its run, and starts the measuring process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeAlias

from kcomplex.tracking.folder import SNAPSHOTS, WORKER_LOG
from kcomplex.tracking.snapshot import CapturedWeights, not_finite, skipped_rows, write_snapshot
from kcomplex.tracking.store import EventKind, RunStore, SnapshotRow, Status

# Importing torch takes the measuring process seconds. Short trainings are over by then, and aren't disturbed at all.
START_AFTER_SECONDS = 3.0
# A measuring process that keeps dying is left dead; what waits can be measured later.
MOST_REVIVALS = 3

# One line each; the measuring process looks for what waits at any line, and ends at this one.
_MORE, _END = b"\n", b"end\n"
_Task: TypeAlias = "Callable[[RunStore], None]"


@dataclass(frozen=True)
class Moment:
    """When a snapshot was taken: optimiser steps, epochs (None where unknown), seconds since 1970."""

    step: int
    epoch: float | None
    wall_time: float


class Writer(threading.Thread):
    """Writes snapshots, metrics and events in the order they are put, so that the training loop never waits.

    Parameters
    ----------
    run
        Folder of the run.
    measure
        Whether to start the measuring process.
    given
        What that may open or call; see `measure_pending`.

    Attributes
    ----------
    failures
        What couldn't even be recorded in the run store.
    process
        The measuring process, once it is started.
    """

    def __init__(self, run: Path, *, measure: bool, given: Sequence[str] = ()) -> None:
        super().__init__(name=f"kcomplex writer of {run}", daemon=True)
        self.run_folder = run
        self.failures: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._measure = measure
        self._given = given
        self._newest: int | None = None
        self._diverged = False
        self._revivals_left = MOST_REVIVALS
        # Each is changed by one thread only.
        self._put_bytes = 0
        self._written_bytes = 0
        # An upper bound of the bytes that wait for being measured; they are counted only when it reaches the limit.
        self._pending_bytes = 0
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()

    def is_behind(self, size: int, limit: int) -> bool:
        """Return whether ``size`` more bytes would make more than ``limit`` wait; alone they are never too much."""
        if self._pending_bytes + size > limit:
            queued = self._put_bytes - self._written_bytes
            with RunStore(self.run_folder, read_only=True) as store:
                self._pending_bytes = queued + store.pending_bytes()
        return self._pending_bytes > 0 and self._pending_bytes + size > limit

    def put_snapshot(self, moment: Moment, captured: CapturedWeights) -> None:
        """Write captured weights to a file, then record the snapshot."""
        self._put_bytes += captured.nbytes
        self._pending_bytes += captured.nbytes
        self._put(partial(self._write_snapshot, moment, captured))

    def put_missed(self, moment: Moment, kind: EventKind, message: str) -> None:
        """Record a snapshot without weights, so that it still has its metrics, and why."""
        self._put(partial(self._write_missed, moment, kind, message))

    def put_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of the newest snapshot."""
        self._put(partial(self._write_metrics, step, metrics))

    def finish(self, status: Status) -> None:
        """Write all that was put, record how the training ended, tell the measuring process to end, and return."""
        self._put(partial(self._write_status, status))
        self._tasks.put(None)
        self.join()

    def _put(self, task: _Task) -> None:
        # A thread that ended in an error has said so in `failures`; what nobody would write mustn't pile up.
        if self.is_alive():
            self._tasks.put(task)

    def run(self) -> None:
        """Do the tasks; the thread's main function."""
        try:
            with RunStore(self.run_folder) as store:
                newest = store.newest()
                self._newest = None if newest is None else newest[0]
                self._work(store)
        except Exception as error:
            self.failures.append(f"the writer of {self.run_folder} ended: {error!r}")
        finally:
            self._tell_worker(_END, last=True)

    def _work(self, store: RunStore) -> None:
        start = time.monotonic() + START_AFTER_SECONDS
        while True:
            waits = self._measure and self.process is None
            try:
                task = self._tasks.get(timeout=max(0.0, start - time.monotonic()) if waits else None)
            except Empty:
                self._start_worker(store)
                continue
            if task is None:
                break
            try:
                task(store)
            except Exception as error:
                self._record_failure(store, repr(error))
            self._revive_worker(store)
        if self._measure and self.process is None and store.pending():
            self._start_worker(store)

    def _write_snapshot(self, moment: Moment, captured: CapturedWeights, store: RunStore) -> None:
        file = f"{SNAPSHOTS}/{moment.step:010d}-{uuid.uuid4().hex[:8]}.safetensors"
        try:
            write_snapshot(captured, self.run_folder / file)
            row = SnapshotRow(
                moment.step, moment.epoch, moment.wall_time, file, captured.nbytes, skipped_rows(captured.skipped)
            )
            self._newest = store.add_snapshot(row)
        except Exception as error:
            (self.run_folder / file).unlink(missing_ok=True)
            self._write_missed(moment, "failed", f"the snapshot couldn't be written: {error!r}", store)
        finally:
            self._written_bytes += captured.nbytes
        self._tell_worker(_MORE)
        self._tell_divergence(moment, captured, store)

    def _tell_divergence(self, moment: Moment, captured: CapturedWeights, store: RunStore) -> None:
        if self._diverged or not (names := not_finite(captured)):
            return
        self._diverged = True
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        store.add_event("diverged", f"step {moment.step}: NaN or infinity in {names[0]!r}{more}", self._newest)

    def _write_missed(self, moment: Moment, kind: EventKind, message: str, store: RunStore) -> None:
        with store.transaction():
            self._newest = store.add_snapshot(SnapshotRow(moment.step, moment.epoch, moment.wall_time, None, 0))
            store.add_event(kind, f"step {moment.step}: {message}", self._newest)

    def _write_metrics(self, step: int, metrics: Mapping[str, float], store: RunStore) -> None:
        if self._newest is None:
            raise RuntimeError(f"there is no snapshot to join the metrics of step {step} to")
        store.add_metrics(self._newest, step, metrics)

    def _write_status(self, status: Status, store: RunStore) -> None:
        store.finish(status)

    def _revive_worker(self, store: RunStore) -> None:
        if self.process is None or self.process.poll() is None or not self._revivals_left:
            return
        self._revivals_left -= 1
        if self.process.stdin is not None:
            self.process.stdin.close()
        told = f"the measuring process ended with exit code {self.process.returncode}; it is started again"
        self._record_failure(store, told)
        self._start_worker(store)

    def _start_worker(self, store: RunStore) -> None:
        threads = ("OMP", "MKL", "OPENBLAS", "NUMBA")
        environment = {
            **os.environ,
            **{f"{library}_NUM_THREADS": "1" for library in threads},
            "CUDA_VISIBLE_DEVICES": "",
            # It finds what the training process finds, plug-ins included, and nothing in the working directory (-P).
            "PYTHONPATH": os.pathsep.join(str(path or Path.cwd()) for path in sys.path),
        }
        command = [sys.executable, "-P", "-m", "kcomplex.tracking.worker", str(self.run_folder), *self._given]
        try:
            with (self.run_folder / WORKER_LOG).open("ab") as log:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, bufsize=0, env=environment
                )
            assert self.process.stdin is not None
            os.set_blocking(self.process.stdin.fileno(), False)
        except OSError as error:
            self._measure = False
            self._record_failure(store, f"the measuring process can't be started: {error!r}")

    def _tell_worker(self, message: bytes, *, last: bool = False) -> None:
        if self.process is None or self.process.stdin is None or self.process.stdin.closed:
            return
        # A broken pipe: the process died. What that leaves unmeasured is told once, when the tracker is closed.
        # A full one says enough already; closing it says the rest.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            self.process.stdin.write(message)
        if last:
            self.process.stdin.close()

    def _record_failure(self, store: RunStore, message: str) -> None:
        try:
            store.add_event("failed", message)
        except Exception as error:
            self.failures.append(f"{message} (and this couldn't be recorded: {error!r})")
