"""What users do by mistake, and what machines do: clear refusals, and nothing lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kcomplex.compressors.general.raw import Raw
from kcomplex.errors import RunError, UnknownNameError
from kcomplex.tracking.frames import load_events, load_runs, load_tensors
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import TrackingWarning
from kcomplex.tracking.worker import MOST_ATTEMPTS, measure_pending


def test_a_string_is_one_pattern(track, train):
    tracker = track(exclude="0.weight", every=1)
    train(1)
    tracker.close()
    measure_pending(tracker.run)
    tensors = load_tensors(tracker.run)
    assert set(tensors.loc[tensors["skipped"] == "excluded", "tensor"]) == {"0.weight"}


def test_a_live_loss_can_be_logged(track, model):
    tracker = track()
    tracker.log(loss=model(torch.randn(6, 4)).square().mean())
    tracker.close()
    measure_pending(tracker.run)
    assert load_runs(tracker.run)["loss"].notna().all()


def test_a_metric_cannot_take_a_column_of_the_store(track):
    tracker = track()
    with pytest.raises(RunError, match="'description'"):
        tracker.log(description=1.0)


def test_a_metrics_name_is_text(track):
    with pytest.raises(RunError, match="isn't Unicode text"):
        track().log({"loss\udcff": 1.0})


def test_weights_that_diverged_are_told_once(track, train, model):
    tracker = track(every=1)
    train(1)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
        model[3].bias[0] = torch.inf
    train(2)
    with pytest.warns(TrackingWarning, match=r"step 1: NaN or infinity in '0.weight' and \d more tensors$"):
        tracker.close()
    assert load_events(tracker.run)["kind"].tolist() == ["diverged"]


def test_changing_the_working_directory_loses_nothing(track, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    tracker = track(run="relative/run", every=1)
    train(1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(2)
    tracker.close()
    assert measure_pending(tmp_path / "relative" / "run") == 4


def test_a_run_has_one_tracker_at_a_time(track):
    first = track()
    with pytest.raises(RunError, match=r"another tracker follows this run; close\(\) it first"):
        track(resume=True)
    first.close()
    track(resume=True).close()


def test_an_estimator_that_the_measuring_process_cannot_find_is_refused_at_once(track, tmp_path):
    @dataclass(frozen=True)
    class Mine(Raw):
        name: ClassVar[str] = "defined_in_this_test"

    with pytest.raises(UnknownNameError, match="defined_in_this_test"):
        track(estimators=[Mine(), "zstd"])
    assert not (tmp_path / "run").exists()


def test_tensors_of_a_run_that_was_resumed_at_an_earlier_step(track, train):
    tracker = track(every=2)
    train(6)
    tracker.close()
    measure_pending(tracker.run)
    tracker = track(every=2, resume=True, step=2)
    train(2)
    tracker.close()
    measure_pending(tracker.run)
    assert sorted(set(load_tensors(tracker.run)["step"])) == sorted(set(load_runs(tracker.run)["step"])) == [0, 2, 4]


def test_the_metric_logged_at_a_snapshots_own_step_stays_after_a_resume(track, train):
    tracker = track(every=4)
    train(4)
    tracker.log(loss=4.0)
    tracker.close()
    tracker = track(every=4, resume=True)
    train(2)
    tracker.log(loss=99.0)
    tracker.close()
    measure_pending(tracker.run)
    frame = load_runs(tracker.run)
    assert set(frame.loc[frame["step"] == 4, "loss"]) == {4.0}


def test_a_snapshot_that_ends_its_process_does_not_block_the_others(track, train):
    tracker = track(every=1)
    train(2)
    tracker.close()
    with RunStore(tracker.run) as store:
        first = store.pending()[0][0]
        for _ in range(MOST_ATTEMPTS):
            store.begin_measuring(first)
    assert measure_pending(tracker.run) == 2
    assert set(load_runs(tracker.run)["step"]) == {1, 2}
    assert f"ended the process {MOST_ATTEMPTS} times" in load_events(tracker.run)["message"].iloc[-1]
