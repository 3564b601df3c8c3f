"""The run store's database: its tables, how it is created and opened."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

DATABASE = "run.sqlite"
SCHEMA_VERSION = 1
# Longer than any transaction of another writer, even on a machine that is busy training.
BUSY_SECONDS = 60.0

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


def create_tables(connection: sqlite3.Connection) -> None:
    """Make the tables, inside the caller's transaction."""
    for statement in SCHEMA.split(";\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection that reads and writes, made if absent; transactions are begun explicitly.

    Raises
    ------
    sqlite3.Error
        The file can't be opened, or isn't a database.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    # SQLite refuses this change at once, whatever the timeout, while another connection is about to write.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Return a connection that never writes, nor waits for those who do.

    Raises
    ------
    sqlite3.Error
        The file can't be opened, or isn't a database.
    """
    address = path.resolve().as_uri() + "?mode=ro"
    connection = sqlite3.connect(address, timeout=BUSY_SECONDS, isolation_level=None, uri=True)
    try:
        schema_version(connection)
    except sqlite3.Error as error:
        connection.close()
        log = path.with_name(path.name + "-wal")
        if error.sqlite_errorcode & 0xFF not in _NO_LOCK_FILE or (log.is_file() and log.stat().st_size):
            raise
        # A read-only file system forbids the lock file; without a log nobody is writing, and none is needed.
        connection = sqlite3.connect(address + "&immutable=1", isolation_level=None, uri=True)
    return connection


def schema_version(connection: sqlite3.Connection) -> int:
    """Return the version of the tables; 0 where there are none yet."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
