"""The tracker: what it captures, when, and that it never changes or stops a training."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import kcomplex as kc
from kcomplex.errors import RunError, SpecError, UnknownNameError, WeightsError
from kcomplex.tracking.frames import load_configurations, load_events, load_snapshots, load_tensors
from kcomplex.tracking.snapshot import open_snapshot
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import TrackingWarning, attach
from kcomplex.tracking.worker import measure_pending
from tests.children import PATIENCE


def snapshots(tracker):
    """Step and weights of every snapshot whose file is there."""
    with RunStore(tracker.run, read_only=True) as store:
        rows = store.connection.execute(
            "SELECT step, file FROM snapshots WHERE file IS NOT NULL ORDER BY id"
        ).fetchall()
    found = []
    for step, file in rows:
        with open_snapshot(tracker.run / file) as weights:
            found.append((step, {name: handle.read().clone() for name, handle in weights.items()}))
    return found


def test_a_loop_without_changes_gives_a_snapshot_each_period(track, train):
    tracker = track(every="2 epochs", steps_per_epoch=3)
    train(13)
    tracker.close()
    frame = load_snapshots(tracker.run)
    assert frame["step"].tolist() == [0, 6, 12]
    assert frame["epoch"].tolist() == [0, 2, 4]
    assert frame["wall_time"].is_monotonic_increasing


def test_a_snapshot_is_the_model_as_the_step_left_it(track, train, model):
    states = [copy.deepcopy(model.state_dict())]
    tracker = track(every=1)
    for _ in range(3):
        train(1)
        states.append(copy.deepcopy(model.state_dict()))
    tracker.close()
    found = snapshots(tracker)
    assert [step for step, _ in found] == [0, 1, 2, 3]
    for (_, tensors), state in zip(found, states, strict=True):
        # Buffers too, although the next forward pass changes them before the snapshot is taken.
        assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("then", ["log", "capture", "close", "step"])
def test_what_is_done_to_the_weights_after_a_step_is_in_its_snapshot(track, train, model, then):
    tracker = track(every=2)
    train(2)
    with torch.no_grad():
        model[0].weight.fill_(0.25)
    if then == "log":
        tracker.log(loss=1.0)
    elif then == "capture":
        tracker.capture()
    elif then == "step":
        train(1)
    tracker.close()
    (_, first), (step, second) = snapshots(tracker)
    assert step == 2
    assert torch.equal(second["0.weight"], torch.full_like(second["0.weight"], 0.25))
    assert not torch.equal(first["0.weight"], second["0.weight"])


@pytest.mark.parametrize("estimators", ["zstd", ["raw", "zstd:level=19", "planes|zstd"]])
def test_recorded_bits_are_those_of_describe(track, train, model, finish, estimators):
    model[3].tied = model[0].weight
    parametrize.register_parametrization(model[3], "weight", nn.Tanh())
    tracker = track(every=2, estimators=estimators, exclude=["1.bias"])
    train(2)
    expected = kc.describe(model, estimators, exclude=["1.bias"])
    finish(tracker)
    frame = kc.load_runs(tracker.run).query("step == 2")
    for name, column in expected.to_frame().drop(columns="seconds").items():
        assert frame[name].tolist() == column.tolist(), name
    tensors = load_tensors(tracker.run).query("step == 2 and skipped == ''")
    for name, column in expected.to_frame(per_tensor=True).drop(columns=["mse", "exact"]).items():
        pd.testing.assert_series_equal(tensors[name], column, check_dtype=False, check_index=False)


def test_metrics_join_the_newest_snapshot(track, train, finish):
    tracker = track(every=2)
    tracker.log(accuracy=0.1)
    train(2)
    tracker.log({"val/loss": torch.tensor(0.5)}, accuracy=0.2)
    train(1)
    tracker.log(late=3)
    finish(tracker)
    frame = kc.load_runs(tracker.run).query("estimator == 'zstd'")
    assert frame["accuracy"].tolist() == [0.1, 0.2]
    assert frame["val/loss"].iloc[1] == 0.5
    assert frame["late"].iloc[1] == 3


def test_the_value_logged_nearest_to_the_snapshot_counts(track, train):
    tracker = track(every=3)
    for loss in (6.0, 5.0, 4.0, 3.0, 2.0):
        train(1)
        tracker.log(loss=loss + 10)
        tracker.log(loss=loss)
    tracker.close()
    # Steps 1 and 2 belong to the snapshot before the first step; 3, 4 and 5 to the one of step 3.
    assert load_snapshots(tracker.run)["loss"].tolist() == [6.0, 4.0]


def test_metrics_may_be_infinite_or_nan(track):
    tracker = track()
    tracker.log(loss=math.inf, other=math.nan)
    tracker.close()
    frame = load_snapshots(tracker.run)
    assert frame["loss"].tolist() == [math.inf]
    assert math.isnan(frame["other"].iloc[0])


@pytest.mark.parametrize(
    "metrics",
    [{"bits": 1.0}, {"step": 1}, {"state": 1}, {"accuracy": "high"}, {"accuracy": "1.5"}, {"accuracy": None},
     {"accuracy": torch.zeros(2)}, {"accuracy": [1.0]}, {"": 1.0}, {3: 1.0}, {"accuracy": 1j}],
)  # fmt: skip
def test_metrics_that_make_no_sense_are_refused(track, metrics):
    with pytest.raises(RunError):
        track().log(metrics)


def test_tracking_changes_nothing_in_a_training(tmp_path):
    def trained(run):
        torch.manual_seed(1)
        model = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
        optimizer = torch.optim.Adam(model.parameters())
        tracker = (
            attach(model, optimizer, run=tmp_path / "run", every=1, estimators="zstd", measure=False) if run else None
        )
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
        if tracker is not None:
            tracker.close()
        return model.state_dict()

    plain, tracked = trained(False), trained(True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in tracked.items())


def test_model_and_optimiser_can_be_copied_and_pickled_while_tracked(track, train, model, optimizer):
    track(every=1)
    train(1)
    copy.deepcopy((model, optimizer))
    pickle.loads(pickle.dumps((model, optimizer)))


def test_without_an_optimiser_the_loop_counts(track, model):
    tracker = track(optimizer=None, every=[2, 5])
    tracker.step()
    with torch.no_grad():
        model[0].weight.zero_()
    tracker.step()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    tracker.step(7)
    tracker.close()
    found = snapshots(tracker)
    assert [step for step, _ in found] == [0, 2, 7]
    assert found[1][1]["0.weight"].eq(0).all()
    assert found[2][1]["0.weight"].eq(1).all()


def test_steps_dont_go_backwards(track):
    tracker = track(optimizer=None)
    tracker.step(3)
    with pytest.raises(RunError, match="backwards"):
        tracker.step(2)


def test_asking_for_a_snapshot_that_is_due_takes_one(track, train):
    tracker = track(every=2)
    train(2)
    tracker.capture()
    train(1)
    tracker.capture()
    tracker.close()
    assert load_snapshots(tracker.run)["step"].tolist() == [0, 2, 3]


def test_an_existing_run_is_refused_with_the_way_out(track, train):
    track().close()
    with pytest.raises(RunError, match="resume=True"):
        track()


def test_a_closed_tracker_says_so_and_follows_no_more(track, train):
    tracker = track(every=1)
    tracker.close()
    tracker.close()
    train(2)
    assert tracker.steps == 0
    for call in (tracker.log, tracker.capture, tracker.step):
        with pytest.raises(RunError, match="closed"):
            call()


def test_a_resumed_run_goes_on_from_its_newest_snapshot(track, train, finish):
    config = {"lr": 0.1, "layers": (4, 8)}
    tracker = track(every=2, config=config)
    train(5)
    tracker.close()
    tracker = track(every=2, resume=True, config=config, estimators=None)
    assert tracker.steps == 4
    tracker.log(accuracy=0.5)
    train(2)
    finish(tracker)
    frame = kc.load_runs(tracker.run).query("estimator == 'raw'")
    assert frame["step"].tolist() == [0, 2, 4, 6]
    assert frame["accuracy"].iloc[2] == 0.5
    assert load_events(tracker.run)["kind"].tolist() == ["resumed"]


def test_a_run_resumed_at_an_earlier_step_replaces_what_came_after(track, train, finish):
    tracker = track(every=2)
    train(6)
    tracker.log(accuracy=0.1)
    tracker.close()
    tracker = track(every=2, resume=True, step=3)
    train(2)
    finish(tracker)
    frame = load_snapshots(tracker.run)
    assert frame["step"].tolist() == [0, 2, 4]
    assert "accuracy" not in frame
    assert kc.load_runs(tracker.run)["step"].max() == 4


def test_resuming_a_run_that_isnt_there_begins_it(track, train):
    tracker = track(every=1, resume=True)
    train(1)
    tracker.close()
    assert load_snapshots(tracker.run)["step"].tolist() == [0, 1]


def test_resuming_with_something_else_is_refused(track):
    track(config={"lr": 0.1}).close()
    with pytest.raises(RunError, match="measured with zstd, raw"):
        track(resume=True, estimators="zstd")
    with pytest.raises(
        RunError, match=r"another configuration \(lr is 0\.1 there and 0\.2 here; seed is not set there and 1 here"
    ):
        track(resume=True, config={"lr": 0.2, "seed": 1})


def test_resuming_clears_what_a_kill_left(track, train, finish):
    tracker = track(every=1, keep="all")
    train(2)
    finish(tracker)
    folder = tracker.run / "snapshots"
    (folder / ".0000000003-abc.1.partial.safetensors").write_bytes(b"half")
    (folder / "0000000003-def.safetensors").write_bytes(b"a file that was never recorded")
    track(resume=True, keep="all").close()
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(("keep", "left"), [("ends", [0, 3]), ("all", [0, 1, 2, 3]), ("none", [])])
def test_which_files_are_kept(track, train, finish, keep, left):
    tracker = track(every=1, keep=keep)
    train(3)
    finish(tracker)
    assert [step for step, _ in snapshots(tracker)] == left
    assert len(list((tracker.run / "snapshots").iterdir())) == len(left)


def test_mistakes_show_at_once_and_leave_nothing(track, tmp_path):
    for error, options in [
        (SpecError, {"every": "sometimes"}),
        (SpecError, {"every": "1 epoch"}),
        (SpecError, {"estimators": "zstd:level=99"}),
        (SpecError, {"estimators": []}),
        (SpecError, {"keep": "some"}),
        (SpecError, {"max_pending_bytes": -1}),
        (SpecError, {"optimizer": "adam"}),
        (UnknownNameError, {"estimators": "zztd"}),
        (WeightsError, {"include": ["nothing*"]}),
        (RunError, {"config": {"model": object()}}),
    ]:
        with pytest.raises(error):
            track(**options)
    assert not (tmp_path / "run").exists()


def test_a_failure_in_capturing_is_an_event_and_keeps_the_metrics(track, train, model):
    tracker = track(every=1, include=["0.weight"])
    model[0] = nn.Identity()
    model.append(nn.Linear(2, 2))
    tracker.step()
    tracker.log(accuracy=0.5)
    with pytest.warns(TrackingWarning, match="'0.weight'"):
        tracker.close()
    events = load_events(tracker.run)
    assert events[["kind", "step"]].to_numpy().tolist() == [["failed", 1]]
    frame = load_snapshots(tracker.run)
    assert frame["state"].tolist() == ["pending", "skipped"]
    assert frame["accuracy"].iloc[1] == 0.5


def test_weights_that_arent_numbers_fail_only_the_estimator_that_needs_numbers(track, train, model, finish):
    tracker = track(every=1, estimators=["uniform:bits=4|zstd", "zstd"])
    train(1)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(TrackingWarning, match=r"step 1: NaN or infinity in '0.weight'"):
        finish(tracker)
    frame = kc.load_runs(tracker.run).query("step == 1")
    assert frame["estimator"].tolist() == ["zstd"]
    assert load_snapshots(tracker.run)["state"].tolist() == ["measured", "failed"]
    events = load_events(tracker.run)
    assert events["kind"].tolist() == ["diverged", "failed"]
    assert events["message"].str.contains("NaN").all()


def test_a_snapshot_file_that_is_gone_is_an_event(track, finish):
    tracker = track()
    tracker.capture()
    tracker.close()
    with RunStore(tracker.run) as store:
        (tracker.run / store.pending()[0][1]).unlink()
    assert measure_pending(tracker.run) == 2
    assert load_snapshots(tracker.run)["state"].tolist() == ["failed", "measured"]
    assert load_events(tracker.run)["kind"].tolist() == ["failed"]


def test_a_folder_that_is_deleted_stops_nothing(track, train):
    tracker = track(every=1)
    train(1)
    # A file that is written meanwhile would keep the folder.
    idle = threading.Event()
    tracker._writer._put(lambda store: idle.set())
    assert idle.wait(PATIENCE)
    shutil.rmtree(tracker.run)
    train(3)
    tracker.log(accuracy=1.0)
    with pytest.warns(TrackingWarning):
        tracker.close()


def test_snapshots_are_skipped_while_too_much_waits(track, train, model, finish):
    size = kc.open_weights(model).nbytes
    tracker = track(every=1, max_pending_bytes=2 * size)
    train(4)
    tracker.log(accuracy=0.5)
    with pytest.warns(TrackingWarning, match="behind"):
        tracker.close()
    frame = load_snapshots(tracker.run)
    assert frame["state"].tolist() == ["pending", "pending", "skipped", "skipped", "skipped"]
    assert frame["accuracy"].iloc[-1] == 0.5
    assert load_events(tracker.run)["kind"].tolist() == ["skipped"] * 3
    assert measure_pending(tracker.run) == 2


def test_measuring_makes_room_for_further_snapshots(track, train, model):
    size = kc.open_weights(model).nbytes
    tracker = track(every=1, max_pending_bytes=size)
    for step in range(3):
        while not tracker.latest() or tracker.latest()["kcomplex/step"] < step:
            measure_pending(tracker.run)
        train(1)
        tracker.log(accuracy=0.5)
    tracker.close()
    assert "skipped" not in load_snapshots(tracker.run)["state"].tolist()


def test_the_latest_numbers_are_flat(track, train, model, finish):
    tracker = track(every=1)
    assert tracker.latest() == {}
    train(2)
    finish(tracker)
    expected = kc.describe(model, ["zstd", "raw"])
    assert tracker.latest() == {
        "kcomplex/step": 2.0,
        "kcomplex/zstd/bits_per_weight": expected[0].bits_per_weight,
        "kcomplex/raw/bits_per_weight": expected[1].bits_per_weight,
    }


def test_an_error_in_the_loop_passes_through_and_is_told(track, train):
    tracker = track(every=1)

    def interrupted_training():
        with tracker:
            train(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted_training()
    assert load_configurations(tracker.run)["status"].tolist() == ["interrupted"]
    assert load_snapshots(tracker.run)["step"].tolist() == [0, 1, 2]


def test_a_run_remembers_how_it_was_made(track):
    torch.manual_seed(2**64 - 1)
    tracker = track(config={"lr": 0.1, "layers": [4, 8]}, every=np.array([9, 3]))
    row = load_configurations(tracker.run).iloc[0]
    assert (row["run"], row["status"], row["seed"], row["version"]) == ("run", "running", 2**64 - 1, kc.__version__)
    assert row["config"] == {"lr": 0.1, "layers": [4, 8]}
    assert row["estimators"] == ["zstd", "raw"]
    assert row["settings"]["every"] == [3, 9]
    tracker.close()
    assert load_configurations(tracker.run)["status"].tolist() == ["finished"]


def test_steps_may_be_numbers_of_numpy(tmp_path):
    tracker = attach(
        torch.nn.Linear(3, 2), run=tmp_path / "run", every=1, estimators="zstd", measure=False, step=np.int64(2)
    )
    tracker.step(np.int64(5))
    with pytest.raises(RunError, match="whole numbers"):
        tracker.step(5.5)
    tracker.close()
    assert load_snapshots(tmp_path / "run")["step"].tolist()[-1] == 5


def test_whoever_is_interrupted_closing_a_tracker_may_close_again(tmp_path, monkeypatch):
    tracker = attach(torch.nn.Linear(3, 2), run=tmp_path / "run", every=1, estimators="zstd", measure=False)
    with monkeypatch.context() as patch:
        patch.setattr(tracker._writer, "finish", lambda status: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tracker.close()
    tracker.close()
    attach(torch.nn.Linear(3, 2), run=tmp_path / "run", estimators="zstd", resume=True, every=1, measure=False).close()
