"""Killing a training at any instant: the store opens, and everything that was measured is there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from kcomplex.tracking.snapshot import open_snapshot
from kcomplex.tracking.store import SNAPSHOTS, RunStore
from kcomplex.tracking.tracker import attach
from kcomplex.tracking.worker import measure_pending

PATIENCE = 180.0
TENSORS = 4
ESTIMATORS = ("zstd", "raw")

# One process imports torch, and forks the trainings: each in a process group of its own, with its measuring process.
NURSERY = """
import os, sys, time
import torch
from torch import nn
from kcomplex.tracking import writer
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import attach

torch.set_num_threads(1)
writer.START_AFTER_SECONDS = 0.0

def train(folder):
    report = open(f"{folder}.report", "a", buffering=1)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = attach(model, optimizer, run=folder, every=10, estimators=sys.argv[1].split("+"))
    while True:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        tracker.log(loss=0.5)
        if tracker.steps % 5 == 0:
            with RunStore(folder, read_only=True) as store:
                [measured] = store.connection.execute(
                    "SELECT count(*) FROM snapshots WHERE state = 'measured'"
                ).fetchone()
            report.write(f"{measured}\\n")
        time.sleep(0.01)

for folder in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        train(folder)
    print(child, flush=True)
for _ in sys.argv[2:]:
    os.wait()
"""


@dataclass
class Training:
    """A training that runs in a process of its own."""

    run: Path
    process: int

    def reported(self) -> int:
        """How many measured snapshots the training has seen."""
        report = self.run.with_name(f"{self.run.name}.report")
        lines = report.read_text().split("\n")[:-1] if report.exists() else []
        return int(lines[-1]) if lines else 0


@pytest.fixture
def start(tmp_path):
    nurseries = []

    def begin(count):
        folders = [tmp_path / f"run{len(nurseries)}-{index}" for index in range(count)]
        nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY, "+".join(ESTIMATORS), *map(str, folders)], stdout=subprocess.PIPE, text=True
        )
        nurseries.append(nursery)
        return [Training(folder, int(nursery.stdout.readline())) for folder in folders]

    yield begin
    for nursery in nurseries:
        nursery.stdout.close()
        assert nursery.wait(PATIENCE) == 0


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check(training: Training) -> None:
    """Assert what holds at whatever instant the training was killed."""
    reported = training.reported()
    with RunStore(training.run) as store:
        rows = store.connection.execute
        assert rows("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert rows("PRAGMA foreign_key_check").fetchall() == []
        measured = [snapshot for (snapshot,) in rows("SELECT id FROM snapshots WHERE state = 'measured'")]
        assert len(measured) >= reported
        for snapshot in measured:
            found = rows(
                "SELECT id, estimator FROM descriptions WHERE snapshot = ? ORDER BY id", (snapshot,)
            ).fetchall()
            assert tuple(estimator for _, estimator in found) == ESTIMATORS
            for description, _ in found:
                count = "SELECT count(*) FROM tensors WHERE description = ?"
                assert rows(count, (description,)).fetchone() == (TENSORS,)
        assert rows("SELECT count(*) FROM snapshots WHERE state NOT IN ('pending', 'measured')").fetchone() == (0,)
        for _, file in store.pending():
            with open_snapshot(training.run / file) as weights:
                assert len(weights) == TENSORS


def check_going_on(training: Training) -> None:
    """Assert that the killed run can be measured, resumed and finished."""
    if RunStore.exists(training.run):
        measure_pending(training.run)
        check(training)
    model = nn.Linear(2, 2)
    with attach(model, run=training.run, every=None, estimators=ESTIMATORS, resume=True, measure=False) as tracker:
        tracker.capture()
    measure_pending(training.run)
    with RunStore(training.run) as store:
        files = store.connection.execute("SELECT file FROM snapshots WHERE file IS NOT NULL").fetchall()
    assert {training.run / file for (file,) in files} == set((training.run / SNAPSHOTS).iterdir())


def kill(training: Training, group: bool) -> None:
    if group:
        os.killpg(training.process, signal.SIGKILL)
    else:
        os.kill(training.process, signal.SIGKILL)


def pending(training: Training) -> int:
    with RunStore(training.run, read_only=True) as store:
        return len(store.pending())


def kill_and_check(trainings: list[Training], seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    for index, training in enumerate(trainings):
        until(lambda training=training: training.reported() > 0)
        time.sleep(generator.uniform(0, 0.2))
        group = index % 2 == 0
        kill(training, group)
        check(training)
        if not group:
            # The measuring process outlives the training, and does what is left.
            until(lambda training=training: pending(training) == 0)
        check_going_on(training)


def kill_early_and_check(trainings: list[Training], seed: int) -> None:
    """Kill trainings while they begin: before the run is created, or before anything is measured."""
    generator = random.Random(seed)
    for training in trainings:
        time.sleep(generator.uniform(0, 0.02))
        kill(training, group=True)
    for training in trainings:
        if RunStore.exists(training.run):
            check(training)
        check_going_on(training)


def test_killed_trainings_lose_nothing_that_was_measured(start):
    trainings = start(6)
    kill_early_and_check(trainings[3:], seed=0)
    kill_and_check(trainings[:3], seed=0)


@pytest.mark.slow
def test_twenty_killed_trainings_lose_nothing_that_was_measured(start):
    for round_ in range(5):
        trainings = start(8)
        kill_early_and_check(trainings[4:], seed=round_)
        kill_and_check(trainings[:4], seed=round_)
