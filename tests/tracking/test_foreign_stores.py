"""A run folder of somebody else is data: nothing that it names is called, opened, written or deleted."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from torch import nn

from kcomplex.cli.main import main
from kcomplex.errors import RunError
from kcomplex.tracking import frames
from kcomplex.tracking.folder import DATABASE, SNAPSHOTS
from kcomplex.tracking.frames import DamagedRunWarning, load_runs
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import attach
from kcomplex.tracking.worker import measure_pending

LOADERS = [frames.load_runs, frames.load_tensors, frames.load_events, frames.load_snapshots, frames.load_configurations]
PAGE = 4096
RECIPE = "seed:factory=torch.nn:Linear,seed=0,in_features=2,out_features=2"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A run with a measured snapshot, one that waits, a metric, an event, and a tensor that was left out."""
    folder = tmp_path_factory.mktemp("template") / "run"
    model = nn.Linear(2, 2)
    tracker = attach(model, run=folder, every=None, estimators="zstd", exclude="bias", measure=False)
    tracker.log(loss=0.5)
    tracker.close()
    measure_pending(folder)
    tracker = attach(model, run=folder, every=None, exclude="bias", resume=True, measure=False)
    tracker.capture()
    tracker.close()
    return folder


@pytest.fixture
def forge(template, tmp_path):
    """Return the folder of a copy of the run that SQL was done to, and nothing refused it."""

    def forged(*statements: str | tuple[str, tuple[object, ...]], name: str = "runs/forged") -> Path:
        run = tmp_path / name
        shutil.copytree(template, run)
        with closing(sqlite3.connect(run / DATABASE)) as connection:
            for statement in statements:
                connection.execute(*((statement,) if isinstance(statement, str) else statement))
            connection.commit()
        return run

    return forged


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kcomplex", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def with_estimators(*specs: str) -> tuple[str, tuple[str]]:
    return "UPDATE run SET estimators = ?", (json.dumps(specs),)


def test_what_a_store_names_is_not_called(forge, tmp_path, command):
    planted = tmp_path / "planted"
    run = forge(with_estimators(f"given:seed:factory=os:system,seed=0,command=touch {planted}|lin", "zstd"))
    with pytest.raises(RunError, match=r"os:system.*if you trust whoever made the run, give the same again"):
        measure_pending(run)
    code, out, err = command("runs", run.parent, "--measure", "--csv")
    assert code == 2
    assert "forged" in out
    assert "give the same again" in err
    assert not planted.exists()
    assert frames.load_snapshots(run)["state"].tolist() == ["measured", "pending"]


def test_what_a_store_names_is_not_opened(forge, tmp_path):
    secret = tmp_path / "secret"
    os.mkfifo(secret)
    # Opening it would wait for ever.
    with pytest.raises(RunError, match="give the same again"):
        measure_pending(forge(with_estimators(f"given:{secret}|lin")))


def test_what_the_user_gives_again_is_used(forge, command):
    run = forge(with_estimators(f"given:{RECIPE}|lin"))
    assert command("runs", run.parent, "--measure", "--given", RECIPE, "--csv")[0] == 0
    assert f"given:{RECIPE}|lin" in load_runs(run)["estimator"].tolist()


def test_resuming_does_not_trust_what_a_store_names(forge):
    run = forge(with_estimators(f"given:{RECIPE}|lin"))
    with pytest.raises(RunError, match="give the same again"):
        attach(nn.Linear(2, 2), run=run, every=None, resume=True)
    attach(nn.Linear(2, 2), run=run, every=None, resume=True, estimators=f"given:{RECIPE}|lin", measure=False).close()


@pytest.mark.parametrize(
    "file",
    [
        "../../victim.safetensors",
        "{folder}/victim.safetensors",
        "snapshots/../../../victim.safetensors",
        "snapshots//victim.safetensors",
        "victim.safetensors",
        "snapshots/",
        "run.sqlite",
        "",
    ],
)
@pytest.mark.parametrize("state", ["measured", "pending"])
def test_files_elsewhere_are_neither_read_nor_deleted(forge, tmp_path, file, state):
    victim = tmp_path / "victim.safetensors"
    victim.write_text("precious")
    row = "INSERT INTO snapshots (step, wall_time, file, bytes, skipped, state) VALUES (9, 0, ?, 0, '[]', ?)"
    run = forge(
        (row, (file.format(folder=tmp_path), state)),
        """UPDATE run SET settings = json_set(settings, '$.keep', 'none')""",
    )
    for read in (measure_pending, load_runs):
        with pytest.raises(RunError, match="which is no snapshot of the run"):
            read(run)
    with pytest.raises(RunError, match="which is no snapshot of the run"):
        attach(nn.Linear(2, 2), run=run, every=None, resume=True, measure=False)
    assert victim.read_text() == "precious"
    assert (run / DATABASE).exists()


