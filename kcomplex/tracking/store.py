"""The run store: one SQLite database a run, safe against being killed at any instant."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kcomplex.errors import RunError
from kcomplex.machine.closing import Closing
from kcomplex.tracking.database import (
    DATABASE,
    SCHEMA_VERSION,
    connect,
    connect_read_only,
    create_tables,
    schema_version,
)
from kcomplex.version import VERSION

if TYPE_CHECKING:
    from kcomplex.estimators.description import Description

SNAPSHOTS = "snapshots"

Keep: TypeAlias = Literal["ends", "all", "none"]
Status: TypeAlias = Literal["running", "finished", "interrupted"]
EventKind: TypeAlias = Literal["resumed", "skipped", "failed"]

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
        There is no run, it isn't readable, or a newer kcomplex wrote it.
    """

    def __init__(self, run: str | PathLike[str], *, read_only: bool = False) -> None:
        self.run = Path(run)
        path = self.run / DATABASE
        if not path.is_file():
            raise RunError(f"{self.run}: there is no run here ({DATABASE} is missing)")
        try:
            self._connection = connect_read_only(path) if read_only else connect(path)
            version = schema_version(self._connection)
        except sqlite3.Error as error:
            raise RunError(f"{path}: not a readable run store: {error}") from error
        if version != SCHEMA_VERSION:
            self.close()
            if version == 0:
                raise RunError(f"{path}: the run was killed before it began; start it again")
            raise RunError(f"{path}: the run store has version {version}; update kcomplex ({VERSION}) to read it")

    @staticmethod
    def exists(run: str | PathLike[str]) -> bool:
        """Return whether a run was begun in a folder."""
        path = Path(run) / DATABASE
        if not path.is_file():
            return False
        try:
            with closing(connect_read_only(path)) as connection:
                return schema_version(connection) > 0
        except sqlite3.Error as error:
            raise RunError(f"{path}: not a readable run store: {error}") from error

    @classmethod
    def create(
        cls,
        run: str | PathLike[str],
        estimators: Iterable[str],
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        seed: int,
    ) -> RunStore:
        """Return the store of a new run, whose folder is made.

        Raises
        ------
        RunError
            The run exists, its folder can't be written, or the configuration can't be written as JSON.
        """
        folder = Path(run)
        values = [as_json(dict(config), folder), as_json(dict(settings), folder), as_json(list(estimators), folder)]
        try:
            (folder / SNAPSHOTS).mkdir(parents=True, exist_ok=True)
            with closing(connect(folder / DATABASE)) as connection:
                # Everything or nothing: a run that was killed in here can be created again.
                connection.execute("BEGIN IMMEDIATE")
                with connection:
                    if schema_version(connection):
                        raise RunError(
                            f"{folder}: the run exists already; choose another name, or continue it with resume=True"
                        )
                    create_tables(connection)
                    connection.execute(
                        "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (folder.resolve().name, time.time(), *values, VERSION, str(seed), "running"),
                    )
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"{folder}: the run can't be created: {error}") from error
        return cls(folder)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection, for queries."""
        return self._connection

    def info(self) -> RunInfo:
        """Return what the run says about itself."""
        query = "SELECT name, status, estimators, settings, config FROM run"
        name, status, *texts = self._connection.execute(query).fetchone()
        estimators, settings, config = map(json.loads, texts)
        return RunInfo(name, status, tuple(estimators), settings, config)

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

    def begin_measuring(self, snapshot: int) -> int:
        """Return how often the measuring of a snapshot was begun, this time included."""
        with self.transaction():
            self._connection.execute("UPDATE snapshots SET attempts = attempts + 1 WHERE id = ?", (snapshot,))
            row = self._connection.execute("SELECT attempts FROM snapshots WHERE id = ?", (snapshot,)).fetchone()
        return int(row[0])

    def pending_bytes(self) -> int:
        """Return the raw size of the snapshots that wait for being measured."""
        query = "SELECT coalesce(sum(bytes), 0) FROM snapshots WHERE state = 'pending'"
        return int(self._connection.execute(query).fetchone()[0])

    def last_event(self) -> int:
        """Return the id of the newest event; 0 before the first."""
        return int(self._connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0])

    def failures(self, after: int = 0) -> list[str]:
        """Return the messages of what was skipped or failed, from the events after an id."""
        query = "SELECT message FROM events WHERE id > ? AND kind IN ('skipped', 'failed') ORDER BY id"
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
            (time.time(), kind, message, snapshot),
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
            (self.run / file).unlink(missing_ok=True)

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
            if path not in known and path.suffix == ".safetensors":
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
        rest = (item.distortion, item.seconds, item.version, json.dumps(dict(item.parts)))
        cursor = self._connection.execute(
            "INSERT INTO descriptions (snapshot, estimator, kind, unit, value, weights, raw_bits, lossless, distortion,"
            " seconds, version, parts) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (snapshot, *headline, *rest),
        )
        for tensor in item.tensors:
            shape, parts = json.dumps(tensor.shape), json.dumps(dict(tensor.parts))
            size = (tensor.weights, tensor.raw_bits, tensor.value)
            self._connection.execute(
                "INSERT INTO tensors VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (cursor.lastrowid, tensor.name, shape, tensor.dtype, *size, tensor.squared_error, tensor.exact, parts),
            )


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
