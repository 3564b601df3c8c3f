"""Damaged run stores, and forged ones: they are read, measured, listed and resumed, or refused."""

from __future__ import annotations

import contextlib
import io
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from kcomplex.cli.runs import runs
from kcomplex.errors import KComplexError
from kcomplex.tracking import frames
from kcomplex.tracking.folder import DATABASE, SNAPSHOTS
from kcomplex.tracking.tracker import attach
from kcomplex.tracking.worker import measure_pending
from tests.fuzz.frame import Input, main

PAGE = 4096
ESTIMATORS = ("zstd", "given:initial|lin", "l2")
_COLUMNS = {
    "run": ("name", "created", "config", "settings", "estimators", "version", "seed", "status"),
    "snapshots": ("id", "step", "epoch", "wall_time", "file", "bytes", "skipped", "state", "superseded", "attempts"),
    "metrics": ("snapshot", "name", "step", "value"),
    "descriptions": (
        "id", "snapshot", "estimator", "kind", "unit", "value", "weights", "raw_bits", "lossless", "distortion",
        "seconds", "version", "parts", "counted_tensors", "all_tensors", "coverage", "nonfinite", "selection",
        "given_tensors", "given_of",
    ),
    "tensors": (
        "description", "tensor", "shape", "dtype", "weights", "raw_bits", "value", "squared_error", "exact", "parts",
    ),
    "events": ("id", "time", "kind", "message", "snapshot"),
}  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 127, 1 << 31, 1 << 53, (1 << 63) - 1, -(1 << 63), 0.5, 1e308, -1e308, float("inf"), 5e-324)
_NAMES = (
    "", "x", "step", "run", "bits", "part_x", "zstd", "raw", "l2", "bits ", "\x1b]0;x\x07", "[/a]", "\0", "\ud7ff",
    "é" * 500, "a" * 200_000, "pending", "measured", "failed", "skipped", "running", "1", "-1", "9" * 30,
)  # fmt: skip
_PATHS = (
    "snapshots/0000000000-0.safetensors", "snapshots/0000000002-2.safetensors", "snapshots/none.safetensors",
    "../../x.safetensors", "/etc/passwd", "snapshots/../run.sqlite", "snapshots", "snapshots/", "run.sqlite",
    "/dev/zero",
)  # fmt: skip
_TEXTS = (
    "{}", "[]", "null", "5", "[1, 2]", "[-1]", '["zstd"]', '[["a", "b", [2], "float32", "", ""]]', '[["a", 1]]',
    "[" * 3000, '{"a": 1}', '{"a": "b"}', '{"a": NaN}', '{"a": 1e999}', '{"keep": "none"}', '{"keep": []}',
    '{"a": ' + "9" * 400 + "}",
    '["given:seed:factory=os:abort,seed=0|lin"]', '["given:/dev/zero|lin"]',
    '["given:initial|lin", "given:initial|zstd"]',
    '["palette|entropy", "uniform:bits=4|zstd"]', '["' + "zstd|" * 2000 + '"]', '["mosaic|entropy"]', "[{}]", '"', "{",
    '{"' + "a" * 100_000 + '": 1}', "[1e400]", '["nothing:x=1"]', '["zstd:level=1000000000000"]',
)  # fmt: skip
_SCHEMAS = (
    "CREATE VIEW endless AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    "DROP TABLE {table}",
    "ALTER TABLE {table} RENAME TO hidden",
    "ALTER TABLE {table} ADD COLUMN more",
    "ALTER TABLE {table} RENAME COLUMN {column} TO other",
    "CREATE VIEW snapshots AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id FROM n",
    "CREATE TRIGGER t AFTER UPDATE ON snapshots BEGIN DELETE FROM run; END",
    "CREATE VIRTUAL TABLE more USING fts5(a)",
    "CREATE INDEX i ON {table} (hex({column}))",
    "PRAGMA user_version = {number}",
    "PRAGMA application_id = {number}",
    "DROP INDEX snapshots_by_state",
    "UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')",
    "UPDATE sqlite_master SET sql = replace(sql, 'INTEGER', 'TEXT') WHERE name = '{table}'",
    "UPDATE sqlite_master SET rootpage = {root} WHERE name = '{table}'",
    "UPDATE sqlite_master SET name = 'other' WHERE name = '{table}'",
    "UPDATE sqlite_master SET type = 'view', rootpage = 0 WHERE name = '{table}'",
    "PRAGMA journal_mode = {mode}",
    "VACUUM",
    "REINDEX",
)
_MANY = "WITH RECURSIVE n(i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < ?) INSERT INTO "
_MORE_ROWS = (
    "snapshots (id, step, wall_time, bytes, skipped, state) SELECT i, i, 0, 0, '[]', 'skipped' FROM n",
    "metrics SELECT 1, 'm' || i, 0, i FROM n",
    "tensors SELECT 1, 't' || i, '[2]', 'float32', 2, 64, 1.0, 0.0, 1, '{\"p' || i || '\": 1}' FROM n",
    "events SELECT i, 0, 'k', 'm', NULL FROM n",
)