@pytest.mark.parametrize("name", [DATABASE, f"{DATABASE}-wal", SNAPSHOTS, "worker.log", "tracker.lock"])
def test_links_in_a_runs_folder_are_not_followed(forge, tmp_path, name):
    run = forge()
    away = tmp_path / "away"
    if name == SNAPSHOTS:
        away.mkdir()
        (away / "victim.safetensors").write_text("precious")
    else:
        away.write_text("precious")
    there = run / name
    if there.is_dir():
        shutil.rmtree(there)
    there.unlink(missing_ok=True)
    there.symlink_to(away)
    for read in (measure_pending, load_runs):
        with pytest.raises(RunError, match="is a link"):
            read(run)
    with pytest.raises(RunError, match="is a link"):
        attach(nn.Linear(2, 2), run=run, every=None, resume=True, measure=False)
    assert (away / "victim.safetensors" if name == SNAPSHOTS else away).read_text() == "precious"


def test_a_snapshot_that_is_a_link_is_not_read(forge, tmp_path):
    run = forge()
    file = next((run / SNAPSHOTS).iterdir())
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="no snapshot of the run"):
        measure_pending(run)
    assert (tmp_path / "elsewhere").exists()


def test_a_claim_that_is_a_link_is_not_followed(forge, tmp_path):
    run = forge()
    with RunStore(run, read_only=True) as store:
        [(_, file)] = store.pending()
    (tmp_path / "victim").write_text("precious")
    (run / f"{file}.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RunError, match="is a link"):
        measure_pending(run)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_journal_that_names_a_file_deletes_nothing(forge, tmp_path):
    # SQLite plays back such a journal, and then deletes the file that it names.
    run, victim = forge("PRAGMA journal_mode = DELETE"), tmp_path / "victim"
    victim.write_text("precious")
    magic, name = bytes.fromhex("d9d505f920a163d7"), str(victim).encode()
    pages = (run / DATABASE).stat().st_size // PAGE
    header = magic + b"".join(number.to_bytes(4, "big") for number in (0, 0, pages, 512, PAGE))
    # Where a locked page of every database lies, which is never written.
    place = ((1 << 30) // PAGE + 1).to_bytes(4, "big")
    named = place + name + len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + magic
    (run / f"{DATABASE}-journal").write_bytes(header.ljust(512, b"\0") + named)
    for read in (measure_pending, load_runs):
        with pytest.raises(RunError, match="no run has a journal"):
            read(run)
    assert victim.read_text() == "precious"


SCHEMAS = {
    "view without end": (
        "ALTER TABLE snapshots RENAME TO hidden",
        "CREATE VIEW snapshots AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id, "
        "0 AS step, 0.0 AS epoch, 0.0 AS wall_time, '' AS file, 0 AS bytes, '[]' AS skipped, 'pending' AS state, "
        "0 AS superseded, 0 AS attempts FROM n",
    ),
    "trigger": ("CREATE TRIGGER t AFTER UPDATE ON snapshots BEGIN DELETE FROM descriptions; END",),
    "virtual table": ("DROP TABLE events", "CREATE VIRTUAL TABLE events USING fts5(id, time, kind, message, snapshot)"),
    "generated column": ("ALTER TABLE run ADD COLUMN more TEXT AS (hex(zeroblob(1000000000)))",),
    "a table less": ("DROP TABLE metrics",),
    "another type": ("DROP TABLE metrics", "CREATE TABLE metrics (snapshot, name, step, value)"),
    "no version": ("PRAGMA user_version = 0",),
    "an index that computes": ("CREATE INDEX i ON events (hex(message))",),
}


@pytest.mark.parametrize("statements", SCHEMAS.values(), ids=SCHEMAS)
def test_a_store_with_other_tables_is_refused(forge, statements):
    run = forge(*statements)
    for read in (*LOADERS, measure_pending, RunStore):
        with pytest.raises(RunError, match="tables aren't those of a run"):
            read(run)


CONTENTS = {
    "step": "UPDATE snapshots SET step = 'late'",
    "wall_time": "UPDATE snapshots SET wall_time = x'00'",
    "epoch": "UPDATE snapshots SET epoch = 'first'",
    "state": "UPDATE snapshots SET state = 'lost'",
    "waiting without a file": "UPDATE snapshots SET file = NULL WHERE state = 'pending'",
    "superseded": "UPDATE snapshots SET superseded = 2",
    "attempts": "UPDATE snapshots SET attempts = 9223372036854775807",
    "bytes": "UPDATE snapshots SET bytes = -1",
    "metric's value": "UPDATE metrics SET value = 'high'",
    "metric's name is a column": "UPDATE metrics SET name = 'bits'",
    "metric without a name": "UPDATE metrics SET name = ''",
    "description's value": "UPDATE descriptions SET value = x'ff'",
    "weights": "UPDATE descriptions SET weights = -1",
    "estimator": "UPDATE descriptions SET estimator = 5.5, kind = x'00'",
    "lossless": "UPDATE descriptions SET lossless = 'yes'",
    "orphans": "UPDATE descriptions SET snapshot = 77",
    "too many weights": "UPDATE tensors SET weights = 9223372036854775807",
    "tensor": "UPDATE tensors SET raw_bits = 'many'",
    "event": "UPDATE events SET time = 'now'",
    "status": "UPDATE run SET status = 'eaten'",
    "seed": "UPDATE run SET seed = 'abc'",
    "no run": "DELETE FROM run",
    "two runs": "INSERT INTO run SELECT * FROM run",
}


@pytest.mark.parametrize("statement", CONTENTS.values(), ids=CONTENTS)
def test_a_store_with_other_values_is_damaged_in_one_error(forge, statement):
    run = forge(statement)
    for read in (*LOADERS, measure_pending):
        with pytest.raises(RunError, match=f"forged/{DATABASE}: the run store is damaged"):
            read(run)


def test_what_is_no_text_is_damage(forge):
    run = forge("UPDATE events SET message = CAST(x'ff' AS TEXT)")
    with pytest.raises(RunError, match="not a readable run store"):
        frames.load_events(run)


NONSENSE = ["", "{", "[" * 5000, "5", "null_", '{"a": "b"}', '[["a"]]', "9" * 5000, '{"keep": "any"}', "[1, -1]"]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_texts_that_say_nonsense_are_damage(forge, text):
    for number, (place, read) in enumerate(
        {
            "run SET settings": frames.load_configurations,
            "run SET estimators": measure_pending,
            "tensors SET shape": frames.load_tensors,
            "tensors SET parts": frames.load_tensors,
            "snapshots SET skipped": frames.load_tensors,
        }.items()
    ):
        run = forge((f"UPDATE {place} = ?", (text,)), name=f"runs/{number}")
        with pytest.raises(RunError, match="the run store is damaged"):
            read(run)


@pytest.mark.parametrize("load", LOADERS)
def test_a_damaged_run_does_not_hide_the_others(forge, load, command):
    whole, damaged = forge(name="runs/whole"), forge(name="runs/damaged")
    content = bytearray((damaged / DATABASE).read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = os.urandom(4096)
    (damaged / DATABASE).write_bytes(content)
    with pytest.warns(DamagedRunWarning, match="damaged"):
        assert set(load(whole.parent)["run"]) == {"whole"}
    with pytest.raises(RunError, match="damaged"):
        load(damaged)
    if load is load_runs:
        code, out, err = command("runs", whole.parent, "--measure", "--csv")
        assert code == 2
        assert out.count("whole,") == 2
        assert "damaged," not in out
        assert [line for line in err.splitlines() if "runs/damaged/" in line] == [err.splitlines()[0]]
        assert command("runs", damaged, "--csv")[0] == 2


def test_a_folder_of_damaged_runs_only_is_an_error(forge):
    run = forge("DELETE FROM run")
    with pytest.warns(DamagedRunWarning), pytest.raises(RunError, match="none of the runs below can be read"):
        load_runs(run.parent)


def test_names_of_one_value_each_do_not_make_a_table_of_their_square(forge):
    many = 5000
    run = forge(
        ("WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < ?) INSERT INTO snapshots "
         "(id, step, wall_time, bytes, skipped, state) SELECT i, i, 0, 0, '[]', 'skipped' FROM n", (100 + many,)),
        "INSERT INTO metrics SELECT id, 'm' || id, step, 1.0 FROM snapshots WHERE id >= 100",
    )  # fmt: skip
    with pytest.raises(RunError, match="too large a table"):
        load_runs(run)
    parts = json.dumps({f"part {number}": 1 for number in range(4000)})
    run = forge(
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) INSERT INTO tensors SELECT "
         "1, i, '[]', 'float32', 1, 1, 1.0, 0.0, 1, CASE WHEN i = 1 THEN ? ELSE '{}' END FROM n", (parts,)),
        name="runs/parts",
    )  # fmt: skip
    with pytest.raises(RunError, match="too large a table"):
        frames.load_tensors(run)


def record(*values: object) -> bytes:
    """Return a cell of a table's leaf, with its row; its numbers are below 128."""
    types = bytes([0 if value is None else 1 if isinstance(value, int) else 13 + 2 * len(value) for value in values])
    body = b"".join(bytes([value]) if isinstance(value, int) else (value or "").encode() for value in values)
    return bytes([1 + len(types) + len(body), 1, 1 + len(types)]) + types + body


def page(cells: list[bytes], right: bytes = b"", start: int = 0) -> bytes:
    """Return a page of a table's tree: a leaf, or one with children, of which ``right`` is the last."""
    content = b"".join(reversed(cells))
    places = [PAGE - sum(map(len, cells[: place + 1])) for place in range(len(cells))]
    counts = b"".join(number.to_bytes(2, "big") for number in (len(cells), PAGE - len(content)))
    head = bytes([5 if right else 13, 0, 0]) + counts + b"\0" + right
    head += b"".join(place.to_bytes(2, "big") for place in places)
    return (bytes(start) + head).ljust(PAGE - len(content), b"\0") + content


@pytest.mark.parametrize("read_only", [True, False])
def test_a_schema_that_never_ends_is_refused(forge, read_only):
    # Each page's 301 children are one and the same page, eight times: more rows than anybody can read.
    run = forge("PRAGMA journal_mode = DELETE")
    path = run / DATABASE
    content = bytearray(path.read_bytes())
    first = len(content) // PAGE + 1
    names = [(first + place).to_bytes(4, "big") for place in range(9)]
    pages = [page([record("table", "t", "t", 2, "CREATE TABLE t(x UNIQUE)")])]
    pages += [page([child + b"\1"] * 300, right=child) for child in names[2:]]
    pages += [page([record("index", "sqlite_autoindex_t_1", "t", 3, None)])]
    content[100:PAGE] = page([names[0] + b"\1"], right=names[1], start=100)[100:]
    content += b"".join(pages)
    content[28:32] = (len(content) // PAGE).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(RunError, match="not a readable run store: interrupted"):
        RunStore(run, read_only=read_only)


def test_a_folder_whose_name_is_not_text(forge, tmp_path):
    name = os.fsdecode(b"run\xff")
    with pytest.raises(RunError, match="isn't UTF-8 text"):
        attach(nn.Linear(2, 2), run=tmp_path / name, every=None, estimators="raw", measure=False)
    assert not (tmp_path / name).exists()
    forge().rename(tmp_path / name)
    assert {each.encode() for each in load_runs(tmp_path)["run"]} == {b"run\\udcff"}


def test_numbers_that_are_none_survive_in_metrics(tmp_path):
    tracker = attach(nn.Linear(2, 2), run=tmp_path / "run", every=None, estimators="raw", measure=False)
    tracker.log(a=float("nan"), b=float("inf"), c=-float("inf"), d=1e300)
    tracker.close()
    measure_pending(tmp_path / "run")
    [row] = load_runs(tmp_path).to_dict("records")
    assert row["a"] != row["a"]
    assert (row["b"], row["c"], row["d"]) == (float("inf"), -float("inf"), 1e300)
