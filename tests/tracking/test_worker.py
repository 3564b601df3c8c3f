"""The measuring process: it measures beside the training, and nothing that happens to it stops the training."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import kcomplex as kc
from kcomplex.errors import SpecError
from kcomplex.tracking import store as store_module
from kcomplex.tracking import waiting, writer
from kcomplex.tracking.folder import claim
from kcomplex.tracking.frames import load_configurations, load_events, load_snapshots
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import TrackingWarning
from kcomplex.tracking.waiting import wait_for_worker
from kcomplex.tracking.worker import MOST_ATTEMPTS, measure_pending
from tests.children import PATIENCE, run, until

# Ends when its standard input does.
WAITING = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]

UNCLOSED = """
import sys
import torch
from kcomplex.tracking.tracker import attach
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
tracker = attach(model, optimizer, run=sys.argv[1], every=1, estimators="zstd", measure=False)
for _ in range(3):
    optimizer.step()
"""


def process_of(tracker):
    until(lambda: tracker._writer.process is not None)
    return tracker._writer.process


def test_closing_waits_until_all_is_measured_by_another_process(track, train, model):
    tracker = track(every=2, measure=True)
    train(4)
    tracker.log(accuracy=0.5)
    tracker.close()
    frame = kc.load_runs(tracker.run)
    assert frame["step"].tolist() == [0, 0, 2, 2, 4, 4]
    assert frame["bits"].tolist()[-2:] == [item.bits for item in kc.describe(model, ["zstd", "raw"])]
    assert load_configurations(tracker.run)["status"].tolist() == ["finished"]
    assert sorted(path.name for path in tracker.run.iterdir() if "-" not in path.name) == [
        "run.sqlite",
        "snapshots",
        "tracker.lock",
    ]


def test_closing_doesnt_wait_for_the_pipe_of_forked_children(track, train, monkeypatch):
    # Data loaders' processes are forked, and hold every file of the training process open.
    monkeypatch.setattr(writer, "START_AFTER_SECONDS", 0.0)
    tracker = track(every=1, measure=True)
    copy = os.dup(process_of(tracker).stdin.fileno())
    try:
        train(2)
        tracker.close(timeout=PATIENCE)
        assert process_of(tracker).returncode == 0
    finally:
        os.close(copy)
    assert load_snapshots(tracker.run)["state"].tolist() == ["measured"] * 3


def test_a_measuring_process_that_is_killed_is_told_and_started_again(track, train, monkeypatch):
    monkeypatch.setattr(writer, "START_AFTER_SECONDS", 0.0)
    tracker = track(every=1, measure=True)
    process = process_of(tracker)
    process.kill()
    process.wait()
    train(3)
    with pytest.warns(TrackingWarning, match="exit code -9; it is started again"):
        tracker.close()
    assert process_of(tracker).returncode == 0
    assert load_snapshots(tracker.run)["state"].tolist() == ["measured"] * 4


def test_what_a_dead_measuring_process_leaves_can_be_made_up_for(track, train, monkeypatch):
    monkeypatch.setattr(writer, "START_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(writer, "MOST_REVIVALS", 0)
    tracker = track(every=1, measure=True)
    process = process_of(tracker)
    process.kill()
    process.wait()
    train(3)
    with pytest.warns(TrackingWarning, match="exit code -9"):
        tracker.close()
    assert measure_pending(tracker.run) == 4
    assert load_snapshots(tracker.run)["state"].tolist() == ["measured"] * 4


def test_a_measuring_process_that_cannot_start_is_an_event(track, train, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    tracker = track(every=1, measure=True)
    train(1)
    with pytest.warns(TrackingWarning, match="can't be started"):
        tracker.close()
    assert load_events(tracker.run)["kind"].tolist() == ["failed"]
    assert measure_pending(tracker.run) == 2


def test_a_program_that_ends_without_closing_keeps_its_snapshots(tmp_path):
    run([sys.executable, "-c", UNCLOSED, tmp_path / "run"])
    assert load_configurations(tmp_path)["status"].tolist() == ["interrupted"]
    assert load_snapshots(tmp_path)["step"].tolist() == [0, 1, 2, 3]
    assert measure_pending(tmp_path / "run") == 4


def test_measuring_what_waits_tells_its_progress(track, train):
    tracker = track(every=1)
    train(2)
    tracker.close()
    seen = []
    assert measure_pending(tracker.run, progress=lambda done, left: seen.append((done, left))) == 3
    assert seen == [(1, 2), (2, 1), (3, 0)]
    assert measure_pending(tracker.run) == 0


def attempts(run):
    with RunStore(run, read_only=True) as store:
        return store.connection.execute("SELECT attempts FROM snapshots").fetchall()


def test_several_measure_one_run_at_once(track, train):
    tracker = track(every=1, keep="all")
    train(19)
    tracker.close()
    counts = []
    threads = [threading.Thread(target=lambda: counts.append(measure_pending(tracker.run))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 20
    assert load_snapshots(tracker.run)["state"].tolist() == ["measured"] * 20
    assert load_events(tracker.run).empty
    # Nobody began what another was measuring.
    assert attempts(tracker.run) == [(1,)] * 20
    assert {path.suffix for path in (tracker.run / "snapshots").iterdir()} == {".safetensors"}


def test_what_another_process_measures_is_waited_for(track, monkeypatch):
    tracker = track()
    tracker.close()
    with RunStore(tracker.run) as store:
        [(_, file)] = store.pending()
    with ExitStack() as other:
        assert other.enter_context(claim(tracker.run, file))
        # It ends without having measured.
        waits = []
        monkeypatch.setattr(store_module.time, "sleep", lambda seconds: (waits.append(seconds), other.close()))
        assert measure_pending(tracker.run) == 1
    assert len(waits) == 1


def test_what_a_killed_process_left_claimed_is_measured(track):
    tracker = track()
    tracker.close()
    with RunStore(tracker.run) as store:
        [(_, file)] = store.pending()
    (tracker.run / f"{file}.lock").touch()
    assert measure_pending(tracker.run) == 1
    assert not (tracker.run / f"{file}.lock").exists()


def test_ending_the_measuring_is_no_failure_of_the_snapshot(track, monkeypatch):
    from kcomplex.estimators.code import CoderCode

    tracker = track(estimators=["zstd"])
    tracker.close()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CoderCode, "describe", interrupted)
        for _ in range(MOST_ATTEMPTS + 1):
            with pytest.raises(KeyboardInterrupt):
                measure_pending(tracker.run)
    assert attempts(tracker.run) == [(0,)]
    assert measure_pending(tracker.run) == 1


@pytest.mark.slow
def test_a_measuring_process_uses_what_its_user_gave(track):
    recipe = "seed:factory=torch.nn:Linear,seed=0,in_features=4,out_features=8"
    tracker = track(measure=True, estimators=f"given:{recipe}|lin")
    tracker.close()
    assert kc.load_runs(tracker.run)["estimator"].tolist() == [f"given:{recipe}|lin"]


def test_a_measuring_process_is_told_what_its_user_gave(track, monkeypatch):
    commands = []

    def start(command, **_):
        commands.append(command)
        raise OSError("not now")

    monkeypatch.setattr(writer.subprocess, "Popen", start)
    tracker = track(measure=True, estimators=["given:initial|lin", "given:start.safetensors|lin", "zstd"])
    with pytest.warns(TrackingWarning, match="not now"):
        tracker.close()
    assert commands[0][commands[0].index(str(tracker.run)) :] == [str(tracker.run), "start.safetensors"]


def test_an_estimator_that_isnt_installed_any_more_is_an_event(track):
    tracker = track()
    tracker.close()
    with RunStore(tracker.run) as store:
        store.connection.execute("""UPDATE run SET estimators = '["zstd", "gone"]'""")
    assert measure_pending(tracker.run) == 1
    assert kc.load_runs(tracker.run)["estimator"].tolist() == ["zstd"]
    assert "gone" in load_events(tracker.run)["message"].iloc[0]


@pytest.fixture
def with_foreign(track, monkeypatch):
    """Return a run to be measured, every description of which holds a value of a foreign type."""
    from kcomplex.estimators.code import CoderCode

    def closed_run(field, convert):
        tracker = track(estimators=["zstd"])
        tracker.close()
        describe = CoderCode.describe

        def described(self, weights, **options):
            description = describe(self, weights, **options)
            object.__setattr__(description, field, convert(getattr(description, field)))
            return description

        monkeypatch.setattr(CoderCode, "describe", described)
        return tracker.run

    return closed_run


def test_a_description_that_the_store_cannot_hold_is_an_event(with_foreign):
    run = with_foreign("seconds", lambda _: torch.zeros(1))
    assert measure_pending(run) == 1
    assert load_snapshots(run)["state"].tolist() == ["failed"]
    assert "can't be recorded" in load_events(run)["message"].iloc[0]


def test_a_description_may_hold_numbers_of_numpy(with_foreign):
    run = with_foreign("weights", np.int64)
    assert measure_pending(run) == 1
    assert kc.load_runs(run)["weights"].iloc[0] > 0


def test_waiting_ends_at_the_timeout_and_leaves_the_process_alone(track, children):
    tracker = track()
    process = children.start(WAITING, stdin=subprocess.PIPE)
    assert wait_for_worker(process, tracker.run, timeout=0.1) == []
    assert process.poll() is None


def test_waiting_shows_a_bar_on_a_terminal(track, children, monkeypatch, capsys):
    process = children.start(WAITING, stdin=subprocess.PIPE)
    progress = waiting._progress

    def shown_once(run, stack):
        show = progress(run, stack)
        return lambda: (show(), process.stdin.close())

    monkeypatch.setattr(waiting, "_progress", shown_once)
    monkeypatch.setattr(waiting, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    tracker = track()
    assert wait_for_worker(process, tracker.run, timeout=PATIENCE) == []
    assert process.returncode == 0
    assert "measuring run" in capsys.readouterr().err


def test_snapshots_are_measured_given_the_first_one(track, train, finish):
    tracker = track(every=2, estimators=["raw", "given:initial|lin"])
    train(4)
    finish(tracker)
    frame = kc.load_runs(tracker.run)
    relative = frame[frame["estimator"] == "given:initial|lin"]
    assert relative["step"].tolist() == [0, 2, 4]
    assert relative["kind"].tolist() == ["code"] * 3
    # Of the first one only the structure is paid for.
    assert relative["bits"].is_monotonic_increasing
    assert relative["bits"].tolist()[0] < relative["bits"].tolist()[-1]
    first, *_, last = sorted((tracker.run / "snapshots").iterdir())
    assert kc.describe(str(last), "lin", given=str(first))[0].bits == relative["bits"].tolist()[-1]


def test_the_first_snapshot_must_be_kept_where_others_are_measured_given_it(track, tmp_path):
    with pytest.raises(SpecError, match="keep 'ends' or 'all'"):
        track(estimators="given:initial|lin", keep="none")
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_cannot_be_built_is_an_event_of_the_run(track):
    recipe = "seed:factory=absent_package:build,seed=0"
    tracker = track(estimators=["raw", f"given:{recipe}|lin"])
    tracker.close()
    measure_pending(tracker.run, given=[recipe])
    assert kc.load_runs(tracker.run)["estimator"].tolist() == ["raw"]
    assert "ModuleNotFoundError" in load_events(tracker.run)["message"].item()
