"""Tables of uniformly quantised floats: what they cost, and what is refused."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.compressors.transforms.lattice import decode_lattice, encode_lattice
from kcomplex.compressors.transforms.palette import Palette
from kcomplex.errors import StreamError
from kcomplex.training.quantising.uniform_qat import quantise_uniformly

FORMATS = {np.dtype("u4"): np.float32, np.dtype("u8"): np.float64}


def words_of(step: np.floating, multiples: list[int]) -> np.ndarray:
    values = np.array(sorted(multiples)).astype(step.dtype) * step
    return values.view(f"u{step.dtype.itemsize}")


@settings(max_examples=200, deadline=None)
@given(
    floats=st.sampled_from(list(FORMATS.values())),
    step=st.floats(1e-30, 1e20),
    multiples=st.sets(st.integers(-300, 300), min_size=1, max_size=40),
)
def test_whole_multiples_of_a_step_come_back_by_ascending_value(floats, step, multiples):
    words = words_of(floats(step), list(multiples))
    table = encode_lattice(np.random.default_rng(0).permutation(words))
    # Where even the least multiple is large, the step isn't looked for.
    assert table is not None or not any(abs(multiple) <= 32 for multiple in multiples - {0})
    if table is not None:
        assert np.array_equal(decode_lattice(table, words.dtype, words.size), words)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(FORMATS)))
def test_whatever_the_words_a_table_gives_them_back(data, dtype):
    word = st.integers(0, 2 ** (8 * dtype.itemsize) - 1) | st.sampled_from([0, 1, 2, 3])
    words = np.array(data.draw(st.lists(word, min_size=1, max_size=8, unique=True)), dtype)
    table = encode_lattice(words)
    if table is not None:
        assert sorted(decode_lattice(table, dtype, words.size)) == sorted(words)


@pytest.mark.parametrize(
    "values", [[-0.0, 0.5, 1.0], [0.0, np.nan, 1.0], [0.5, np.inf], [0.0], [1.0, 1.1, 1.2563], [0.1, 0.1 + 1e-7]]
)
def test_other_floats_have_no_step(values):
    assert encode_lattice(np.array(values, np.float32).view(np.uint32)) is None


@pytest.mark.parametrize("floats", [np.float32, np.float64])
def test_the_ends_of_the_range_are_as_good_as_any_floats(floats):
    tiny, huge = np.finfo(floats).smallest_subnormal, np.finfo(floats).max
    for values in ([huge], [-huge, huge], [tiny, 2 * tiny], [tiny, huge], [huge / 2, huge], [1.0]):
        words = np.sort(np.array(values, floats)).view(f"u{floats().itemsize}")
        table = encode_lattice(words)
        assert (table is None) == (values == [tiny, huge])
        assert table is None or np.array_equal(decode_lattice(table, words.dtype, words.size), words)


def test_a_largest_float_beyond_all_steps_has_none():
    # There are more words than are looked at first, and the largest isn't one of those.
    values = np.arange(1, 200) * 5e-324
    assert encode_lattice(values.view("u8")) is not None
    assert encode_lattice(np.append(values, 1e308).view("u8")) is None


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4"])
def test_words_that_are_no_floats_have_no_step(dtype):
    assert encode_lattice(np.arange(1, 9).astype(dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_uniformly_quantised_layer_has_a_table_of_a_step_and_a_few_bytes(dtype, bits):
    weights = torch.randn(60, 50, generator=torch.Generator().manual_seed(0), dtype=dtype)
    quantised = quantise_uniformly(weights, bits)
    words = quantised.numpy().view(f"u{dtype.itemsize}")
    side, (indices,) = Palette().split(words)
    # A bit for each level, at most.
    assert len(side) < dtype.itemsize + 8 + 2**bits / 8
    assert np.array_equal(Palette().join(side, [indices], words.shape, words.dtype), words)
    described = kc.describe({"weight": quantised}, ["palette|entropy", "lin"])
    assert all(description.lossless for description in described)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=24), dtype=st.sampled_from(list(FORMATS)))
def test_damaged_tables_are_refused_or_are_tables(data, dtype):
    with contextlib.suppress(StreamError):
        words = decode_lattice(data, dtype, 1000)
        values = words.view(FORMATS[dtype])
        assert words.size <= 1000
        assert np.isfinite(values).all()
        assert (np.diff(values) > 0).all()


def test_every_truncation_is_refused():
    table = encode_lattice(words_of(np.float32(0.3), [-7, -3, 0, 1, 5]))
    for length in range(len(table)):
        with pytest.raises(StreamError):
            decode_lattice(table[:length], np.dtype("u4"), 100)


@pytest.mark.parametrize("step", [np.nan, np.inf, 0.0, -1.0, 3e38])
def test_a_step_that_makes_no_floats_is_refused(step):
    table = encode_lattice(words_of(np.float32(0.5), [-2, 0, 1, 2]))
    with pytest.raises(StreamError):
        decode_lattice(np.float32(step).tobytes() + table[4:], np.dtype("u4"), 100)
