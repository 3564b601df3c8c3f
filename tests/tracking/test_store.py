"""The run store: several writers, versions, and what it refuses."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import threading

import pytest
import torch

import kcomplex as kc
from kcomplex.errors import RunError
from kcomplex.tracking.folder import DATABASE
from kcomplex.tracking.store import RunStore, SnapshotRow
from kcomplex.tracking.tracker import attach
from tests.children import PATIENCE

WRITERS, ROWS = 4, 25

WRITE = """
import sys
from kcomplex.tracking.store import RunStore, SnapshotRow
run, writer, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with RunStore(run) as store:
    for step in range(rows):
        snapshot = store.add_snapshot(SnapshotRow(step, None, 0.0, f"{writer}-{step}", 1))
        store.add_metrics(snapshot, step, {"writer": writer, "step": step})
        store.add_event("failed", f"{writer}", snapshot)
"""


@pytest.fixture
def store(tmp_path):
    with RunStore.create(tmp_path / "run", ["zstd"], {"keep": "ends"}, {"lr": 0.1}, seed=0) as created:
        yield created


def count(store, table):
    return store.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def check_writers(store):
    assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert count(store, "snapshots") == count(store, "events") == WRITERS * ROWS
    rows = store.connection.execute(
        "SELECT file, metrics.value FROM snapshots JOIN metrics ON metrics.snapshot = id WHERE name = 'writer'"
    ).fetchall()
    assert len(rows) == WRITERS * ROWS
    assert all(file.startswith(f"{int(writer)}-") for file, writer in rows)


def test_several_threads_write_at_once(store):
    def write(writer):
        with RunStore(store.run) as own:
            for step in range(ROWS):
                snapshot = own.add_snapshot(SnapshotRow(step, None, 0.0, f"{writer}-{step}", 1))
                own.add_metrics(snapshot, step, {"writer": writer, "step": step})
                own.add_event("failed", str(writer), snapshot)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_writers(store)


def test_several_processes_write_at_once(store, children):
    processes = [
        children.start([sys.executable, "-c", WRITE, store.run, str(writer), str(ROWS)]) for writer in range(WRITERS)
    ]
    assert [process.wait(PATIENCE) for process in processes] == [0] * WRITERS
    check_writers(store)


def test_one_of_several_creators_wins(tmp_path):
    outcomes = []

    def create():
        try:
            attach(torch.nn.Linear(1, 1), run=tmp_path / "run", estimators="raw", every=None, measure=False).close()
            outcomes.append("created")
        except RunError as error:
            outcomes.append("refused" if "the run exists already" in str(error) else str(error))

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["created", "refused", "refused", "refused"]


def test_readers_dont_wait_for_a_writer(store):
    with store.transaction():
        store.add_snapshot(SnapshotRow(0, None, 0.0, "file", 1))
        with RunStore(store.run, read_only=True) as reader:
            assert reader.pending() == []
    with RunStore(store.run, read_only=True) as reader:
        assert len(reader.pending()) == 1


def test_a_reader_cannot_write(store):
    with RunStore(store.run, read_only=True) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.add_event("failed", "no")


def test_a_transaction_that_fails_leaves_nothing(store):
    def fail():
        with store.transaction():
            store.add_snapshot(SnapshotRow(0, None, 0.0, "file", 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert count(store, "snapshots") == 0


def test_a_snapshot_is_measured_once(store):
    snapshot = store.add_snapshot(SnapshotRow(0, None, 0.0, "file", 1))
    descriptions = kc.describe({"weight": torch.zeros(10)}, ["zstd", "raw"])
    with RunStore(store.run) as other:
        assert other.add_descriptions(snapshot, descriptions, [])
    assert not store.add_descriptions(snapshot, descriptions, ["too late"])
    assert count(store, "descriptions") == count(store, "tensors") == 2
    assert store.failures() == []
    assert store.pending_bytes() == 0


def test_rows_belong_to_a_snapshot(store):
    with pytest.raises(sqlite3.IntegrityError):
        store.add_metrics(7, 0, {"loss": 1.0})


def test_a_newer_store_is_refused(store):
    store.connection.execute("PRAGMA user_version = 1000")
    with pytest.raises(RunError, match="update kcomplex"):
        RunStore(store.run)


def test_a_run_that_cannot_be_created_leaves_nothing_and_can_be_later(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", refuse)
        patch.setattr(os, "replace", refuse)
        with pytest.raises(RunError, match="no space left"):
            RunStore.create(tmp_path / "run", ["zstd"], {}, {}, seed=0)
    assert not (tmp_path / "run" / DATABASE).exists()
    with RunStore.create(tmp_path / "run", ["zstd"], {}, {}, seed=0) as store:
        assert store.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run here"):
        RunStore(tmp_path)
    (tmp_path / DATABASE).write_bytes(b"not a database at all" * 100)
    for attempt in (lambda: RunStore(tmp_path), lambda: RunStore(tmp_path, read_only=True)):
        with pytest.raises(RunError, match="not a readable run store"):
            attempt()
    with pytest.raises(RunError, match="exists already"):
        RunStore.create(tmp_path, ["zstd"], {}, {}, seed=0)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="can't be created"):
        RunStore.create(tmp_path / "file" / "run", ["zstd"], {}, {}, seed=0)


def test_a_finished_run_is_read_where_no_lock_file_can_be_written(store, monkeypatch):
    store.add_event("failed", "kept")
    store.close()
    folder = store.run
    for leftover in (*folder.glob("*-wal"), *folder.glob("*-shm")):
        leftover.unlink()
    # Root may write into read-only folders, so that the refusal of a read-only file system is acted.
    connect_really = sqlite3.connect

    def refuse(address, **options):
        if "immutable" not in address:
            connection = connect_really(":memory:")
            connection.close()
            return Refusing()
        return connect_really(address, **options)

    class Refusing:
        def set_progress_handler(self, *_):
            pass

        def execute(self, _):
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error

        def close(self):
            pass

    monkeypatch.setattr(sqlite3, "connect", refuse)
    with RunStore(folder, read_only=True) as reader:
        assert reader.failures() == ["kept"]
    (folder / f"{DATABASE}-wal").write_bytes(b"a log that is being written")
    with pytest.raises(RunError):
        RunStore(folder, read_only=True)


def test_a_run_can_be_moved(store, tmp_path):
    store.add_event("failed", "kept")
    store.close()
    shutil.move(store.run, tmp_path / "elsewhere")
    with RunStore(tmp_path / "elsewhere", read_only=True) as moved:
        assert moved.failures() == ["kept"]


def test_what_a_killed_writer_left_goes_when_a_run_is_continued(tmp_path):
    with RunStore.create(tmp_path / "run", ["zstd"], {"keep": "all"}, {}, seed=0) as store:
        (tmp_path / "run" / "snapshots").mkdir(exist_ok=True)
        (tmp_path / "run" / "snapshots" / ".kcomplex-0123456789abcdef.partial").write_bytes(b"half")
        store.resume(0, {"keep": "all"}, 0)
    assert not list((tmp_path / "run" / "snapshots").iterdir())
