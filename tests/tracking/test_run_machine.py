"""A run in any order of being tracked, killed, resumed and measured by several processes: nothing recorded is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import nn

from kcomplex.tracking import frames
from kcomplex.tracking.folder import DATABASE
from kcomplex.tracking.snapshot import open_snapshot
from kcomplex.tracking.store import RunStore
from kcomplex.tracking.tracker import attach
from kcomplex.tracking.worker import MOST_ATTEMPTS, measure_pending
from tests.children import Children, until

ESTIMATORS = ("zstd", "raw")
# Seconds after which a child is killed; None lets it end. It takes about a twentieth of one.
instants = st.one_of(st.none(), st.floats(0, 0.1))
keeps = st.sampled_from(("ends", "all", "none"))


class Run(RuleBasedStateMachine):
    """One run, in a folder beside which lies what is nobody's business."""

    kills = 0

    def __init__(self) -> None:
        super().__init__()
        self.children = Children()
        self.children.__enter__()
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "run"
        self.beside = Path(self.folder.name) / "beside.safetensors"
        self.beside.write_text("precious")
        self.report = Path(self.folder.name) / "report"
        self.report.touch()
        self.numbers: dict[tuple[int, str], float] = {}
        self.deaths = 0

    def teardown(self) -> None:
        self.children.__exit__(None, None, None)
        self.folder.cleanup()

    @rule(captures=st.integers(0, 4), keep=keeps, instant=instants)
    def track(self, captures: int, keep: str, instant: float | None) -> None:
        """Follow a training; it reports every snapshot that the store has."""

        def train() -> None:
            model = nn.Linear(4, 4)
            tracker = attach(
                model, run=self.path, every=None, estimators=ESTIMATORS, keep=keep, resume=True, measure=False
            )
            with self.report.open("a", buffering=1) as report:
                for number in range(captures):
                    with torch.no_grad():
                        model.weight += number
                    tracker.step()
                    tracker.log(loss=number)
                    tracker.capture()
                    while (newest := newest_of(self.path)) is None or newest[1] < tracker.steps:
                        time.sleep(0.001)
                    report.write(f"{newest[0]} {newest[1]}\n")
            tracker.close()

        self.run_killed([train], instant)

    @rule(processes=st.integers(1, 3), instant=instants)
    def measure(self, processes: int, instant: float | None) -> None:
        """Measure what waits in several processes, all of which are killed at one instant, or none."""
        if (self.path / DATABASE).exists():
            self.deaths += instant is not None
            self.run_killed([lambda: measure_pending(self.path)] * processes, instant)
            if instant is None:
                with RunStore(self.path, read_only=True) as store:
                    assert store.pending() == []

    @invariant()
    def what_was_recorded_stays(self) -> None:
        """Check the store, its files, its frames, and what lies beside it."""
        assert self.beside.read_text() == "precious"
        assert {path.name for path in Path(self.folder.name).iterdir()} <= {"run", "beside.safetensors", "report"}
        if not (self.path / DATABASE).exists():
            assert self.report.read_text() == ""
            return
        with RunStore(self.path, read_only=True) as store:
            store.check()
            rows = {row: (step, state, file) for row, step, state, file in store.connection.execute(
                "SELECT id, step, state, file FROM snapshots")}  # fmt: skip
            numbers = {(snapshot, estimator): value for snapshot, estimator, value in store.connection.execute(
                "SELECT snapshot, estimator, value FROM descriptions")}  # fmt: skip
        for line in self.report.read_text().splitlines():
            snapshot, step = map(int, line.split())
            assert rows[snapshot][0] == step
        for snapshot, (_, state, file) in rows.items():
            # Only what ended its process again and again isn't measured.
            assert state in ("pending", "measured") or self.deaths > MOST_ATTEMPTS
            if state == "pending":
                with open_snapshot(self.path / file) as weights:
                    assert len(weights) == 2
            if state == "measured":
                assert {estimator for one, estimator in numbers if one == snapshot} == set(ESTIMATORS)
        assert self.numbers.items() <= numbers.items()
        self.numbers = numbers
        assert len(frames.load_snapshots(self.path)) == len(rows)
        assert len(frames.load_runs(self.path)) == len(numbers)

    def run_killed(self, works: list[Callable[[], object]], instant: float | None) -> None:
        """Do works in processes of their own, reading frames beside them, and kill them at an instant."""
        processes = [self.fork(work) for work in works]
        end = time.monotonic() + (instant or 0)
        while instant is not None and time.monotonic() < end:
            if (self.path / DATABASE).exists():
                frames.load_runs(self.path)
        for process in processes:
            if instant is not None:
                os.kill(process, signal.SIGKILL)
                type(self).kills += 1
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            assert code == 0 or (instant is not None and code == -signal.SIGKILL)

    def fork(self, work: Callable[[], object]) -> int:
        """Return a process that does some work and ends with exit code 0."""
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                work()
                code = 0
            finally:
                os._exit(code)
        until(lambda: os.getpgid(process) == process)
        self.children.adopt(process)
        return process


def newest_of(run: Path) -> tuple[int, int] | None:
    with RunStore(run, read_only=True) as store:
        return store.newest()


def check(examples: int, steps: int) -> None:
    unhurried = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Run, settings=unhurried)


def test_a_run_loses_nothing_whatever_happens_to_it():
    check(examples=4, steps=8)


@pytest.mark.slow
def test_many_runs_lose_nothing_whatever_happens_to_them():
    check(examples=40, steps=15)
