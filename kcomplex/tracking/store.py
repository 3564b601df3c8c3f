"""The run store: one SQLite database a run, safe against being killed at any instant."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from kcomplex.errors import KComplexError, RunError
from kcomplex.machine.closing import Closing
from kcomplex.machine.files import PARTIAL_SUFFIX
from kcomplex.tracking.columns import storable
from kcomplex.tracking.database import check_content, create_database, open_database
from kcomplex.tracking.folder import CLAIM_SUFFIX, DATABASE, SNAPSHOTS, check_folder, claim, snapshot_path
from kcomplex.version import VERSION

if TYPE_CHECKING:
    from kcomplex.estimators.description import Description

Keep: TypeAlias = Literal["ends", "all", "none"]
Status: TypeAlias = Literal["running", "finished", "interrupted"]
EventKind: TypeAlias = Literal["resumed", "skipped", "failed", "diverged"]
# Those that the user is told of when the tracker is closed.
TOLD: tuple[EventKind, ...] = ("skipped", "failed", "diverged")

_POLL_SECONDS = 0.1
_LONGEST_MESSAGE = 2000

_LATEST = """
SELECT step, estimator, unit, value, weights FROM descriptions JOIN snapshots ON snapshots.id = snapshot
WHERE snapshot = (SELECT max(snapshot) FROM descriptions JOIN snapshots ON snapshots.id = snapshot WHERE NOT superseded)
"""


@dataclass(frozen=True)
class RunInfo:
    """What a run says about itself: name, status, estimators' specifications, tracker's settings, configuration."""

    name: str
    status: Status
    estimators: tuple[str, ...]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class SnapshotRow:
    """A snapshot to be recorded: when it was taken, its file (None: its weights weren't kept) and raw size."""

    step: int
    epoch: float | None
    wall_time: float
    file: str | None
    bytes: int
    skipped: Iterable[Any] = ()


class RunStore(Closing):
    """A run's database, through one connection of one thread.

    Rows are only ever added; what changes in place is the state of a snapshot and the status of the run. SQLite's
    write-ahead log needs all writers of one run to be on one machine; readers never wait.

    Parameters
    ----------
    run
        Folder of an existing run.
    read_only
        Never write, not even for an absent lock file where the file system forbids it.

    Raises
    ------
    RunError
        There is no run, it isn't one, or a newer kcomplex wrote it.
    """

    def __init__(self, run: str | PathLike[str], *, read_only: bool = False) -> None:
        self.run = Path(run)
        self.path = self.run / DATABASE
        self._connection = open_database(self.path, read_only=read_only)

    @classmethod
    def create(
        cls,
        run: str | PathLike[str],
        estimators: Iterable[str],
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        seed: int,
    ) -> RunStore:
        """Return the store of a new run, whose folder is made; who calls it holds the run's lock.

        Raises
        ------
        RunError
            The run exists, its folder can't be written, or the configuration can't be written as JSON.
        """
        folder = Path(run)
        values = [as_json(dict(config), folder), as_json(dict(settings), folder), as_json(list(estimators), folder)]
        row = (storable(folder.resolve().name), time.time(), *values, VERSION, str(seed), "running")
        check_folder(folder)
        if (folder / DATABASE).exists():
            raise RunError(f"{folder}: the run exists already; choose another name, or continue it with resume=True")
        try:
            (folder / SNAPSHOTS).mkdir(parents=True, exist_ok=True)
            create_database(folder / DATABASE, row)
        except (OSError, sqlite3.Error, KComplexError) as error:
            raise RunError(f"{folder}: the run can't be created: {error}") from error
        return cls(folder)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection, for queries."""
        return self._connection

    def check(self) -> None:
        """Check all that the store holds, which may be of somebody else's making.

        Raises
        ------
        RunError
            It is damaged, or names files that aren't the run's own.
        """
        check_content(self._connection, self.path)
        for [file] in self._connection.execute("SELECT file FROM snapshots WHERE file NOT NULL"):
            snapshot_path(self.run, file)

    def parsed(self, text: str, what: str, is_right: Callable[[Any], bool]) -> Any:
        """Return what a text of the store says as JSON.

        Raises
        ------
        RunError
            It isn't JSON, or not what it is to be.
        """
        try:
            value = json.loads(text)
            if is_right(value):
                return value
        except (ValueError, RecursionError):
            pass
        raise RunError(f"{self.path}: the run store is damaged: {what} can't be {text[:80]!r}")

    def info(self) -> RunInfo:
        """Return what the run says about itself.

        Raises
        ------
        RunError
            It makes no sense.
        """
        query = "SELECT name, status, estimators, settings, config FROM run"
        name, status, estimators, settings, config = self._connection.execute(query).fetchone()
        return RunInfo(
            name,
            status,
            tuple(self.parsed(estimators, "estimators", _is_texts)),
            self.parsed(settings, "settings", _is_settings),
            self.parsed(config, "the configuration", lambda value: isinstance(value, dict)),
        )

    def newest(self) -> tuple[int, int] | None:
        """Return id and step of the newest snapshot that counts; None before the first."""
        query = "SELECT id, step FROM snapshots WHERE NOT superseded ORDER BY id DESC LIMIT 1"
        row: tuple[int, int] | None = self._connection.execute(query).fetchone()
        return row

    def latest(self) -> dict[str, float]:
        """Return the numbers of the newest measured snapshot, flat; see `Tracker.latest`."""
        numbers = {}
        for step, estimator, unit, value, weights in self._connection.execute(_LATEST):
            numbers["kcomplex/step"] = float(step)
            number = math.nan if value is None else value
            if unit == "bits":
                numbers[f"kcomplex/{estimator}/bits_per_weight"] = number / weights if weights else math.nan
            else:
                numbers[f"kcomplex/{estimator}/{unit}"] = number
        return numbers

    def pending(self) -> list[tuple[int, str]]:
        """Return id and file of the snapshots that wait for being measured, oldest first."""
        return self._connection.execute("SELECT id, file FROM snapshots WHERE state = 'pending' ORDER BY id").fetchall()

    def initial_file(self) -> str | None:
        """Return the file of the run's first snapshot; None where it wasn't kept."""
        row = self._connection.execute("SELECT file FROM snapshots ORDER BY id LIMIT 1").fetchone()
        return None if row is None else row[0]

    @contextmanager
    def claimed(self) -> Iterator[tuple[int, str] | None]:
        """Yield id and file of the oldest snapshot that waits for being measured and that no other process measures.

        None once nothing waits: what others measure is waited for, because their processes may end before they have.
        """
        with ExitStack() as stack:
            while waiting := self.pending():
                for snapshot, file in waiting:
                    # Another one may have measured it since, and let go.
                    if stack.enter_context(claim(self.run, file)) and (snapshot, file) in self.pending():
                        yield snapshot, file
                        return
                    stack.close()
                time.sleep(_POLL_SECONDS)
            yield None

    def begin_measuring(self, snapshot: int) -> int:
        """Return how often the measuring of a snapshot was begun, this time included, and ended its process."""
        with self.transaction():
            self._connection.execute("UPDATE snapshots SET attempts = attempts + 1 WHERE id = ?", (snapshot,))
            row = self._connection.execute("SELECT attempts FROM snapshots WHERE id = ?", (snapshot,)).fetchone()
        return int(row[0])

    def give_up_measuring(self, snapshot: int) -> None:
        """Take back what `begin_measuring` counted: the process is ended by somebody, not by the snapshot."""
        with self.transaction():
            self._connection.execute("UPDATE snapshots SET attempts = attempts - 1 WHERE id = ?", (snapshot,))

    def pending_bytes(self) -> int:
        """Return the raw size of the snapshots that wait for being measured."""
        query = "SELECT total(bytes) FROM snapshots WHERE state = 'pending'"
        return int(self._connection.execute(query).fetchone()[0])

    def last_event(self) -> int:
        """Return the id of the newest event; 0 before the first."""
        return int(self._connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0])

    def failures(self, after: int = 0) -> list[str]:
        """Return the messages of what the user is to be told, from the events after an id."""
        query = f"SELECT message FROM events WHERE id > ? AND kind IN {TOLD} ORDER BY id"
        return [row[0] for row in self._connection.execute(query, (after,))]

    def add_snapshot(self, row: SnapshotRow) -> int:
        """Record a snapshot, pending where it has a file, and return its id."""
        state = "skipped" if row.file is None else "pending"
        cursor = self._connection.execute(
            "INSERT INTO snapshots (step, epoch, wall_time, file, bytes, skipped, state) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.step, row.epoch, row.wall_time, row.file, row.bytes, json.dumps(list(row.skipped)), state),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def add_metrics(self, snapshot: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a snapshot; of a name's values, the one logged at the step nearest to it counts.

        Of several values logged at that step, the last one does.
        """
        with self.transaction():
            self._connection.executemany(
                "INSERT INTO metrics VALUES (?, ?, ?, ?) ON CONFLICT (snapshot, name) DO UPDATE "
                "SET step = excluded.step, value = excluded.value WHERE excluded.step <= metrics.step",
                [(snapshot, name, step, value) for name, value in metrics.items()],
            )

    def add_event(self, kind: EventKind, message: str, snapshot: int | None = None) -> None:
        """Record an event."""
        self._connection.execute(
            "INSERT INTO events (time, kind, message, snapshot) VALUES (?, ?, ?, ?)",
            (time.time(), kind, storable(message)[:_LONGEST_MESSAGE], snapshot),
        )

    def add_descriptions(self, snapshot: int, descriptions: Iterable[Description], failures: Iterable[str]) -> bool:
        """Record all that measuring a snapshot gave, at once; return False where another process was faster."""
        failures = list(failures)
        with self.transaction():
            state = self._connection.execute("SELECT state FROM snapshots WHERE id = ?", (snapshot,)).fetchone()[0]
            if state != "pending":
                return False
            for description in descriptions:
                self._add_description(snapshot, description)
            for message in failures:
                self.add_event("failed", message, snapshot)
            state = "failed" if failures else "measured"
            self._connection.execute("UPDATE snapshots SET state = ? WHERE id = ?", (state, snapshot))
        return True

    def discard_files(self, keep: Keep) -> None:
        """Delete the files of measured snapshots that ``keep`` doesn't want."""
        if keep == "all":
            return
        ends = (
            "AND id NOT IN (SELECT min(id) FROM snapshots UNION SELECT max(id) FROM snapshots WHERE file IS NOT NULL)"
        )
        where = f"state != 'pending' AND file IS NOT NULL {ends if keep == 'ends' else ''}"
        with self.transaction():
            files = [row[0] for row in self._connection.execute(f"SELECT file FROM snapshots WHERE {where}")]
            self._connection.execute(f"UPDATE snapshots SET file = NULL WHERE {where}")
        for file in files:
            snapshot_path(self.run, file).unlink(missing_ok=True)

    def resume(self, step: int, settings: Mapping[str, Any], seed: int) -> None:
        """Continue the run after a step: later snapshots stay, but no longer count; leftovers of a kill are deleted.

        A run is followed by one tracker at a time: a second one's file that isn't recorded yet looks like a leftover.
        """
        with self.transaction():
            self._connection.execute("UPDATE snapshots SET superseded = 1 WHERE step > ?", (step,))
            self._connection.execute("UPDATE run SET status = 'running', settings = ?", (json.dumps(dict(settings)),))
            self.add_event("resumed", f"at step {step} with torch seed {seed}")
            rows = self._connection.execute("SELECT file FROM snapshots WHERE file IS NOT NULL")
            known = {self.run / row[0] for row in rows}
        (self.run / SNAPSHOTS).mkdir(exist_ok=True)
        for path in (self.run / SNAPSHOTS).iterdir():
            if path not in known and path.suffix in (".safetensors", CLAIM_SUFFIX, PARTIAL_SUFFIX):
                path.unlink(missing_ok=True)

    def finish(self, status: Status) -> None:
        """Record that the training ended."""
        with self.transaction():
            self._connection.execute("UPDATE run SET status = ?", (status,))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is recorded, or nothing."""
        # Taking the write lock first: one that begins as a reader can't be promoted while others write.
        self._connection.execute("BEGIN IMMEDIATE")
        with self._connection:
            yield

    def _add_description(self, snapshot: int, item: Description) -> None:
        headline = (item.estimator, item.kind, item.unit, item.value, item.weights, item.raw_bits, item.lossless)
        rest = (item.distortion, item.seconds, item.version, json.dumps(dict(item.parts), default=_plain))
        counted = (len(item.tensors), item.coverage.of_tensors, item.coverage.share)
        given = (None, None) if item.given is None else (item.given.matched, item.given.tensors)
        told = (*headline, *rest, *counted, sum(item.nonfinite.values()), item.selection, *given)
        row = (snapshot, *map(_plain, told))
        cursor = self._connection.execute(f"INSERT INTO descriptions VALUES (NULL{', ?' * len(row)})", row)
        for tensor in item.tensors:
            shape, parts = json.dumps(tensor.shape, default=_plain), json.dumps(dict(tensor.parts), default=_plain)
            size = (tensor.weights, tensor.raw_bits, tensor.value)
            told = (tensor.squared_error, tensor.exact)
            self._connection.execute(
                "INSERT INTO tensors VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (cursor.lastrowid, tensor.name, shape, tensor.dtype, *map(_plain, (*size, *told)), parts),
            )


def _plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's: SQLite would keep them as bytes."""
    return value.item() if isinstance(value, np.generic) else value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and value.get("keep") in get_args(Keep)


def as_json(value: Any, run: Path) -> str:
    """Return a part of a run's configuration as JSON.

    Raises
    ------
    RunError
        It holds what JSON can't.
    """
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise RunError(f"{run}: the configuration can't be written as JSON: {error}") from error