class Terminal(io.StringIO):
    """Where tables are written to."""

    def isatty(self) -> bool:
        """Return that it is one."""
        return True


@cache
def template() -> tuple[bytes, dict[str, bytes]]:
    """Return a run store and its snapshots by name: two that are measured, and one that waits."""
    with TemporaryDirectory() as folder:
        run, model = Path(folder) / "run", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        for position, parameter in enumerate(model.parameters()):
            parameter.detach().fill_(0.1 * position)
        tracker = attach(model, run=run, every=None, estimators=ESTIMATORS, exclude="*.bias", keep="all", measure=False)
        tracker.log(loss=0.5, accuracy=float("nan"))
        tracker.step()
        tracker.capture()
        tracker.close()
        measure_pending(run)
        tracker = attach(model, run=run, every=None, exclude="*.bias", keep="all", resume=True, measure=False)
        tracker.step()
        tracker.capture()
        tracker.close()
        files = {}
        with contextlib.closing(sqlite3.connect(run / DATABASE, isolation_level=None)) as connection:
            # The same bytes every time: what happens by chance, and at what time, is made the same.
            for column in ("run.created", "snapshots.wall_time", "events.time", "descriptions.seconds"):
                connection.execute("UPDATE {} SET {} = 0.5".format(*column.split(".")))
            connection.execute("UPDATE run SET seed = '0', version = 'x'")
            connection.execute("UPDATE descriptions SET version = 'x'")
            connection.execute("UPDATE events SET message = 'resumed'")
            for step, file in connection.execute("SELECT step, file FROM snapshots ORDER BY id").fetchall():
                name = f"{SNAPSHOTS}/{step:010d}-{step}.safetensors"
                files[name] = (run / file).read_bytes()
                connection.execute("UPDATE snapshots SET file = ? WHERE file = ?", (name, file))
            connection.execute("VACUUM")
        return (run / DATABASE).read_bytes(), files


def make(random: Random) -> Input:
    """Return a store that was damaged in its bytes or pages, or forged with SQL, or both."""
    data = template()[0]
    kind = random.random()
    if kind > 0.35:
        data = _forged(data, random)
    if kind < 0.45:
        data = _damaged(bytearray(data), random)
    return Input(".sqlite", data)


