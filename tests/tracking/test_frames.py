"""Frames: what comes out of one run, several runs, and runs that are being written."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest
import torch
from torch import nn

import kcomplex as kc
from kcomplex.errors import RunError
from kcomplex.tracking.columns import DESCRIPTION_COLUMNS, SNAPSHOT_COLUMNS
from kcomplex.tracking.frames import (
    load_configurations,
    load_events,
    load_runs,
    load_snapshots,
    load_tensors,
)
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import TrackingWarning, attach
from kcomplex.tracking.worker import measure_pending

LOADERS = [load_runs, load_tensors, load_events, load_snapshots, load_configurations]


def small_run(folder: Path, measure: bool = True, estimators=("zstd", "raw"), **metrics: float) -> None:
    tracker = attach(nn.Linear(2, 2), run=folder, every=None, estimators=estimators, measure=False)
    if metrics:
        tracker.log(metrics)
    tracker.close()
    if measure:
        measure_pending(folder)


def test_the_columns_of_a_run(tmp_path):
    small_run(tmp_path / "run", accuracy=0.5)
    frame = load_runs(tmp_path / "run")
    assert frame.columns.tolist() == [*SNAPSHOT_COLUMNS, *DESCRIPTION_COLUMNS, "accuracy"]
    assert tuple(kc.describe({"weight": torch.zeros(2)}, "raw")[0].to_dict()) == DESCRIPTION_COLUMNS
    assert frame["run"].tolist() == ["run", "run"]
    assert frame["estimator"].tolist() == ["zstd", "raw"]
    assert frame["lossless"].tolist() == [True, True]


def test_runs_are_found_at_any_depth_and_named_by_their_path(tmp_path):
    small_run(tmp_path / "b" / "seed1", loss=1.0)
    small_run(tmp_path / "b" / "seed0", accuracy=0.5)
    small_run(tmp_path / "a")
    frame = load_runs(tmp_path).query("estimator == 'zstd'")
    assert frame["run"].tolist() == ["a", "b/seed0", "b/seed1"]
    assert frame["accuracy"].fillna(-1).tolist() == [-1, 0.5, -1]
    assert frame["loss"].fillna(-1).tolist() == [-1, -1, 1.0]
    assert load_configurations(tmp_path)["run"].tolist() == ["a", "b/seed0", "b/seed1"]
    assert load_runs(tmp_path / "b" / "seed1")["run"].unique().tolist() == ["seed1"]


@pytest.mark.parametrize("load", LOADERS)
def test_no_run_says_what_to_do(load, tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunError, match="attach"):
            load(path)


@pytest.mark.parametrize("load", LOADERS)
def test_a_run_without_measurements_has_the_columns_of_one_with_them(load, tmp_path):
    small_run(tmp_path / "measured")
    small_run(tmp_path / "waiting", measure=False)
    whole, empty = load(tmp_path / "measured"), load(tmp_path / "waiting")
    assert empty.columns.tolist() == [name for name in whole.columns if not name.startswith("part_")]
    assert len(load(tmp_path)) == len(whole) + len(empty)


def test_a_run_is_read_while_it_is_written(tmp_path):
    tracker = attach(nn.Linear(2, 2), run=tmp_path / "run", every=None, estimators="zstd", measure=False)
    sizes = []
    for _ in range(3):
        tracker.capture()
        measure_pending(tmp_path / "run")
        sizes.append(len(load_runs(tmp_path)))
    tracker.close()
    measure_pending(tmp_path / "run")
    assert sizes == sorted(sizes)
    assert len(load_runs(tmp_path)) == 4


def test_a_run_is_running_only_while_somebody_follows_it(tmp_path, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(RunStore, "finish", full)
    tracker = attach(nn.Linear(2, 2), run=tmp_path / "run", every=None, estimators="zstd", measure=False)
    assert load_configurations(tmp_path)["status"].tolist() == ["running"]
    with pytest.warns(TrackingWarning, match="disk is full"):
        tracker.close()
    with RunStore(tmp_path / "run", read_only=True) as store:
        assert store.info().status == "running"
    assert load_configurations(tmp_path)["status"].tolist() == ["interrupted"]
    (tmp_path / "run" / "tracker.lock").unlink()
    assert load_configurations(tmp_path)["status"].tolist() == ["interrupted"]


def test_proxies_keep_their_unit(tmp_path):
    small_run(tmp_path / "run", estimators=["l2", "zstd"])
    frame = load_runs(tmp_path).set_index("estimator")
    expected = kc.describe(nn.Linear(2, 2), "l2")[0]
    assert frame.loc["l2", "unit"] == expected.unit
    assert math.isnan(frame.loc["l2", "bits_per_weight"])
    assert frame["lossless"].isna().tolist() == [True, False]
    assert math.isnan(load_tensors(tmp_path).query("estimator == 'l2'")["bits_per_weight"].iloc[0])
