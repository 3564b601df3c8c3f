"""The run store's database: its tables and what may stand in them, how it is created and opened."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from kcomplex.errors import RunError
from kcomplex.machine.files import replacing
from kcomplex.tracking.columns import TAKEN
from kcomplex.tracking.folder import check_folder
from kcomplex.version import VERSION

SCHEMA_VERSION = 2
# Longer than any transaction of another writer, even on a machine that is busy training.
BUSY_SECONDS = 60.0
# Of SQLite's machine, in which the schema of a run store takes less than a thousand.
_SCHEMA_STEPS = 1_000_000

_NO_LOCK_FILE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)

SCHEMA = """
CREATE TABLE run (
    name TEXT NOT NULL, created REAL NOT NULL, config TEXT NOT NULL, settings TEXT NOT NULL, estimators TEXT NOT NULL,
    version TEXT NOT NULL, seed TEXT NOT NULL, status TEXT NOT NULL
);
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, epoch REAL, wall_time REAL NOT NULL, file TEXT,
    bytes INTEGER NOT NULL, skipped TEXT NOT NULL, state TEXT NOT NULL, superseded INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX snapshots_by_state ON snapshots (state);
CREATE TABLE metrics (
    snapshot INTEGER NOT NULL REFERENCES snapshots, name TEXT NOT NULL, step INTEGER NOT NULL, value REAL,
    PRIMARY KEY (snapshot, name)
) WITHOUT ROWID;
CREATE TABLE descriptions (
    id INTEGER PRIMARY KEY, snapshot INTEGER NOT NULL REFERENCES snapshots, estimator TEXT NOT NULL,
    kind TEXT NOT NULL, unit TEXT NOT NULL, value REAL, weights INTEGER NOT NULL, raw_bits INTEGER NOT NULL,
    lossless INTEGER, distortion REAL, seconds REAL NOT NULL, version TEXT NOT NULL, parts TEXT NOT NULL,
    counted_tensors INTEGER NOT NULL, all_tensors INTEGER NOT NULL, coverage REAL, nonfinite INTEGER NOT NULL,
    selection TEXT NOT NULL, given_tensors INTEGER, given_of INTEGER,
    UNIQUE (snapshot, estimator)
);
CREATE TABLE tensors (
    description INTEGER NOT NULL REFERENCES descriptions, tensor TEXT NOT NULL, shape TEXT NOT NULL,
    dtype TEXT NOT NULL, weights INTEGER NOT NULL, raw_bits INTEGER NOT NULL, value REAL, squared_error REAL,
    exact INTEGER NOT NULL, parts TEXT NOT NULL, PRIMARY KEY (description, tensor)
) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, message TEXT NOT NULL,
    snapshot INTEGER REFERENCES snapshots
);
"""
_SCHEMA_QUERY = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name LIMIT 100"

# SQLite puts any type into any column; these are conditions on a column {0}. Counts are exact as floats, too, which
# they become beside missing ones.
_TEXT, _NUMBER, _NUMBER_OR_NULL = "typeof({0}) = 'text'", "typeof({0}) = 'real'", "typeof({0}) IN ('real', 'null')"
_WHOLE, _WHOLE_OR_NULL = "typeof({0}) = 'integer'", "typeof({0}) IN ('integer', 'null')"
_COUNT, _FLAG, _FLAG_OR_NULL = (
    f"{_WHOLE} AND {{0}} BETWEEN 0 AND {1 << 53}",
    "{0} IN (0, 1)",
    "({0} IN (0, 1) OR {0} IS NULL)",
)
_CONTENT = {
    "run": {
        "name": _TEXT, "created": _NUMBER, "config": _TEXT, "settings": _TEXT, "estimators": _TEXT, "version": _TEXT,
        "seed": f"{_TEXT} AND length({{0}}) BETWEEN 1 AND 20 AND {{0}} NOT GLOB '*[^0-9]*'",
        "status": "{0} IN ('running', 'finished', 'interrupted')",
    },
    "snapshots": {
        "id": _WHOLE, "step": _WHOLE, "epoch": _NUMBER_OR_NULL, "wall_time": _NUMBER,
        "file": "typeof({0}) IN ('text', 'null')", "bytes": _COUNT, "skipped": _TEXT,
        "state": "{0} = 'skipped' OR ({0} = 'pending' AND file NOT NULL) OR {0} IN ('measured', 'failed')",
        "superseded": _FLAG, "attempts": f"{_WHOLE} AND {{0}} BETWEEN 0 AND 1000000000",
    },
    "metrics": {
        "snapshot": _WHOLE, "name": f"{_TEXT} AND {{0}} != '' AND {{0}} NOT IN {TAKEN}", "step": _WHOLE,
        "value": _NUMBER_OR_NULL,
    },
    "descriptions": {
        "id": _WHOLE, "snapshot": _WHOLE, "estimator": _TEXT, "kind": _TEXT, "unit": _TEXT, "value": _NUMBER_OR_NULL,
        "weights": _COUNT, "raw_bits": _COUNT, "lossless": _FLAG_OR_NULL, "distortion": _NUMBER_OR_NULL,
        "seconds": _NUMBER, "version": _TEXT, "parts": _TEXT, "counted_tensors": _COUNT, "all_tensors": _COUNT,
        "coverage": _NUMBER_OR_NULL, "nonfinite": _COUNT, "selection": _TEXT, "given_tensors": _WHOLE_OR_NULL,
        "given_of": _WHOLE_OR_NULL,
    },
    "tensors": {
        "description": _WHOLE, "tensor": _TEXT, "shape": _TEXT, "dtype": _TEXT, "weights": _COUNT, "raw_bits": _COUNT,
        "value": _NUMBER_OR_NULL, "squared_error": _NUMBER_OR_NULL, "exact": _FLAG, "parts": _TEXT,
    },
    "events": {"id": _WHOLE, "time": _NUMBER, "kind": _TEXT, "message": _TEXT, "snapshot": _WHOLE_OR_NULL},
}  # fmt: skip


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make a `RunError` of what SQLite says against a run store.

    Raises
    ------
    RunError
        It isn't readable, or can't be written.
    """
    try:
        yield
    # SQLite's messages may quote what is no text.
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not a readable run store: {str(error)[:200]}") from error


