"""The tight codes give every integer back, learn from tensor to tensor, and find what there is to find."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kcomplex as kc
from kcomplex.compressors.entropy.entropy import Entropy
from kcomplex.compressors.mix.binary_coder import (
    as_bytes,
    code_bit,
    finish_decoding,
    finish_encoding,
    start_decoding,
    start_encoding,
)
from kcomplex.compressors.mix.differences import DifferenceMix, GivenNumbers, new_difference_memory
from kcomplex.compressors.mix.floats import FORMATS, FloatMix, new_float_memory
from kcomplex.compressors.mix.integers import IntegerMix, new_integer_memory
from kcomplex.compressors.mix.linear_prediction import Covariance, factor_in_place, windows
from kcomplex.compressors.mix.mix import Lin, Mix
from kcomplex.compressors.tables.logistic import exponential, logarithm, tables
from kcomplex.errors import StreamError
from kcomplex.weights import words_of
from tests.compressors.streams import Stream, decoded, encoded

DTYPES = [np.dtype(kind + str(size)) for kind in "iu" for size in (1, 2, 4, 8)]
GOLDEN = {
    "mix": (
        "01004fa75f14e4f48f84cf17143b30be54a277b0027c78b68b68c9e52d76b0d6fe05e5fe8dd6a0a0da7646804ec63b4e3b13"
        "f38fc13311781cf10958e0e4a6760731b75048e338ca821a8b6b2a553cf7a7fff0b90261aaca887b03fa6a37f9a9b1c59449"
        "9c6d80d70a25e3c69edd794cc391b0b7b70d595a27da34c79deb0110e8bb027c37530e"
    ),
    "lin": (
        "05004f0702a75f14e4f48f84cf17143b30be54a277b0027c78b68b68c9e52d76b0d6fe05e5fe8dd6a0a0da7646804ec63b4e"
        "3b13f38fc13311781cef6d010e69f54ba2c7ccf3e17d18b7e79592561129c7ae931d2d53979729df8a109371e97721202656"
        "3a5d85dee3ba1430658232295e644a4dda343771005564dbdd897177f37a6463"
    ),
}


def integers_of_any_size():
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
    return st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, shapes, elements=hnp.from_dtype(dtype), fill=st.just(dtype.type(3)))
    )


def small_integers():
    """Matrices as quantisers make them: small numbers, enough rows for the prediction to begin."""
    sides = st.tuples(st.integers(1, 60), st.integers(1, 30))
    return sides.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-9, 9)))


def correlated(rows: int, columns: int, scale: float, seed: int = 0) -> np.ndarray:
    """Quantised rows of a Gaussian with four strong directions."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((4, columns))
    values = random.standard_normal((rows, 4)) @ directions + 0.3 * random.standard_normal((rows, columns))
    return np.clip(np.rint(values * scale), -127, 127).astype(np.int8)


@pytest.mark.parametrize("coder", [Mix(), Lin()])
@settings(max_examples=60, deadline=None)
@given(symbols=integers_of_any_size())
def test_any_integers_come_back(coder, symbols):
    data = encoded(coder, symbols)
    back = decoded(coder, data, symbols.shape, symbols.dtype)
    assert back.dtype == symbols.dtype
    assert np.array_equal(back, symbols)


@pytest.mark.parametrize("coder", [Mix(), Lin()])
@settings(max_examples=40, deadline=None)
@given(tensors=st.lists(small_integers(), min_size=1, max_size=4))
def test_tensors_come_back_in_order(coder, tensors):
    encoder, decoder = Stream(coder), Stream(coder)
    for symbols in tensors:
        view = symbols.T
        assert np.array_equal(decoder.decode(encoder.encode(view), view.shape, view.dtype), view)


@pytest.mark.parametrize("shape", [(3000,), (3001,), (1, 2500), (2, 70_000), (5, 4, 3, 2), (1200, 8), (8, 1200)])
@pytest.mark.parametrize("coder", [Mix(), Lin()])
def test_every_shape_comes_back(coder, shape):
    symbols = np.random.default_rng(1).integers(-3, 4, shape).astype(np.int16)
    data = encoded(coder, symbols)
    assert np.array_equal(decoded(coder, data, shape, symbols.dtype), symbols)


