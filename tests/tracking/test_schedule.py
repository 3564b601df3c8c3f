"""Schedules: which steps they name, and what they refuse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcomplex.errors import SpecError
from kcomplex.tracking.schedule import Explicit, Geometric, Periodic, Schedule, parse_schedule

steps = st.integers(0, 10**9)
schedules = st.one_of(
    st.builds(Periodic, st.integers(1, 10**6)),
    st.builds(Geometric, st.floats(1.001, 10)),
    st.builds(lambda listed: Explicit(tuple(sorted(listed))), st.sets(st.integers(0, 1000))),
)


def walk(schedule: Schedule, until: int) -> list[int]:
    found = []
    step = schedule.next_after(0)
    while step is not None and step <= until:
        found.append(step)
        step = schedule.next_after(step)
    return found


@given(schedules, steps)
def test_the_next_step_is_later(schedule, step):
    following = schedule.next_after(step)
    assert following is None or following > step


@given(schedules, st.integers(0, 500), st.integers(0, 500))
def test_the_next_step_is_the_same_wherever_the_question_is_asked_before_it(schedule, start, ahead):
    following = schedule.next_after(start)
    if following is not None:
        assert schedule.next_after(min(start + ahead, following - 1)) == following


@given(st.integers(1, 50), st.integers(0, 300))
def test_periodic_names_every_multiple(period, until):
    assert walk(Periodic(period), until) == list(range(period, until + 1, period))


@given(st.floats(1.01, 10))
def test_geometric_names_every_rounded_power(base):
    powers = itertools.takewhile(lambda power: power <= 10**6, (math.floor(base**k) for k in itertools.count()))
    assert walk(Geometric(base), 10**6) == sorted(set(powers))


@given(st.sets(st.integers(1, 1000)))
def test_a_list_names_its_steps_in_order(listed):
    assert walk(parse_schedule(listed), 1000) == sorted(listed)


@pytest.mark.parametrize(
    ("every", "steps_per_epoch", "expected"),
    [
        ("1 epoch", 45, Periodic(45)),
        ("2 epochs", 45, Periodic(90)),
        ("100 steps", None, Periodic(100)),
        (" 1  step ", 45, Periodic(1)),
        (7, None, Periodic(7)),
        (np.int64(7), np.int64(45), Periodic(7)),
        ("geometric 1.3", None, Geometric(1.3)),
        ([5, 1, 5], None, Explicit((1, 5))),
        (np.array([5, 1]), None, Explicit((1, 5))),
        (None, None, Explicit()),
    ],
)
def test_what_every_may_be(every, steps_per_epoch, expected):
    assert parse_schedule(every, steps_per_epoch) == expected


def test_epochs_without_their_length_say_what_is_missing():
    with pytest.raises(SpecError, match="steps_per_epoch"):
        parse_schedule("1 epoch")


@pytest.mark.parametrize(
    "every",
    ["", "epoch", "often", "0 steps", "-1 steps", "1.5 epochs", "geometric", "geometric 1", "geometric x",
     "geometric inf", "geometric nan", 0, -3, True, 2.5, [1, 2.5], [-1], [True]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(every):
    with pytest.raises(SpecError):
        parse_schedule(every, steps_per_epoch=10)


@pytest.mark.parametrize("length", [0, -1, 2.5, True])
def test_an_epoch_has_at_least_one_whole_step(length):
    with pytest.raises(SpecError):
        parse_schedule("1 epoch", length)
