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

from kcomplex.tracking.folder import DATABASE, SNAPSHOTS
from kcomplex.tracking.snapshot import open_snapshot
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import attach
from kcomplex.tracking.worker import measure_pending
from tests.children import is_gone, kill_group, until

TENSORS = 4
ESTIMATORS = ("zstd", "raw")

# One process imports torch, and forks the trainings: each in a process group of its own, with its measuring process.
# Their standard input is a pipe that ends with the test, and they with it.
NURSERY = """
import ctypes, os, select, sys
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
    waiting = 0
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
                waiting = len(store.pending())
            report.write(f"{measured}\\n")
        # A measuring process that hardly gets to run isn't left ever more to do.
        if select.select([0], [], [], 0.01 * (1 + waiting))[0]:
            os._exit(0)

if sys.platform == "linux":
    # Measuring processes that outlive their trainings are waited for here: whoever looks for them finds no zombies.
    PR_SET_CHILD_SUBREAPER = 36
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
for folder in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        train(folder)
    # Here too: the group is there before anybody can hear of it.
    os.setpgid(child, child)
    print(child, flush=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


@dataclass
class Training:
    """A training that runs in a process of its own, which leads a group with its measuring process."""

    run: Path
    process: int

    def reported(self) -> int:
        """How many measured snapshots the training has seen."""
        report = self.run.with_name(f"{self.run.name}.report")
        lines = report.read_text().split("\n")[:-1] if report.exists() else []
        return int(lines[-1]) if lines else 0


@pytest.fixture
def start(tmp_path, children):
    def begin(name, count):
        folders = [tmp_path / f"{name}-{index}" for index in range(count)]
        command = [sys.executable, "-c", NURSERY, "+".join(ESTIMATORS), *folders]
        nursery = children.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        trainings = []
        for folder in folders:
            trainings.append(Training(folder, int(nursery.stdout.readline())))
            children.adopt(trainings[-1].process)
        return trainings

    return begin


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
    if (training.run / DATABASE).exists():
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
    """Kill a training, with its measuring process or alone, and return when all that were killed are gone."""
    if group:
        kill_group(training.process)
    else:
        os.kill(training.process, signal.SIGKILL)
        # The measuring process outlives the training, and does what is left.
        until(lambda: pending(training) == 0)
    # What is killed ends when it next gets to run, and holds its locks until then.
    until(lambda: is_gone(training.process))


def pending(training: Training) -> int:
    with RunStore(training.run, read_only=True) as store:
        return len(store.pending())


def kill_and_check(trainings: list[Training], seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    for index, training in enumerate(trainings):
        until(lambda training=training: training.reported() > 0 or is_gone(training.process))
        assert not is_gone(training.process)
        time.sleep(generator.uniform(0, 0.2))
        kill(training, group=index % 2 == 0)
        check(training)
        check_going_on(training)


def kill_early_and_check(trainings: list[Training], seed: int) -> None:
    """Kill trainings while they begin: before the run is created, or before anything is measured."""
    generator = random.Random(seed)
    for training in trainings:
        time.sleep(generator.uniform(0, 0.02))
        kill(training, group=True)
    for training in trainings:
        if (training.run / DATABASE).exists():
            check(training)
        check_going_on(training)


def test_killed_trainings_lose_nothing_that_was_measured(start):
    trainings = start("run", 6)
    kill_early_and_check(trainings[3:], seed=0)
    kill_and_check(trainings[:3], seed=0)


@pytest.mark.slow
def test_twenty_killed_trainings_lose_nothing_that_was_measured(start):
    for round_ in range(5):
        trainings = start(f"run{round_}", 8)
        kill_early_and_check(trainings[4:], seed=round_)
        kill_and_check(trainings[:4], seed=round_)