@pytest.mark.parametrize("new_memory", [new_integer_memory, new_float_memory, new_difference_memory])
def test_a_copy_knows_the_same_and_learns_for_itself(new_memory):
    floats = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    base = 0.9 * floats.numpy().reshape(-1)

    def encode(memory):
        if new_memory is new_difference_memory:
            coder = DifferenceMix(FORMATS[torch.float32], True, memory, GivenNumbers(base))
        elif new_memory is new_float_memory:
            coder = FloatMix(FORMATS[torch.float32], True, memory)
        else:
            coder = IntegerMix(True, memory)
        symbols = correlated(60, 20, 9.0) if new_memory is new_integer_memory else words_of(floats).reshape(60, 20)
        return b"".join(part.data for part in coder.encode_parts(symbols))

    memory = new_memory()
    first = encode(memory)
    copy = memory.copy()
    second = encode(copy)
    assert encode(copy) != second
    assert encode(memory.copy()) == second == encode(memory)
    fresh = new_memory()
    assert encode(fresh) == first
    memory.become(fresh)
    assert encode(memory) == second


def test_a_copy_takes_what_was_used():
    """Trials copy what tensors before them have taught: most of their room is never used."""
    memory = new_integer_memory()
    for seed in range(3):
        IntegerMix(False, memory).encode_parts(correlated(20, 10, 9.0, seed))
    mixer, other = memory.mixer, memory.copy().mixer
    assert np.array_equal(mixer.maps, other.maps)
    assert 0 < mixer.used.mean() < 0.3
    pieces = mixer.maps.reshape(mixer.used.size, -1)
    assert not pieces[mixer.used == 0].any()


def test_windows_of_wide_matrices_are_predicted_each_by_itself():
    assert windows(1024) == [(0, 1024)]
    assert windows(1025) == [(0, 513), (513, 1025)]
    symbols = correlated(140, 1100, 20.0)
    data = encoded(Lin(), symbols)
    assert np.array_equal(decoded(Lin(), data, symbols.shape, symbols.dtype), symbols)


def test_matrices_learn_from_those_before_them():
    first, second = correlated(300, 64, 20.0, seed=1), correlated(300, 64, 20.0, seed=1)[::-1].copy()
    stream = Stream(Lin())
    stream.encode(first)
    assert len(stream.encode(second)) < 0.97 * len(encoded(Lin(), second))


def test_linear_prediction_finds_what_columns_share():
    symbols = correlated(2000, 48, 20.0)
    assert len(encoded(Lin(), symbols)) < 0.75 * len(encoded(Mix(), symbols))
    assert len(encoded(Lin(), symbols.T)) < 0.75 * len(encoded(Mix(), symbols))


@pytest.mark.parametrize("bits", [16, 18, 19, 31, 40])
def test_integers_of_any_size_are_predicted(bits):
    random = np.random.default_rng(0)
    values = random.standard_normal((300, 8)) @ random.standard_normal((8, 64)) + 0.1 * random.standard_normal(
        (300, 64)
    )
    symbols = np.rint(values / np.abs(values).max() * 2**bits).astype(np.int64)
    data = encoded(Lin(), symbols)
    assert 8 * len(data) < 8 * len(encoded(Mix(), symbols)) - 2.5 * symbols.size
    assert np.array_equal(decoded(Lin(), data, symbols.shape, symbols.dtype), symbols)


def test_scales_of_rows_and_columns_are_found():
    random = np.random.default_rng(0)
    scales = np.exp(random.standard_normal((400, 1))) * np.exp(random.standard_normal((1, 100)))
    symbols = np.clip(np.rint(random.laplace(size=(400, 100)) * scales), -127, 127).astype(np.int8)
    assert len(encoded(Mix(), symbols)) < 0.9 * len(Entropy().encode(symbols))


