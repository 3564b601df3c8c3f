import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcomplex.errors import SpecError
from kcomplex.training.protocol.schedule import Course, Phase, Schedule, saturated


def test_a_falling_sequence_is_not_saturated_a_flat_or_rising_one_is():
    steps = np.arange(30.0)
    assert not saturated(10 - 0.1 * steps)
    assert saturated(np.full(30, 0.7))
    assert saturated(1 + 0.1 * steps)


def test_noise_hides_a_slow_fall_but_not_a_fast_one():
    noise = np.random.default_rng(0).normal(0, 0.1, 30)
    assert saturated(1 - 0.001 * np.arange(30) + noise)
    assert not saturated(1 - 0.05 * np.arange(30) + noise)


@given(st.integers(6, 40), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_a_straight_fall_has_no_noise_at_any_length(length, slope, start):
    assert not saturated(start - slope * np.arange(length))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_saturated(broken):
    assert not saturated([1.0] * 9 + [broken])


def test_too_few_losses_are_refused():
    with pytest.raises(SpecError, match="6"):
        saturated([1.0] * 5)


@pytest.mark.parametrize("learning_rate", ["cosine", "constant"])
def test_fine_tuning_may_begin_with_a_share_of_the_learning_rate(learning_rate):
    plain = Schedule(epochs=10, fine_tune_epochs=10, learning_rate=learning_rate, lr_floor=0.1)
    smaller = dataclasses.replace(plain, fine_tune_lr_share=0.4)
    for epochs in (0.0, 3.5, 10.0):
        assert smaller.lr_factor(Phase.REGULARISE, epochs) == plain.lr_factor(Phase.REGULARISE, epochs)
        assert smaller.lr_factor(Phase.FINE_TUNE, epochs) == pytest.approx(
            0.4 * plain.lr_factor(Phase.FINE_TUNE, epochs)
        )


@pytest.mark.parametrize(("epoch", "rate"), [(1, 0.018), (5, 0.09), (47, 0.046273), (90, 0.0009), (95, 0.0009)])
def test_warm_up_and_floor_give_the_published_learning_rates(epoch, rate):
    schedule = Schedule(epochs=90, warm_up_epochs=5, lr_floor=0.01)
    assert 0.09 * schedule.lr_factor(Phase.REGULARISE, epoch) == pytest.approx(rate, abs=5e-7)


def test_each_phase_has_its_own_fall_of_the_learning_rate():
    course = Course(Schedule(epochs=2, fine_tune_epochs=2))
    rates = []
    while course.phase != Phase.FINISHED:
        rates += [course.lr_factor_after(0.0), course.lr_factor_after(0.5)]
        course.after_epoch(1.0)
    assert rates == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5] * 2)
    assert Schedule(epochs=3, learning_rate="constant").lr_factor(Phase.REGULARISE, 2.5) == 1.0


def walk(schedule: Schedule, objectives, settled=True):
    course = Course(schedule)
    verdicts = []
    for objective in objectives:
        verdicts.append(course.after_epoch(objective, settled))
        if verdicts[-1].finished:
            break
    return course, verdicts


def test_without_a_window_every_epoch_is_trained():
    course, verdicts = walk(Schedule(epochs=8, fine_tune_epochs=7), [1.0] * 20)
    assert len(verdicts) == course.epoch == 15
    assert [number for number, verdict in enumerate(verdicts, 1) if verdict.prune] == [8]
    assert not any(verdict.keep or verdict.restore for verdict in verdicts)


def test_without_fine_tuning_the_training_ends_with_pruning():
    _, verdicts = walk(Schedule(epochs=2), [1.0] * 5)
    assert (verdicts[-1].prune, verdicts[-1].finished, len(verdicts)) == (True, True, 2)


def test_both_phases_end_when_the_objective_is_saturated():
    falling = list(np.linspace(2, 1, 12))
    course, verdicts = walk(Schedule(epochs=100, fine_tune_epochs=50, window=10), falling + [1.0] * 100)
    pruned = next(number for number, verdict in enumerate(verdicts, 1) if verdict.prune)
    assert 12 < pruned <= 22
    assert len(verdicts) == pruned + 10
    assert course.phase == Phase.FINISHED


def test_the_regularised_phase_lasts_at_least_as_asked_and_until_the_mode_is_settled():
    schedule = Schedule(epochs=40, fine_tune_epochs=20, window=6, min_epochs=17)
    _, verdicts = walk(schedule, [1.0] * 80)
    assert [verdict.prune for verdict in verdicts].index(True) + 1 == 17
    # Fine-tuning doesn't wait for the mode: what wasn't decided before it won't be any more.
    _, verdicts = walk(schedule, [1.0] * 80, settled=False)
    assert [verdict.prune for verdict in verdicts].index(True) + 1 == 40
    assert len(verdicts) == 46


def test_the_best_turning_point_is_kept_and_restored_if_the_end_is_worse():
    schedule = Schedule(epochs=8, window=6, check_every=2, min_epochs=8)
    _, verdicts = walk(schedule, [9, 5, 9, 6, 9, 5.5, 9, 7])
    # Checks see 5, 6, 5.5, 7: turning points are 6 and 7, and 6 is the better one.
    assert [number for number, verdict in enumerate(verdicts, 1) if verdict.keep] == [4]
    assert verdicts[-1].restore
    _, verdicts = walk(schedule, [9, 5, 9, 6, 9, 5.5, 9, 5])
    assert not verdicts[-1].restore
    _, verdicts = walk(schedule, [9, 5, 9, 6, 9, 5.5, 9, math.nan])
    assert verdicts[-1].restore


@given(st.lists(st.floats(0, 2), min_size=30, max_size=30), st.integers(0, 29))
def test_a_course_goes_on_from_its_state(objectives, stop):
    schedule = Schedule(epochs=20, fine_tune_epochs=9, window=6, check_every=3)
    whole, parts = Course(schedule), Course(schedule)
    for number, objective in enumerate(objectives):
        if whole.phase == Phase.FINISHED:
            break
        if number == stop:
            state = json.loads(json.dumps(parts.state_dict()))
            parts = Course(schedule)
            parts.load_state_dict(state)
        assert whole.after_epoch(objective) == parts.after_epoch(objective)
    assert whole == parts


def test_nothing_comes_after_the_end():
    course = Course(Schedule(epochs=1))
    course.after_epoch(1.0)
    with pytest.raises(SpecError, match="finished"):
        course.after_epoch(1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"window": 5},
        {"check_every": 0},
        {"warm_up_epochs": 9},
        {"lr_floor": 1.5},
        {"fine_tune_lr_share": 0.0},
        {"min_epochs": -1},
    ],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        Schedule(**{"epochs": 9, **options})
