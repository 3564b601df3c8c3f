"""The search for steps, on losses whose answer is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcomplex.errors import WeightsError
from kcomplex.quantising.step_search import LossSearch, Probe, boundary, length_probe, mean_square_probe


@given(
    edge=st.floats(-20, 5),
    start=st.floats(-22, 6),
    guess=st.sampled_from(["none", "right", "wrong"]),
)
def test_the_boundary_is_found_to_the_resolution(edge, start, guess):
    seen = []

    def probe(place):
        seen.append(place)
        return Probe(place <= edge, {"none": math.nan, "right": edge, "wrong": edge + 40}[guess])

    found = boundary(probe, start, -22, 6, 0.01)
    assert edge - 0.01 <= found <= edge
    assert len(seen) == len(set(seen)) <= 45


def test_a_good_prediction_saves_trials():
    def trials(predicted):
        seen = []

        def probe(place):
            seen.append(place)
            return Probe(place <= 1.2345, predicted)

        boundary(probe, -6, -22, 6, 0.01)
        return len(seen)

    assert trials(1.23) < trials(math.nan)


def test_a_wish_met_everywhere_or_nowhere():
    assert boundary(lambda place: Probe(True), 0, -3, 5, 0.1) == 5
    assert boundary(lambda place: Probe(False), 0, -3, 5, 0.1) is None


def test_a_search_that_is_stopped_returns_what_it_has():
    answers = iter([Probe(True), Probe(True), None])
    assert boundary(lambda place: next(answers), 0, -9, 9, 0.1) == 1
    assert boundary(lambda place: None, 0, -9, 9, 0.1) is None


def test_error_and_length_are_met_from_the_right_side():
    place = boundary(mean_square_probe(lambda place: 4.0**place / 12, 1e-3), 0, -22, 6, 0.001)
    assert 4.0**place / 12 <= 1e-3 < 4.0 ** (place + 0.001) / 12
    fineness = boundary(length_probe(lambda place: max(place + 5, 0.1), 3.0), 0, -22, 22, 0.001)
    assert -2.001 <= fineness <= -2


class Network:
    """A loss that is quadratic in the steps, with tensors that are more and less sensitive."""

    sizes = {"a": 1000, "b": 1000, "c": 10}  # noqa: RUF012
    sensitivities = {"a": 1.0, "b": 100.0, "c": 10.0}  # noqa: RUF012

    def __init__(self, wrong=None):
        self.evaluated = []
        self.wrong = wrong

    def loss(self, steps):
        self.evaluated.append(steps)
        loss = 1 + sum(self.sensitivities[name] * step**2 for name, step in steps.items())
        return self.wrong if self.wrong is not None and loss > 1.2 else loss

    def tensor_bits(self, name, step):
        return self.sizes[name] * max(10 - math.log2(step), 0.1)

    def bits(self, steps):
        return sum(self.tensor_bits(name, step) for name, step in steps.items())

    def search(self, limit=1.1, evaluations=60):
        search = LossSearch(self.loss, self.bits, self.tensor_bits, 1.0, limit, evaluations)
        return search.run([dict.fromkeys(self.sizes, 1.0)], -22, 6, -2, self.sizes)


def test_each_tensor_gets_the_step_that_its_sensitivity_allows():
    network = Network()
    found = network.search()
    assert found.loss == network.loss(found.steps) <= 1.1
    assert found.bits == network.bits(found.steps)
    # The best steps share the loss in proportion to the numbers of weights.
    ideal = {name: math.sqrt(0.1 * size / 2010 / network.sensitivities[name]) for name, size in network.sizes.items()}
    assert found.bits < network.bits(ideal) + 0.1 * 2010
    equal = math.sqrt(0.1 / sum(network.sensitivities.values()))
    assert found.bits < network.bits(dict.fromkeys(network.sizes, equal)) - 1000


@pytest.mark.parametrize("evaluations", [4, 7, 12, 20])
def test_evaluations_are_limited(evaluations):
    network = Network()
    assert network.search(evaluations=evaluations).loss <= 1.1
    assert len(network.evaluated) <= evaluations


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_accepted(wrong):
    found = Network(wrong).search()
    assert 1 < found.loss <= 1.1


def test_no_step_may_do():
    with pytest.raises(WeightsError, match="lossless"):
        Network().search(limit=0.99)
    with pytest.raises(WeightsError, match="more evaluations"):
        Network().search(limit=1 + 1e-9, evaluations=1)
