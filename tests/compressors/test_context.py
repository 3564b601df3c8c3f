"""The fast tight code gives every integer back and finds what row and column scales tell."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kcomplex as kc
from kcomplex.compressors.context.context import Context
from kcomplex.compressors.context.magnitude_tokens import MOST_MAGNITUDE, join_tokens, split_tokens
from kcomplex.compressors.context.model import SETTINGS, code_matrix, room
from kcomplex.compressors.entropy.entropy import Entropy
from kcomplex.errors import StreamError
from kcomplex.estimators.pipeline import build_estimator

DTYPES = [np.dtype(kind + str(size)) for kind in "iu" for size in (1, 2, 4, 8)]
CODER = Context()
GOLDEN = (
    "8000120f3b8a64071b63af057e9844e3bce6ab62c8f1b7000811f2177c404fc47df078356a70e0d1bbebe2bf54d96c2e0f40"
    "3b5794ee724c48631a383c32871f8aef5d59bc061da70dae300b171baeed5ab172b5d3e0efc4d57fdc2082cd998cb7"
)


def integers_of_any_size():
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
    return st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, shapes, elements=hnp.from_dtype(dtype), fill=st.just(dtype.type(3)))
    )


def scaled(rows: int, columns: int, spread: float, levels: float, seed: int = 0) -> np.ndarray:
    """Quantised normal weights whose rows and columns have log-normal scales."""
    random = np.random.default_rng(seed)
    scales = np.exp(spread * random.standard_normal((rows, 1)) + spread * random.standard_normal((1, columns)))
    return np.rint(levels * scales * random.standard_normal((rows, columns)))


def assert_comes_back(symbols: np.ndarray) -> bytes:
    stream = CODER.encode(symbols)
    decoded = CODER.decode(stream, symbols.shape, symbols.dtype)
    assert decoded.dtype == symbols.dtype
    assert decoded.shape == symbols.shape
    assert decoded.tobytes() == symbols.tobytes()
    return stream


@settings(max_examples=150, deadline=None)
@given(integers_of_any_size())
def test_integers_of_every_dtype_come_back(symbols):
    assert_comes_back(symbols)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 80), st.sampled_from([0.0, 0.3, 1.5]))
def test_matrices_of_every_scale_come_back(seed, rows, columns, spread):
    levels = float(np.random.default_rng(seed).choice([0.05, 0.5, 5.0, 60.0, 2000.0, 1e9]))
    assert_comes_back(scaled(rows, columns, spread, levels, seed).astype(np.int64))


@pytest.mark.parametrize("settings_", SETTINGS)
@pytest.mark.parametrize("tilted", [False, True])
def test_the_model_decodes_under_every_setting(settings_, tilted):
    matrix = scaled(200, 70, 0.4, 9.0).clip(-100, 100).astype(np.int16) + np.arange(70, dtype=np.int16) % 20 - 10
    data = np.zeros(room(matrix.size), np.uint32)
    used, last, _ = code_matrix(False, matrix, -120, 120, settings_, tilted, 1 << 18, data)
    assert data[used - 1] == last
    decoded = np.empty_like(matrix)
    again, final, _ = code_matrix(True, decoded, -120, 120, settings_, tilted, 1 << 18, data[:used])
    assert np.array_equal(decoded, matrix)
    assert (again, final) == (used + 2, last)


@pytest.mark.parametrize("value", [0, 1, -7, 511, 512, 513, 70_000])
def test_constants_take_a_few_bytes(value):
    assert len(assert_comes_back(np.full((300, 200), value, np.int32))) < 10


@pytest.mark.parametrize("size", [1, 2, 7, 1023, 1024, 1025, 2053, 5000])
def test_vectors_come_back(size):
    assert_comes_back(scaled(1, size, 0.0, 20.0).astype(np.int16).reshape(-1))


def test_carries_run_through_words_already_written():
    # Certain symbols at the very top of the range leave words of ones behind, through which a carry must run.
    rows = np.zeros((400, 100), np.int16)
    rows[::7] = 1
    for seed in range(30):
        random = np.random.default_rng(seed)
        noisy = np.where(random.random(rows.shape) < 0.001, random.integers(-1, 2, rows.shape), 1).astype(np.int16)
        assert_comes_back(noisy)
    assert_comes_back(rows)


def test_row_and_column_scales_are_found():
    matrix = scaled(400, 300, 0.7, 12.0).clip(-127, 127).astype(np.int8)
    found, order_zero = len(assert_comes_back(matrix)), len(Entropy().encode(matrix))
    assert found < 0.93 * order_zero


def test_column_means_are_found():
    random = np.random.default_rng(1)
    matrix = np.rint(3.0 * random.standard_normal((1, 200)) + 2.0 * random.standard_normal((3000, 200))).astype(np.int8)
    assert len(assert_comes_back(matrix)) < 0.9 * len(Entropy().encode(matrix))


def test_nothing_is_won_from_noise():
    random = np.random.default_rng(2)
    uniform = random.integers(-7, 8, (600, 500)).astype(np.int8)
    assert 8 * len(assert_comes_back(uniform)) > uniform.size * np.log2(15)


def test_either_direction_is_as_good():
    # Rows of very different scale, and the same as columns.
    matrix = (scaled(512, 256, 0.0, 6.0) * np.exp(np.random.default_rng(3).standard_normal((512, 1)))).clip(-127, 127)
    across, down = (len(assert_comes_back(np.ascontiguousarray(side.astype(np.int8)))) for side in (matrix, matrix.T))
    assert abs(across - down) < 0.01 * across


def test_low_bits_of_large_magnitudes_cost_themselves():
    random = np.random.default_rng(4)
    large = np.rint(2.0**40 * random.standard_normal((200, 300))).astype(np.int64)
    entropy_of_normal = np.log2(2.0**40 * np.sqrt(2 * np.pi * np.e))
    assert entropy_of_normal < 8 * len(assert_comes_back(large)) / large.size < entropy_of_normal + 0.1


def test_beyond_the_largest_magnitude_words_are_plain():
    symbols = np.array([0, MOST_MAGNITUDE, -MOST_MAGNITUDE, 5, 6, 7] * 20)
    assert len(assert_comes_back(symbols)) == symbols.nbytes


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.int64, st.integers(0, 50), elements=st.integers(1 - MOST_MAGNITUDE, MOST_MAGNITUDE - 1)))
def test_tokens_and_low_bits_are_integers(integers):
    tokens, bits = split_tokens(integers)
    assert np.array_equal(join_tokens(tokens, bits), integers)
    order = np.argsort(integers, kind="stable")
    assert (np.diff(tokens[order]) >= 0).all()


def test_tokens_refuse_what_does_not_fit():
    tokens, bits = split_tokens(np.array([1000, -70_000, 3]))
    for damaged in (bits[:-1], bits + b"\0", bits[:-1] + bytes([bits[-1] | 1])):
        with pytest.raises(StreamError):
            join_tokens(tokens, damaged)
    with pytest.raises(StreamError, match="token of magnitude 500"):
        join_tokens(np.array([500], np.int16), b"")


def test_every_part_of_the_payload_has_a_name():
    matrix = scaled(300, 300, 0.5, 0.6).astype(np.int8)
    description = kc.describe({"w": torch.from_numpy(matrix)}, "context")[0]
    assert {"zero flags", "signs", "magnitudes", "structure"} <= set(description.parts)
    assert description.parts["signs"] == pytest.approx(np.count_nonzero(matrix), rel=0.01)


def test_streams_are_those_of_every_version():
    matrix = scaled(12, 16, 0.5, 3.0).astype(np.int8)
    assert CODER.encode(matrix).hex() == GOLDEN
    assert np.array_equal(CODER.decode(bytes.fromhex(GOLDEN), matrix.shape, matrix.dtype), matrix)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_streams_are_refused_or_decode_to_something(data):
    matrix = scaled(40, 30, 0.5, float(data.draw(st.sampled_from([0.3, 20.0, 3000.0])))).astype(np.int32)
    stream = bytearray(CODER.encode(matrix))
    stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StreamError):
        CODER.decode(bytes(stream[: data.draw(st.integers(0, len(stream)))]), matrix.shape, matrix.dtype)
    with pytest.raises(StreamError):
        CODER.decode(CODER.encode(matrix)[:-5], matrix.shape, matrix.dtype)


def test_a_tensor_can_be_decoded_without_the_others():
    tensors = {"a": torch.ones(3, 4, dtype=torch.int8), "b": torch.arange(40, dtype=torch.int8)}
    assert not build_estimator(CODER).sequential
    assert np.array_equal(
        CODER.decode(CODER.encode(tensors["b"].numpy()), (40,), np.dtype(np.int8)), tensors["b"].numpy()
    )