@pytest.mark.parametrize("coder", [Mix(), Lin()])
@pytest.mark.parametrize("levels", [2, 15, 255])
def test_nothing_is_won_from_noise(coder, levels):
    """Shuffled symbols: no stream is shorter than the number of their arrangements takes."""
    random = np.random.default_rng(levels)
    symbols = np.clip(np.rint(random.laplace(size=(200, 150)) * levels / 8), -(levels // 2), levels // 2)
    symbols = random.permutation(symbols.astype(np.int8).reshape(-1)).reshape(200, 150)
    counts = np.unique(symbols, return_counts=True)[1]
    arrangements = math.lgamma(symbols.size + 1) - sum(math.lgamma(count + 1) for count in counts.tolist())
    bits = 8 * len(encoded(coder, symbols))
    assert arrangements / math.log(2) <= bits < 1.02 * arrangements / math.log(2) + 4000


def test_bits_are_shared_out_among_fields():
    symbols = correlated(300, 64, 20.0)
    description = kc.describe({"w": torch.from_numpy(symbols)}, "lin")[0]
    assert {"zero flags", "signs", "magnitudes", "tables", "structure"} <= set(description.parts)
    assert math.fsum(description.parts.values()) == description.bits
    assert 0.05 < description.parts["signs"] / symbols.size < 1.2


@pytest.mark.parametrize("coder", [Mix(), Lin()])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_stream_is_refused_or_decodes_to_other_integers(coder, data):
    symbols = correlated(40, 20, 5.0)
    stream = bytearray(encoded(coder, symbols))
    position = data.draw(st.integers(0, len(stream) - 1))
    stream[position] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(StreamError):
        assert decoded(coder, bytes(stream), symbols.shape, symbols.dtype).shape == symbols.shape


@pytest.mark.parametrize("coder", [Mix(), Lin()])
def test_missing_and_additional_bytes_are_refused(coder):
    symbols = correlated(40, 20, 5.0)
    stream = encoded(coder, symbols)
    for damaged in (stream[: len(stream) // 2], stream + b"\1", stream[:1], b""):
        with pytest.raises(StreamError):
            decoded(coder, damaged, symbols.shape, symbols.dtype)


def test_a_few_bytes_that_announce_very_many_integers_are_refused():
    stream = encoded(Mix(), np.zeros((8, 8), np.int8))
    with pytest.raises(StreamError, match="can't hold"):
        decoded(Mix(), stream, (1 << 12, 1 << 12), np.dtype(np.int8))


@settings(max_examples=100, deadline=None)
@given(decisions=st.lists(st.tuples(st.booleans(), st.integers(1, 65535)), max_size=300))
def test_binary_decisions_come_back_at_their_price(decisions):
    state, data = start_encoding(), np.zeros(2 * len(decisions) + 16, np.uint8)
    for bit, probability in decisions:
        code_bit(state, data, int(bit), probability)
    stream = finish_encoding(state, data)
    price = -sum(math.log2((p if bit else 65536 - p) / 65536) for bit, p in decisions)
    assert 8 * len(stream) <= price + 16
    state, data = start_decoding(as_bytes(stream)), as_bytes(stream)
    assert [bool(code_bit(state, data, 0, p)) for _, p in decisions] == [bit for bit, _ in decisions]
    finish_decoding(state, data)


def test_tables_are_those_of_the_functions():
    x = np.linspace(-30, 30, 1001)
    assert np.allclose(exponential(x), np.exp(x), rtol=1e-14, atol=0)
    assert np.allclose(logarithm(np.exp(x)), x, rtol=0, atol=1e-14)
    found = tables()
    t = np.arange(1500) / 64
    assert np.allclose(found.laplace[:1500], np.exp(-t) / 2, rtol=1e-13)
    normal = [math.erfc(value * math.sqrt(2 / math.pi) / math.sqrt(2)) / 2 for value in t[:800]]
    assert np.allclose(found.normal[:800], normal, rtol=1e-6)
    assert (np.diff(found.squash) >= 0).all()
    assert found.squash.min() == 1
    assert found.squash.max() == 65535


def test_our_factorisation_is_that_of_cholesky():
    random = np.random.default_rng(0)
    for size in (1, 5, 32, 33, 100):
        sample = random.standard_normal((size + 20, size))
        matrix = sample.T @ sample / size + 0.1 * np.eye(size)
        factor = matrix.astype(np.float32)
        factor_in_place(factor)
        assert np.allclose(factor, np.linalg.cholesky(matrix).T, atol=1e-5)


def test_sums_of_products_are_exact_whatever_their_order():
    rows = correlated(300, 40, 20.0).astype(np.float64)
    one, other = Covariance.empty(40), Covariance.empty(40)
    one.add(rows)
    other.add(rows[::-1])
    assert np.array_equal(one.sums()[0], other.sums()[0])


def test_matrices_of_every_scale_and_density_count_the_same():
    rows = correlated(300, 40, 20.0).astype(np.float64)
    one, other = Covariance.empty(40), Covariance.empty(40)
    one.add(rows)
    other.add(1024.0 * rows)
    assert np.array_equal(one.carried().sums()[0], other.carried().sums()[0])
    following = one.carried()
    following.add(np.where(np.random.default_rng(0).random(rows.shape) < 0.01, rows, 0.0))
    assert following.rows == 600
    assert following.sums()[0].trace() == pytest.approx(600 * 40)


def test_a_matrix_of_zeros_tells_nothing():
    known = Covariance.empty(40)
    known.add(np.zeros((10, 40)))
    assert not known.sums()[0].any()
    assert np.isfinite(known.factors(0).inverses).all()


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_streams_of_this_version_stay_readable(name):
    coder = {"mix": Mix(), "lin": Lin()}[name]
    symbols = correlated(40, 6, 3.0)
    assert encoded(coder, symbols).hex() == GOLDEN[name]
    assert np.array_equal(decoded(coder, bytes.fromhex(GOLDEN[name]), symbols.shape, symbols.dtype), symbols)