def _damaged(data: bytearray, random: Random) -> bytes:
    pages = max(1, len(data) // PAGE)
    for _ in range(random.choice((1, 1, 2, 5))):
        page = PAGE * random.randrange(pages)
        kind = random.randrange(7)
        if kind == 0:
            for _ in range(random.choice((1, 4, 30))):
                data[random.randrange(len(data))] = random.randrange(256)
        elif kind == 1:
            data[page : page + PAGE] = random.choice((random.randbytes(PAGE), bytes(PAGE), b"\xff" * PAGE))
        elif kind == 2:
            other = PAGE * random.randrange(pages)
            data[page : page + PAGE] = data[other : other + PAGE]
        elif kind == 3:
            del data[random.randrange(1, len(data)) :]
            data += bytes(random.choice((0, 0, PAGE, 10 * PAGE)))
        elif kind == 4:
            place = random.randrange(100)
            data[place : place + 4] = random.choice((bytes(4), b"\xff" * 4, random.randbytes(4)))
        elif kind == 5:
            # Head of a page's tree: kind, free blocks, cells, and where they are.
            place = page + (100 if page == 0 else 0) + random.randrange(20)
            data[place : place + 2] = random.choice((bytes(2), b"\xff\xff", random.randbytes(2)))
        else:
            place = random.randrange(len(data))
            data[place : place + 1] = bytes([data[place] ^ 1 << random.randrange(8)]) if place < len(data) else b""
        if not data:
            break
        pages = max(1, len(data) // PAGE)
    return bytes(data)


def _forged(data: bytes, random: Random) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / DATABASE
        path.write_bytes(data)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for pragma in ("writable_schema = ON", "ignore_check_constraints = ON", "foreign_keys = OFF"):
                connection.execute(f"PRAGMA {pragma}")
            for _ in range(random.choice((1, 1, 2, 4))):
                # What SQLite itself refuses is no case.
                with contextlib.suppress(sqlite3.Error):
                    connection.execute(*_statement(random))
        return path.read_bytes()


def _statement(random: Random) -> tuple[str, tuple[Any, ...]]:
    table = random.choice(list(_COLUMNS))
    column = random.choice(_COLUMNS[table])
    kind = random.random()
    if kind < 0.1:
        return _MANY + random.choice(_MORE_ROWS), (1000 + random.choice((1, 100, 3000, 20000)),)
    if kind < 0.25:
        number, root = random.choice(_NUMBERS), random.randrange(30)
        mode = random.choice(("DELETE", "WAL", "TRUNCATE", "OFF"))
        return random.choice(_SCHEMAS).format(table=table, column=column, number=number, root=root, mode=mode), ()
    if kind < 0.3:
        return f"DELETE FROM {table} WHERE random() % 2", ()
    if kind < 0.35:
        return f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}", ()
    values: tuple[Any, ...] = random.choice(
        (_NUMBERS, _NAMES, _TEXTS, _PATHS, (None, b"", random.randbytes(8), b"\0" * 100_000))
    )
    fitting = {
        "file": _PATHS,
        "skipped": _TEXTS,
        "parts": _TEXTS,
        "shape": _TEXTS,
        "estimators": _TEXTS,
        "settings": _TEXTS,
    }
    if random.random() < 0.5:
        values = fitting.get(column, values)
    some = random.choice(("", f" WHERE rowid = {random.randrange(4)}")) if table not in ("metrics", "tensors") else ""
    if random.random() < 0.1:
        # Text that is none.
        return f"UPDATE {table} SET {column} = CAST(? AS TEXT){some}", (random.randbytes(5),)
    return f"UPDATE {table} SET {column} = ?{some}", (random.choice(values),)


def read(path: Path) -> None:
    """Do everything with a store that users do."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "runs" / "run"
        (run / SNAPSHOTS).mkdir(parents=True)
        shutil.copyfile(path, run / DATABASE)
        for name, content in template()[1].items():
            (run / name).write_bytes(content)
        refusals = [_refusal(use, run) for use in _USES]
        outside = [entry.name for entry in (*Path(folder).iterdir(), *run.parent.iterdir())]
        if outside != ["runs", "run"]:
            raise AssertionError(f"something was written beside the run: {outside}")
    for refusal in filter(None, refusals):
        raise refusal


def _refusal(use: Callable[[Path], object], run: Path) -> KComplexError | None:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(Terminal()), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            use(run)
    except KComplexError as error:
        if len(str(error)) > 1000:
            raise AssertionError(f"an error of {len(str(error))} letters") from error
        return error
    return None


def _list(run: Path) -> None:
    runs(str(run.parent), as_csv=True)


def _list_events(run: Path) -> None:
    runs(str(run.parent), events=True, as_json=True)


def _list_all(run: Path) -> None:
    runs(str(run), all_snapshots=True)


def _resume(run: Path) -> None:
    attach(nn.Linear(2, 2), run=run, every=None, resume=True, measure=False).close()


_USES: tuple[Callable[[Path], object], ...] = (
    frames.load_runs,
    frames.load_tensors,
    frames.load_snapshots,
    frames.load_configurations,
    _list_events,
    measure_pending,
    _list,
    _list_all,
    _resume,
)

if __name__ == "__main__":
    # What is compiled and imported at the first reading is there before the cases' processes are forked.
    with TemporaryDirectory() as folder:
        (Path(folder) / DATABASE).write_bytes(template()[0])
        read(Path(folder) / DATABASE)
    main("stores", make, read)
