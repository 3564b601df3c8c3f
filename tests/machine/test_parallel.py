"""Threads in order: how many, how far ahead, and how they are left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kcomplex as kc
from kcomplex.errors import SpecError
from kcomplex.machine.parallel import in_order, thread_count


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_order_stays_and_little_is_taken_ahead(jobs: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(40):
            taken.append(item)
            yield item

    for number, result in enumerate(in_order(lambda item: 2 * item, items(), jobs)):
        assert result == 2 * number
        assert len(taken) <= number + (1 if jobs == 1 else 2 * jobs)
    assert len(taken) == 40


@pytest.mark.parametrize("jobs", [1, 3])
def test_whoever_is_interrupted_does_not_wait_for_what_is_in_work(jobs: int) -> None:
    working, release = threading.Event(), threading.Event()
    begun, main = [], threading.get_ident()

    def work(item: int) -> None:
        begun.append(item)
        working.set()
        release.wait()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupter = threading.Thread(target=lambda: (working.wait(), signal.pthread_kill(main, signal.SIGINT)))
        interrupter.start()
        # The work ends only after the interruption has been seen here: were it waited for, that would take for ever.
        with pytest.raises(KeyboardInterrupt):
            list(in_order(work, range(100), jobs))
        interrupter.join()
    finally:
        release.set()
        signal.signal(signal.SIGINT, before)
    assert len(begun) <= jobs


def test_whoever_stops_early_does_not_wait_either() -> None:
    release = threading.Event()
    results = in_order(lambda item: item == 0 or release.wait(), range(100), 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    release.set()


@pytest.mark.parametrize("jobs", [0, -2, 2.5, True, "2", None, 1e9])
def test_jobs_are_the_same_everywhere(tmp_path: Path, jobs: Any) -> None:
    weights = {"w": torch.randn(20, 20)}
    packed, new = tmp_path / "w.kcz", tmp_path / "new"
    kc.encode(weights, packed, "raw")
    calls = (
        lambda: thread_count(jobs),
        lambda: in_order(len, [], jobs),
        lambda: kc.describe(weights, ["raw", "mix", "l2", "best"], jobs=jobs),
        lambda: kc.explain(weights, "mix", jobs=jobs),
        lambda: kc.encode(weights, new, "mix", jobs=jobs),
        lambda: kc.decode(packed, new, jobs=jobs),
        lambda: kc.verify(packed, jobs=jobs),
        lambda: kc.quantise(weights, new, bits=4, jobs=jobs),
    )
    for call in calls:
        with pytest.raises(SpecError, match="number of threads"):
            call()
    assert not new.exists()
