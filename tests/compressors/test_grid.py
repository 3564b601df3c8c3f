"""Multiples of a step: what they stand for, and what choosing them by error and bits together is worth."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcomplex.compressors.quantisers.grid import Grid
from kcomplex.compressors.quantisers.trellis import NEXT_STATE, STATES, multiples_of
from kcomplex.errors import StreamError
from kcomplex.estimators.coder import Quantised
from kcomplex.measuring.measure import describe

values_and_steps = st.tuples(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        elements=st.floats(-50, 50, width=32),
    ),
    st.sampled_from([0.01, 0.3, 1.0, 7.0]),
)


def back(quantiser: Grid, values: np.ndarray) -> np.ndarray:
    return quantiser.reconstruct(quantiser.quantise(values, b""), values.shape, values.dtype, b"")


def laplacian(rows: int = 150, columns: int = 100) -> np.ndarray:
    """Weights whose rows and columns have scales of their own, as those of networks have."""
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(0, 0.4, (rows, 1)) + random.normal(0, 0.4, (1, columns)))
    return (scales * random.laplace(size=(rows, columns))).astype(np.float32)


def test_levels_stand_for_the_multiples_that_streams_rely_on():
    levels = np.array([0, 1, 1, 0, -1, 2, -3, 0, 5, -2, 1, 1], np.int8)
    assert multiples_of(levels).tolist() == [0, 2, 1, 0, -1, 3, -6, 0, 10, -4, 1, 2]
    assert multiples_of(levels.reshape(3, 4)).shape == (3, 4)


def test_every_state_is_left_and_reached_twice():
    assert NEXT_STATE.shape == (STATES, 2)
    assert np.bincount(NEXT_STATE.reshape(-1)).tolist() == [2] * STATES


@settings(max_examples=100, deadline=None)
@given(drawn=values_and_steps)
def test_the_nearest_multiple_is_within_half_a_step(drawn):
    values, step = drawn
    decoded = back(Grid(step, trellis=False, price=0), values)
    assert (np.abs(decoded - values) <= step / 2 + 1e-5 * np.abs(values)).all()


@settings(max_examples=100, deadline=None)
@given(drawn=values_and_steps, rounding=st.floats(0, 0.49))
def test_less_rounding_makes_a_wider_zero(drawn, rounding):
    values, step = drawn
    quantised = Grid(step, trellis=False, price=0, rounding=rounding).quantise(values, b"")
    scaled = np.abs(values.astype(np.float64)) / float(np.float32(step))
    np.testing.assert_array_equal(np.abs(quantised.symbols), np.floor(scaled + rounding))


@settings(max_examples=100, deadline=None)
@given(drawn=values_and_steps)
def test_a_trellis_without_a_price_stays_within_two_steps(drawn):
    values, step = drawn
    error = np.abs(back(Grid(step, price=0), values) - values)
    assert (error <= 2.51 * step + 1e-5 * np.abs(values)).all()


@settings(max_examples=60, deadline=None)
@given(drawn=values_and_steps, trellis=st.booleans(), price=st.sampled_from([0.5, 1.0, 4.0]))
def test_codes_are_the_same_whatever_the_layout(drawn, trellis, price):
    values, step = drawn
    quantiser = Grid(step, trellis, price)
    turned = np.asfortranarray(values)
    np.testing.assert_array_equal(quantiser.quantise(values, b"").symbols, quantiser.quantise(turned, b"").symbols)


def test_a_trellis_gains_a_decibel():
    values = np.random.default_rng(1).normal(0, 100, (400, 250))
    plain = np.square(back(Grid(1.0, trellis=False, price=0), values) - values).mean()
    path = np.square(back(Grid(0.5, price=0), values) - values).mean()
    assert 10 * np.log10(plain / path) > 1.0


def bits_at_the_error_of_rounding(step: float, options: str, coder: str) -> float:
    """Bits with options over those of plain rounding with a step, where the error is no larger."""
    weights = {"w": torch.from_numpy(laplacian())}
    (plain,) = describe(weights, f"grid:step={step},trellis=False,price=0|{coder}")
    finer = 1.0
    while (chosen := describe(weights, f"grid:step={step * finer},{options}|{coder}")[0]).distortion > plain.distortion:
        finer *= 0.97
    return chosen.bits / plain.bits


@pytest.mark.parametrize(("step", "share"), [(0.3, 0.98), (1.0, 0.965), (3.0, 0.935)])
def test_a_trellis_takes_fewer_bits_at_the_same_error(step, share):
    assert bits_at_the_error_of_rounding(step, "contexts=False", "entropy") < share


@pytest.mark.parametrize(("step", "share"), [(1.0, 0.998), (3.0, 0.96)])
def test_a_price_saves_bits_at_the_same_error(step, share):
    assert bits_at_the_error_of_rounding(step, "trellis=False,contexts=False", "entropy") < share


def test_prices_by_context_are_those_of_a_coder_that_learns_scales():
    assert bits_at_the_error_of_rounding(3.0, "trellis=True", "mix") < 0.91
    assert bits_at_the_error_of_rounding(3.0, "contexts=False", "mix") > 0.91


def test_a_higher_price_buys_fewer_bits_with_more_error():
    weights = {"w": torch.from_numpy(laplacian())}
    described = [describe(weights, f"grid:step=0.5,price={price}|entropy")[0] for price in (0, 0.5, 1, 2, 4)]
    bits, errors = [item.bits for item in described], [item.distortion for item in described]
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)


def test_a_tensor_longer_than_a_block_of_the_search_is_quantised_alike_everywhere():
    values = np.random.default_rng(2).normal(size=100_000).astype(np.float32)
    error = np.square(back(Grid(0.1), values) - values)
    assert error[:50_000].mean() == pytest.approx(error[50_000:].mean(), rel=0.05)


def test_side_information_is_the_step_and_three_bytes():
    assert len(Grid(0.5).quantise(np.ones(4, np.float32), b"").side) == 7
    assert len(Grid(0.5).quantise(np.ones(4), b"").side) == 11


@pytest.mark.parametrize(("largest", "dtype"), [(100, np.int8), (3000, np.int16), (300_000, np.int32)])
def test_codes_are_as_wide_as_they_need(largest, dtype):
    quantised = Grid(1.0, trellis=False, price=0).quantise(np.array([largest], np.float32), b"")
    assert quantised.symbols.dtype == dtype


@pytest.mark.parametrize(("place", "byte"), [(-3, 3), (-3, 255)])
def test_an_impossible_width_is_refused(place, byte):
    values = np.ones(4, np.float32)
    quantised = Grid(0.5).quantise(values, b"")
    side = bytearray(quantised.side)
    side[place] = byte
    with pytest.raises(StreamError):
        Grid(0.5).reconstruct(Quantised(quantised.symbols, bytes(side)), values.shape, values.dtype, b"")


def test_a_step_of_zero_and_codes_beyond_all_steps_are_refused():
    values = np.ones(4, np.float32)
    quantised = Grid(0.5).quantise(values, b"")
    with pytest.raises(StreamError):
        Grid(0.5).reconstruct(Quantised(quantised.symbols, bytes(4) + quantised.side[4:]), (4,), values.dtype, b"")
    beyond = np.full(4, 1 << 30, np.int32)
    with pytest.raises(StreamError):
        Grid(0.5).reconstruct(Quantised(beyond, quantised.side), (4,), values.dtype, b"")