def create_database(path: Path, run: Sequence[Any]) -> None:
    """Write a new run store, whole or not at all; ``run`` is the row that the run says of itself.

    Raises
    ------
    sqlite3.Error, OSError
        It can't be written.
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        _create_tables(connection)
        connection.execute(f"INSERT INTO run VALUES ({', '.join('?' * len(run))})", run)
        content = bytearray(connection.serialize())
    # Where SQLite's header says that the file has a write-ahead log. Switching to one later would take a journal, and
    # leave it behind at a kill.
    content[18:20] = b"\2\2"
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def open_database(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Return a connection to a run store that has the tables of one; transactions are begun explicitly.

    Parameters
    ----------
    read_only
        It never writes, nor waits for those who do.

    Raises
    ------
    RunError
        There is none, it isn't readable, or another version of kcomplex wrote it.
    """
    check_folder(path.parent)
    if not path.is_file():
        raise RunError(f"{path.parent}: there is no run here ({path.name} is missing)")
    with reading(path):
        connection = _connect_read_only(path) if read_only else _connect(str(path))
        try:
            if not read_only:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("PRAGMA foreign_keys = ON")
            _check_schema(connection, path)
        except BaseException:
            connection.close()
            raise
    connection.set_progress_handler(None, 0)
    return connection


def check_content(connection: sqlite3.Connection, path: Path) -> None:
    """Check that a run store is whole, and that its columns hold what they are for.

    Raises
    ------
    RunError
        They don't.
    """
    with reading(path):
        [found] = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise RunError(f"{path}: the run store is damaged: {' '.join(found.split())[:200]}")
        for table, columns in _CONTENT.items():
            wrong = (f"total(NOT coalesce({rule.format(name)}, 0))" for name, rule in columns.items())
            counts = connection.execute(f"SELECT {', '.join(wrong)}, count(*) FROM {table}").fetchone()
            for name, count in zip(columns, counts, strict=False):
                if count:
                    raise RunError(f"{path}: the run store is damaged: {table}.{name} holds what it can't hold")
            if table == "run" and counts[-1] != 1:
                raise RunError(f"{path}: the run store is damaged: it holds {counts[-1]} runs")
        if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
            raise RunError(f"{path}: the run store is damaged: it has rows of snapshots that it doesn't have")


def _create_tables(connection: sqlite3.Connection) -> None:
    for statement in SCHEMA.split(";\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _connect(address: str, **options: Any) -> sqlite3.Connection:
    connection: sqlite3.Connection = sqlite3.connect(address, timeout=BUSY_SECONDS, isolation_level=None, **options)
    # Tables and views of anybody's making are read before they can be refused, and may have no end.
    connection.set_progress_handler(lambda: 1, _SCHEMA_STEPS)
    return connection


def _connect_read_only(path: Path) -> sqlite3.Connection:
    address = path.resolve().as_uri() + "?mode=ro"
    connection = _connect(address, uri=True)
    try:
        connection.execute(_SCHEMA_QUERY)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        connection.close()
        log = path.with_name(path.name + "-wal")
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _NO_LOCK_FILE or (log.is_file() and log.stat().st_size):
            raise
        # A read-only file system forbids the lock file; without a log nobody is writing, and none is needed.
        connection = _connect(address + "&immutable=1", uri=True)
    return connection


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise RunError(f"{path}: the run store has version {version}; update kcomplex ({VERSION}) to read it")
    if 0 < version < SCHEMA_VERSION:
        raise RunError(
            f"{path}: the run store has version {version}; the kcomplex that wrote it reads it, not this one"
        )
    if version != SCHEMA_VERSION or connection.execute(_SCHEMA_QUERY).fetchall() != _own_schema():
        raise RunError(f"{path}: not a readable run store: its tables aren't those of a run")


@cache
def _own_schema() -> list[Any]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        _create_tables(connection)
        return connection.execute(_SCHEMA_QUERY).fetchall()
