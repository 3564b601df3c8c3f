"""Codebooks of numbers: as good as theory says they can be, and paid for."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcomplex.compressors.quantisers.lloyd import Lloyd
from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.coder import Quantised
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.measuring.measure import describe
from kcomplex.measuring.stream import decode_checkpoint, encode_checkpoint, prove
from kcomplex.sources.open import open_weights


def shapes():
    return hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)


any_values = st.one_of(
    hnp.arrays(np.float32, shapes(), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    hnp.arrays(np.float64, shapes(), elements=st.floats(allow_nan=False, allow_infinity=False)),
)
plain_values = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(-9, 9, width=32))


def back(quantiser: Lloyd, values: np.ndarray) -> np.ndarray:
    return quantiser.reconstruct(quantiser.quantise(values, b""), values.shape, values.dtype, b"")


@pytest.mark.parametrize("quantiser", [Lloyd(), Lloyd(k=1), Lloyd(k=300), Lloyd(k=6, price=1.0)], ids=repr)
@settings(max_examples=60, deadline=None)
@given(values=any_values)
def test_every_finite_tensor_is_quantised(quantiser, values):
    quantised = quantiser.quantise(values, b"")
    decoded = quantiser.reconstruct(quantised, values.shape, values.dtype, b"")
    assert isinstance(decoded, np.ndarray)
    assert (decoded.shape, decoded.dtype) == (values.shape, values.dtype)
    assert np.isfinite(decoded).all()
    assert np.unique(decoded).size <= quantiser.k


@settings(max_examples=100, deadline=None)
@example(values=np.array([1.0, -5e-324, 0.0]))
@given(values=any_values)
def test_few_distinct_values_are_kept(values):
    np.testing.assert_array_equal(back(Lloyd(k=400), values), values)


@settings(max_examples=100, deadline=None)
@given(values=plain_values, k=st.integers(1, 9))
def test_every_value_becomes_the_nearest_level(values, k):
    decoded = back(Lloyd(k), values)
    levels = np.unique(decoded)
    nearest = np.abs(values[:, None] - levels).min(axis=1)
    np.testing.assert_allclose(np.abs(values - decoded), nearest, atol=1e-12)


@pytest.mark.parametrize(("k", "error"), [(1, 1.0), (2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_levels_of_a_normal_distribution_are_those_of_max(k, error):
    # J. Max: Quantizing for minimum distortion. IRE Transactions on Information Theory 6, 1960, table I.
    values = np.random.default_rng(0).normal(size=200_000)
    assert np.square(back(Lloyd(k), values) - values).mean() == pytest.approx(error, rel=0.01)


def test_a_price_saves_bits_at_the_same_error():
    weights = {"w": torch.from_numpy(np.random.default_rng(0).laplace(size=(200, 200)).astype(np.float32))}
    (plain,) = describe(weights, "lloyd:k=8|entropy")
    priced = [describe(weights, f"lloyd:k={k},price=1|entropy")[0] for k in (10, 12, 14, 16, 20, 24)]
    assert min(item.bits for item in priced if item.distortion <= plain.distortion) < 0.95 * plain.bits


def test_a_higher_price_buys_fewer_bits_with_more_error():
    weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    described = [describe(weights, f"lloyd:k=32,price={price}|entropy")[0] for price in (0, 2, 8, 32)]
    bits, errors = [item.bits for item in described], [item.distortion for item in described]
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)


def test_a_shared_codebook_is_paid_for_once():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{index}": torch.randn(30, 20, generator=generator) for index in range(12)}
    own, shared = describe(tensors, ["lloyd:k=64|entropy", "lloyd:k=64,shared=True|entropy"])
    assert shared.bits < own.bits - 11 * 64 * 16
    assert shared.parts["tables"] < own.parts["tables"]


def test_a_shared_codebook_serves_every_dtype():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "single": torch.randn(40, 10, generator=generator),
        "double": torch.randn(300, generator=generator, dtype=torch.float64) * 1e3,
        "half": torch.randn(50, generator=generator).half(),
        "steps": torch.arange(5),
        "none": torch.zeros(0, 3),
    }
    (description,) = describe(tensors, "lloyd:k=40,shared=True|entropy")
    prove(tensors, description)
    decoded = decode_checkpoint(encode_checkpoint(tensors, "lloyd:k=40,shared=True|entropy"))
    assert torch.equal(decoded["steps"], tensors["steps"])


def test_a_network_without_floats_has_no_codebook():
    tensors = {"steps": torch.arange(5), "none": torch.zeros(0)}
    assert build_estimator("lloyd:shared=True|entropy").prepare(open_weights(tensors)) == b""
    assert decode_checkpoint(encode_checkpoint(tensors, "lloyd:shared=True|entropy")).keys() == tensors.keys()


@pytest.mark.parametrize("spec", ["lloyd:k=0", "lloyd:k=40000", "lloyd:price=-1", "lloyd:price=inf"])
def test_senseless_options_are_refused(spec):
    with pytest.raises(SpecError, match=r"k must|price must"):
        build_estimator(f"{spec}|raw")


def test_corrupted_codebooks_and_codes_are_refused():
    values = np.linspace(-1, 1, 30, dtype=np.float32)
    quantiser = Lloyd(k=4)
    good = quantiser.quantise(values, b"")
    for side in (b"", good.side[:-1], good.side + b"\0"):
        with pytest.raises(StreamError):
            quantiser.reconstruct(Quantised(good.symbols, side), values.shape, values.dtype, b"")
    for code in (-4, 4, 127):
        codes = good.symbols.copy()
        codes[3] = code
        with pytest.raises(StreamError, match="codebook"):
            quantiser.reconstruct(Quantised(codes, good.side), values.shape, values.dtype, b"")
    shared = Lloyd(k=4, shared=True)
    for side, codebook in ((good.side, b"\4" + good.side), (b"", b"\3" + good.side), (b"", b"\4")):
        with pytest.raises(StreamError):
            shared.reconstruct(Quantised(good.symbols, side), values.shape, values.dtype, codebook)
    with pytest.raises(StreamError, match="no level"):
        shared.reconstruct(Quantised(good.symbols, b""), values.shape, values.dtype, b"")
