"""The tight codes on floats: every bit pattern comes back, and zeros, origins and scales cost what they should."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kcomplex as kc
from kcomplex.compressors.mix.binary_coder import (
    as_bytes,
    code_bit,
    code_evenly,
    finish_decoding,
    finish_encoding,
    start_decoding,
    start_encoding,
)
from kcomplex.errors import StreamError
from kcomplex.weights import words_of
from tests.compressors.streams import Stream

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
WORDS = {
    torch.float64: np.int64,
    torch.float32: np.int32,
    torch.bfloat16: np.int16,
    torch.float16: np.int16,
    **dict.fromkeys(EIGHT_BITS, np.int8),
}


def any_floats():
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20)
    return st.sampled_from(sorted(WORDS, key=str)).flatmap(
        lambda dtype: shapes.flatmap(
            lambda shape: hnp.arrays(WORDS[dtype], shape).map(lambda words: torch.from_numpy(words).view(dtype))
        )
    )


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_a_weight(tensor: torch.Tensor, spec: str = "mix") -> float:
    return kc.describe({"w": tensor}, spec)[0].tensors[0].value / tensor.numel()


@pytest.mark.parametrize("spec", ["mix", "lin"])
@settings(max_examples=40, deadline=None)
@given(tensors=st.lists(any_floats(), min_size=1, max_size=3))
def test_any_floats_come_back(spec, tensors):
    named = {str(index): tensor for index, tensor in enumerate(tensors)}
    decoded = kc.decode_checkpoint(kc.encode_checkpoint(named, spec))
    for name, tensor in named.items():
        assert (decoded[name].dtype, decoded[name].shape) == (tensor.dtype, tensor.shape)
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes()


@pytest.mark.parametrize("spec", ["mix", "lin"])
@pytest.mark.parametrize("dtype", list(WORDS))
def test_weights_come_back(spec, dtype):
    common = gaussian(4, 48, seed=1)
    dense = (gaussian(300, 4) @ common + 0.3 * gaussian(300, 48, seed=2)).to(dtype)
    sparse = gaussian(120, 50, seed=3) * (gaussian(120, 50, seed=4) > 1)
    tensors = {
        "dense": dense,
        "transposed": dense.T,
        "sparse": sparse.to(dtype),
        "broken": torch.tensor([[math.nan, math.inf], [-math.inf, -0.0], [1e-7, 6e4]]).repeat(20, 5).to(dtype),
        "vector": gaussian(3000, seed=5).to(dtype),
        "wide": gaussian(2, 70_000, seed=6).to(dtype),
        "levels": gaussian(100, 50, seed=7).round().to(dtype),
        "scalar": torch.tensor(0.1).to(dtype),
    }
    decoded = kc.decode_checkpoint(kc.encode_checkpoint(tensors, spec))
    for name, tensor in tensors.items():
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes(), name


def test_linear_prediction_finds_what_columns_share():
    weights = gaussian(2000, 4) @ gaussian(4, 48, seed=1) + 0.3 * gaussian(2000, 48, seed=2)
    assert bits_a_weight(weights, "lin") < bits_a_weight(weights, "mix") - 1.5
    assert bits_a_weight(weights.T, "lin") < bits_a_weight(weights.T, "mix") - 1.5


def test_zeros_cost_their_entropy():
    kept = gaussian(400, 100, seed=1) > 1.65
    weights = torch.where(kept, gaussian(400, 100), torch.zeros(()))
    share = kept.float().mean().item()
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert bits_a_weight(weights) < share * 27 + 1.05 * entropy


def test_signs_of_zeros_cost_what_they_tell():
    columns = gaussian(1, 100, seed=1).sign()
    weights = torch.where(gaussian(400, 100, seed=2) > 1.65, gaussian(400, 100), torch.zeros(())).abs() * columns
    assert (weights.view(torch.int32) == -(2**31)).any()
    assert bits_a_weight(weights) < bits_a_weight(weights.abs()) + 0.25


@pytest.mark.parametrize(("origin", "spared"), [(torch.float16, 12.5), (torch.bfloat16, 15.5)])
def test_rows_that_were_half_precision_cost_less(origin, spared):
    """Every other row ends in zeros."""
    weights = gaussian(400, 100)
    mixed = weights.clone()
    mixed[::2] = mixed[::2].to(origin).float()
    assert bits_a_weight(mixed) < bits_a_weight(weights) - spared / 2


def test_scales_of_columns_are_found():
    weights = gaussian(500, 60) * torch.exp(2 * gaussian(1, 60, seed=1))
    assert bits_a_weight(weights) < bits_a_weight(weights.reshape(-1)[torch.randperm(30_000)].reshape(500, 60)) - 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_values_are_coded_as_integers(dtype):
    levels = torch.clamp((3 * gaussian(300, 100)).round(), -7, 7) + 0.0
    assert bits_a_weight(0.125 * levels.to(dtype)) < bits_a_weight(levels.to(torch.int8)) + 0.05


@pytest.mark.parametrize(("dtype", "most"), [*zip(EIGHT_BITS, (6.6, 6.6, 5.65, 5.65), strict=True)])
def test_floats_of_eight_bits_are_coded_by_their_fields(dtype, most):
    """As integers they take 0.35 bits more: neither do scales show in words nor signs in what is expected."""
    scales = torch.exp(gaussian(400, 1, seed=1)) * torch.exp(0.5 * gaussian(1, 400, seed=2))
    weights = (gaussian(400, 400) * scales).to(dtype)
    assert bits_a_weight(weights) < most
    assert bits_a_weight(weights) < bits_a_weight(weights.view(torch.uint8)) - 0.3


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_levels_in_floats_of_eight_bits_are_found(dtype):
    levels = torch.clamp((3 * gaussian(300, 100)).round(), -16, 16)
    assert bits_a_weight(levels.to(dtype)) < bits_a_weight(levels.to(torch.int8)) + 0.2


def test_nothing_is_won_from_noise():
    words = np.random.default_rng(0).integers(0, 1 << 16, (150, 100), dtype=np.uint16)
    noise = torch.from_numpy(words.view(np.int16))
    for dtype in (torch.bfloat16, torch.float16):
        for spec in ("mix", "lin"):
            assert 16 <= bits_a_weight(noise.view(dtype), spec) < 16.3


def test_bits_are_shared_out_among_fields():
    description = kc.describe({"w": gaussian(300, 64)}, "mix")[0]
    parts = {name: bits / description.weights for name, bits in description.parts.items()}
    assert parts["signs"] == pytest.approx(1, abs=0.02)
    assert parts["low mantissa bits"] == pytest.approx(16, abs=0.02)
    assert 2 < parts["exponents"] < 3
    assert 6.8 < parts["mantissas"] < 7.02
    assert math.fsum(description.parts.values()) == description.bits


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0", b"\0\x20\0\0", b"\0\0\x05\0", b"\0\0\0\xff\xff\x7f", b"\x09"])
def test_streams_that_are_none_are_refused(data):
    from kcomplex.compressors.mix.mix import Mix

    with pytest.raises(StreamError):
        Stream(Mix()).decode_tensor(data, torch.float32, (8, 8))


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 65535), st.integers(1, 65535)), max_size=200),
)
def test_even_integers_come_back_at_their_price(values):
    state, data = start_encoding(), np.zeros(8 * len(values) + 16, np.uint8)
    price = 0.0
    for bits, value, probability in values:
        code_evenly(state, data, value % (1 << bits), bits)
        code_bit(state, data, 1, probability)
        price += bits - math.log2(probability / 65536)
    stream = finish_encoding(state, data)
    assert 8 * len(stream) <= price + 16
    state, data = start_decoding(as_bytes(stream)), as_bytes(stream)
    for bits, value, probability in values:
        assert code_evenly(state, data, 0, bits) == value % (1 << bits)
        assert code_bit(state, data, 0, probability) == 1
    finish_decoding(state, data)


def test_even_integers_come_back_where_the_bounds_are_close():
    state, data = start_encoding(), np.zeros(100, np.uint8)
    state.low, state.high = (1 << 63) - 200, (1 << 63) + 200
    code_evenly(state, data, 40_000, 16)
    stream = finish_encoding(state, data)
    state = start_decoding(as_bytes(stream))
    state.low, state.high = (1 << 63) - 200, (1 << 63) + 200
    assert code_evenly(state, as_bytes(stream), 0, 16) == 40_000
