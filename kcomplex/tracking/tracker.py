"""The tracker: follows a training loop, takes snapshots of the weights, and has them measured beside it."""

from __future__ import annotations

import atexit
import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from filelock import FileLock
from torch import nn

from kcomplex.errors import RunError, SpecError
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import INITIAL, STAGE
from kcomplex.tracking.columns import checked_metrics, whole
from kcomplex.tracking.database import reading
from kcomplex.tracking.differences import differences
from kcomplex.tracking.folder import DATABASE, lock_run
from kcomplex.tracking.plan import Plan, check_given, estimator_specs, named_given
from kcomplex.tracking.schedule import Every, plain_every
from kcomplex.tracking.snapshot import CapturedWeights, Selection, capture_weights, copy_buffers
from kcomplex.tracking.store import Keep, RunStore, Status, as_json
from kcomplex.tracking.waiting import wait_for_worker
from kcomplex.tracking.writer import Moment, Writer
from kcomplex.weights import as_patterns

DEFAULT_ESTIMATORS = ("zstd", "palette|entropy")


class TrackingWarning(UserWarning):
    """Something of a run couldn't be captured or measured; the run's events say what."""


class Tracker:
    """Follows one training run; made by `attach`, and a context manager that closes itself.

    Attributes
    ----------
    run
        Folder of the run.
    steps
        Optimiser steps so far.
    """

    def __init__(self, model: nn.Module, run: Path, plan: Plan, steps: int, lock: FileLock) -> None:
        self.run = run
        self.steps = steps
        self._model = model
        self._plan = plan
        self._lock = lock
        self._schedule = plan.schedule()
        self._next = self._schedule.next_after(steps)
        self._due: Moment | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._logged_at: dict[str, int] = {}
        self._snapshot_bytes = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._closed = False
        self._process = os.getpid()
        with RunStore(run) as store:
            self._first_event = store.last_event()
            self._is_new = store.newest() is None
        self._writer = Writer(run, measure=plan.measure, given=plan.given)
        self._writer.start()
        atexit.register(self._leave)

    def __repr__(self) -> str:
        return f"<Tracker of {self.run}: step {self.steps}{', closed' if self._closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._close("interrupted", timeout=0.0)

    def step(self, count: int | None = None) -> None:
        """Tell the tracker that the model was changed, in a loop whose optimiser it doesn't follow.

        A snapshot that falls due is taken at once.

        Parameters
        ----------
        count
            Steps so far; None is one more than before.

        Raises
        ------
        RunError
            The tracker is closed, or the count goes backwards.
        """
        self._check_open()
        reached = self.steps + 1 if count is None else whole(count)
        if reached < self.steps:
            raise RunError(f"{self.run}: the steps go backwards, from {self.steps} to {reached}")
        self.steps = reached
        if self._next is not None and reached >= self._next:
            self._next = self._schedule.next_after(reached)
            self.capture()

    def capture(self) -> None:
        """Take a snapshot now, whatever the schedule says; one that is due already is this one.

        Raises
        ------
        RunError
            The tracker is closed.
        """
        self._check_open()
        self._due, self._buffers = self._now(), {}
        self._capture_due()

    def log(self, metrics: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Join metrics to the newest snapshot.

        Of the values that a metric has before the next snapshot, the one logged at the step nearest to its own
        snapshot counts; at the same step, the last one.

        Parameters
        ----------
        metrics, named
            Names and numbers; a tensor of one element is a number too.

        Raises
        ------
        RunError
            The tracker is closed, a name is a column of the runs' frame, or a value isn't a number.
        """
        self._check_open()
        checked = checked_metrics({**(metrics or {}), **named})
        self._capture_due()
        counts = {name: value for name, value in checked.items() if self._logged_at.get(name, self.steps) == self.steps}
        if counts:
            self._logged_at.update(dict.fromkeys(counts, self.steps))
            self._writer.put_metrics(self.steps, counts)

    def latest(self) -> dict[str, float]:
        """Return the numbers of the newest measured snapshot, flat, for any logger; empty before the first.

        They are ``kcomplex/<estimator>/bits_per_weight`` for lengths, ``kcomplex/<estimator>/<unit>`` for proxies that
        are none, and ``kcomplex/step``: the step of that snapshot, which is usually past.
        """
        with RunStore(self.run, read_only=True) as store:
            return store.latest()

    def close(self, timeout: float | None = None) -> None:
        """End the run: take what is due, write everything, and wait until every snapshot is measured.

        Parameters
        ----------
        timeout
            Seconds to wait for the measuring; None waits for its end. What isn't measured by then goes on alone.

        Warns
        -----
        TrackingWarning
            Something couldn't be captured or measured.
        """
        self._close("finished", timeout)

    def _begin(self, optimizer: torch.optim.Optimizer | None, captured: CapturedWeights) -> None:
        """Record the weights before the first step, where the run hasn't them yet, and follow the optimiser."""
        if self._is_new:
            self._put(self._now(), captured)
        if optimizer is None:
            return
        before = optimizer.register_step_pre_hook(self._before_step)
        self._hooks = [before, optimizer.register_step_post_hook(self._after_step)]

    def _before_step(self, *_: Any) -> None:
        if self._due is not None:
            self._capture_due()

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == self._next:
            self._mark_due()

    def _mark_due(self) -> None:
        """Note that the state after this step is to be captured, once nothing more is done to it.

        Training modes project the weights after a step or an epoch, so that they are read later; a forward pass
        changes buffers before the next step begins, so that they are copied now.
        """
        self._next = self._schedule.next_after(self.steps)
        moment = self._now()
        try:
            self._buffers = copy_buffers(self._model)
            self._due = moment
        except Exception as error:
            self._writer.put_missed(moment, "failed", f"the buffers couldn't be copied: {error!r}")

    def _capture_due(self) -> None:
        if self._due is None:
            return
        moment, buffers = self._due, self._buffers
        self._due, self._buffers, self._logged_at = None, {}, {}
        try:
            limit = self._plan.max_pending_bytes
            if self._writer.is_behind(self._snapshot_bytes, limit):
                message = f"not taken, because the measuring is behind by max_pending_bytes={limit}"
                self._writer.put_missed(moment, "skipped", message)
            else:
                self._put(moment, capture_weights(self._model, self._plan.selection, buffers))
        except Exception as error:
            self._writer.put_missed(moment, "failed", f"the weights couldn't be captured: {error!r}")

    def _put(self, moment: Moment, captured: CapturedWeights) -> None:
        self._snapshot_bytes = captured.nbytes
        self._writer.put_snapshot(moment, captured)

    def _now(self) -> Moment:
        return Moment(self.steps, self._plan.epoch(self.steps), time.time())

    def _check_open(self) -> None:
        if self._closed:
            raise RunError(f"{self.run}: the tracker is closed; attach again with resume=True")

    def _leave(self) -> None:
        """Keep what was captured when the program ends without `close`; forked children have nothing to keep."""
        if os.getpid() == self._process:
            self._close("interrupted", timeout=0.0)

    def _close(self, status: Status, timeout: float | None) -> None:
        if self._closed:
            return
        for hook in self._hooks:
            hook.remove()
        # Whoever is interrupted here may close again.
        self._capture_due()
        self._writer.finish(status)
        self._closed = True
        atexit.unregister(self._leave)
        self._lock.release()
        failures = wait_for_worker(self._writer.process, self.run, timeout) + self._writer.failures
        try:
            with RunStore(self.run, read_only=True) as store:
                failures = store.failures(self._first_event) + failures
        except Exception as error:
            failures.append(repr(error))
        if failures:
            more = f" (and {len(failures) - 1} more: see load_events)" if len(failures) > 1 else ""
            warnings.warn(f"{self.run}: {failures[0]}{more}", TrackingWarning, stacklevel=3)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    run: str | PathLike[str],
    every: Every = "1 epoch",
    steps_per_epoch: int | None = None,
    estimators: str | Estimator | Iterable[str | Estimator] | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    trainable: bool | None = None,
    keep: Keep = "ends",
    max_pending_bytes: int = 2 << 30,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    step: int | None = None,
    measure: bool = True,
) -> Tracker:
    """Return a tracker that follows an optimiser; the training loop needs no change.

    The state before the first step is captured at once. What is captured is what the network computes with, never a
    parametrisation's latent original. Nothing that goes wrong afterwards stops the training: it becomes an event of
    the run, and a warning when the tracker is closed.

    Parameters
    ----------
    model
        Whose weights to follow.
    optimizer
        Whose steps count; None for a loop that calls `Tracker.step` or `Tracker.capture` itself.
    run
        Folder of the run, on a disk of this machine.
    every, steps_per_epoch
        Schedule of the snapshots; see `parse_schedule`.
    estimators
        What to measure every snapshot with, as in `describe`; None is ``DEFAULT_ESTIMATORS``, or what a resumed run
        has, unless that opens a checkpoint or calls a recipe: then they are to be given again. Only specifications
        reach the measuring process. ``given:initial|lin`` measures every snapshot given the first one,
        ``given:seed:factory=package.module:function,seed=0|lin`` given the initialisation of a recipe.
    include, exclude, trainable
        Selection of tensors; see `Weights.select`.
    keep
        Which snapshots' files stay once they are measured: the first and the last (``ends``), ``all`` or ``none``.
    max_pending_bytes
        A snapshot isn't taken while more bytes than this would wait for being measured.
    config
        The run's configuration, kept with it; anything that JSON can hold.
    resume
        Continue a run that exists, and begin one that doesn't.
    step
        Step to continue at, where it isn't the newest snapshot's; snapshots of later steps no longer count.
    measure
        False leaves the measuring to `measure_pending`, later or elsewhere.

    Raises
    ------
    SpecError, UnknownNameError, PluginError
        A schedule, an estimator or an option makes no sense, or an estimator can't be loaded.
    WeightsError
        The selection is empty or can't be made.
    RunError
        The run exists (and isn't to be resumed), is damaged, was made with other estimators or another configuration,
        or its folder can't be written.

    Examples
    --------
    >>> import tempfile
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> folder = tempfile.TemporaryDirectory()
    >>> with attach(model, optimizer, run=f"{folder.name}/run", every=2, estimators="zstd", measure=False) as tracker:
    ...     for _ in range(4):
    ...         optimizer.step()
    ...     tracker.log(accuracy=0.5)
    """
    if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
        raise SpecError(f"a {type(optimizer).__name__} isn't a torch optimiser whose steps could be followed")
    selection = Selection(as_patterns(include), as_patterns(exclude), trainable)
    specs = None if estimators is None else estimator_specs(estimators)
    plan = Plan(
        plain_every(every), steps_per_epoch, selection, keep, max_pending_bytes, measure, named_given(specs or ())
    )
    if keep == "none" and any(spec.startswith(f"{STAGE}{INITIAL}|") for spec in specs or ()):
        raise SpecError(f"{STAGE}{INITIAL} needs the first snapshot: keep 'ends' or 'all', not 'none'")
    captured = capture_weights(model, selection)
    # The run stays where it is when the program changes its working directory.
    folder = Path(run).resolve()
    # Before the folder is made, so that a mistake leaves nothing behind.
    as_json(dict(config or {}), folder)
    lock = lock_run(folder)
    try:
        if resume and (folder / DATABASE).exists():
            at = _resume(folder, specs, config, plan, step)
        else:
            at = 0 if step is None else whole(step)
            specs = estimator_specs(DEFAULT_ESTIMATORS) if specs is None else specs
            RunStore.create(folder, specs, plan.to_dict(), config or {}, torch.initial_seed()).close()
        tracker = Tracker(model, folder, plan, at, lock)
        tracker._begin(optimizer, captured)
    except BaseException:
        lock.release()
        raise
    return tracker


def _resume(
    run: Path, specs: tuple[str, ...] | None, config: Mapping[str, Any] | None, plan: Plan, step: int | None
) -> int:
    """Return the step at which a run goes on, after preparing its store for that."""
    with RunStore(run) as store, reading(store.path):
        store.check()
        info = store.info()
        if specs is not None and specs != info.estimators:
            raise RunError(f"{run}: the run is measured with {', '.join(info.estimators)}; leave out the estimators")
        if plan.measure:
            check_given(info.estimators, plan.given, run)
        # Compared as the store has it: JSON makes lists of tuples.
        here = None if config is None else json.loads(json.dumps(dict(config)))
        if here is not None and here != info.config:
            told = differences(info.config, here)
            raise RunError(f"{run}: the run has another configuration ({told}); start a run of another name")
        newest = store.newest()
        at = whole(step) if step is not None else 0 if newest is None else newest[1]
        store.resume(at, plan.to_dict(), torch.initial_seed())
    return at
