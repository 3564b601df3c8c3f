import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex.errors import SpecError, WeightsError
from kcomplex.training.pruning.tamade import largest_threshold, prune, prune_tolerably

THETA = (0.05, -0.1, 0.23, -0.4, 0.7)


def loss_at(threshold: float) -> float:
    return 1 + sum(theta**2 for theta in THETA if abs(theta) < threshold)


@pytest.mark.parametrize(
    ("upper", "tolerance", "threshold", "kept", "loss", "evaluations"),
    [
        (1.4, 0.002, 0.049999976, 5, 1.0, 24),
        (1.4, 0.02, 0.229999924, 3, 1.0125, 24),
        (1.4, 0.1, 0.399999976, 2, 1.0654, 24),
        (1.4, 5.0, 1.3999999, 0, 1.7154, 24),
        (0.8, 0.02, 0.229999924, 3, 1.0125, 23),
    ],
)
def test_thresholds_are_the_published_ones(upper, tolerance, threshold, kept, loss, evaluations):
    found = largest_threshold(loss_at, upper, tolerance, baseline=1.0)
    assert found.threshold == pytest.approx(threshold, abs=1e-7)
    assert found.loss == pytest.approx(loss, abs=1e-12)
    assert found.evaluations == evaluations
    assert sum(abs(theta) >= found.threshold for theta in THETA) == kept


@settings(max_examples=60, deadline=None)
@given(
    cutoff=st.floats(0, 2),
    baseline=st.floats(-3, 3).filter(lambda value: abs(value) > 1e-6),
    tolerance=st.floats(0, 1),
)
def test_the_largest_tolerable_threshold_is_found_whatever_the_sign_of_the_loss(cutoff, baseline, tolerance):
    worse = baseline + 2 * (tolerance + 0.1) * abs(baseline)
    found = largest_threshold(lambda threshold: baseline if threshold <= cutoff else worse, 2.0, tolerance)
    assert found.threshold <= cutoff <= found.threshold + 1e-7
    assert found.loss == baseline


def test_an_absolute_tolerance_is_in_the_unit_of_the_loss():
    def mistakes(threshold: float) -> float:
        return 0.0 if threshold <= 0.2 else 0.01 if threshold <= 0.5 else 0.3

    assert largest_threshold(mistakes, 1.0, 0.013, absolute=True).threshold == pytest.approx(0.5, abs=1e-7)
    # A share of no mistakes at all would allow none.
    assert largest_threshold(mistakes, 1.0, 0.013).threshold == pytest.approx(0.2, abs=1e-7)


def test_the_unpruned_loss_is_evaluated_where_it_isnt_given():
    asked = []

    def remembered(threshold: float) -> float:
        asked.append(threshold)
        return loss_at(threshold)

    found = largest_threshold(remembered, 1.4, 0.02)
    assert asked[0] == 0.0
    assert found.evaluations == len(asked) == 25


def test_a_threshold_with_a_loss_that_is_not_a_number_is_too_high():
    found = largest_threshold(lambda threshold: math.nan if threshold > 0.3 else 1.0, 1.0, 0.5, baseline=1.0)
    assert found.threshold == pytest.approx(0.3, abs=1e-7)
    assert found.loss == 1.0


@pytest.mark.parametrize("baseline", [math.nan, math.inf])
def test_a_broken_network_is_refused(baseline):
    with pytest.raises(WeightsError, match=str(baseline)):
        largest_threshold(lambda _: baseline, 1.0, 0.1)


@pytest.mark.parametrize(("tolerance", "resolution"), [(-0.1, 1e-7), (math.nan, 1e-7), (0.1, 0.0)])
def test_senseless_options_are_refused(tolerance, resolution):
    with pytest.raises(SpecError):
        largest_threshold(loss_at, 1.0, tolerance, resolution=resolution)


def test_the_search_ends_where_floats_have_no_middle_left():
    found = largest_threshold(lambda threshold: 1.0 if threshold <= 1e17 else 2.0, 1e18, 0.0, baseline=1.0)
    assert found.threshold == pytest.approx(1e17)


def test_nothing_to_bisect_leaves_the_threshold_at_zero():
    assert largest_threshold(loss_at, 0.0, 0.1, baseline=1.0).threshold == 0.0


def test_pruning_is_strictly_below_the_threshold():
    tensor = torch.tensor([0.5, -0.5, 0.25, -0.25, 0.0])
    prune([tensor], 0.5)
    assert tensor.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0]


def test_one_threshold_prunes_all_parameters():
    first = torch.tensor(THETA[:2], requires_grad=True)
    second = torch.tensor(THETA[2:])
    original = torch.tensor(THETA)

    def evaluate() -> float:
        return 1 + float((original - torch.cat([first, second]).detach()).square().sum())

    found = prune_tolerably([first, second], evaluate, 0.02)
    assert found.threshold == pytest.approx(0.23, abs=1e-6)
    assert first.tolist() == [0.0, 0.0]
    assert torch.equal(second, original[2:])
    assert found.loss == pytest.approx(evaluate())


def test_a_failing_evaluation_leaves_the_parameters_as_they_were():
    tensor = torch.tensor(THETA)
    calls = 0

    def evaluate() -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the validation data is gone")
        return 1.0

    with pytest.raises(RuntimeError, match="gone"):
        prune_tolerably([tensor], evaluate, 0.1)
    assert torch.equal(tensor, torch.tensor(THETA))
