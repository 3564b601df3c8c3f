import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcomplex.compressors.quantisers.deadzone import DeadZone
from kcomplex.compressors.quantisers.grid import Grid
from kcomplex.compressors.quantisers.sign import Sign
from kcomplex.compressors.quantisers.uniform import Uniform
from kcomplex.errors import SpecError, StreamError, WeightsError
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.measuring.measure import describe
from kcomplex.measuring.stream import decode_checkpoint, encode_checkpoint, prove
from kcomplex.weights import values_of, words_of

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
SPECS = [
    "uniform",
    "uniform:bits=2",
    "uniform:bits=16,per_row=True",
    "uniform:bits=4,per_row=True",
    "deadzone",
    "deadzone:bits=2,zeros=0.9",
    "deadzone:bits=12,zeros=None",
    "deadzone:zeros=0.0",
    "deadzone:bits=3,zeros=0.5,per_row=True",
    "sign",
    "sign:per_row=True",
    "grid:step=0.25",
    "grid:step=0.25,trellis=False",
    "grid:step=0.25,trellis=False,price=0",
    "grid:step=0.25,trellis=False,price=0,rounding=0.2",
]
QUANTISERS = [
    Uniform(),
    Uniform(bits=2),
    Uniform(bits=16),
    Uniform(bits=5, per_row=True),
    DeadZone(),
    DeadZone(bits=2, zeros=0.9),
    DeadZone(bits=12, zeros=None),
    DeadZone(zeros=0.0),
    DeadZone(zeros=0.6, per_row=True),
    DeadZone(zeros=None, per_row=True),
    Sign(),
    Sign(per_row=True),
    Grid(step=0.5),
    Grid(step=1e-60),
    Grid(step=0.5, trellis=False),
    Grid(step=1e30, trellis=False, price=0),
    Grid(step=0.5, trellis=False, price=0, rounding=0.2),
]


def arrays(dtype: type, elements: st.SearchStrategy) -> st.SearchStrategy:
    return hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), elements=elements)


def finite(width: int) -> st.SearchStrategy:
    return st.floats(allow_nan=False, allow_infinity=False, width=width)


any_values = st.one_of(arrays(np.float32, finite(32)), arrays(np.float64, finite(64)))
plain_numbers = st.floats(-8, 8, width=32).map(lambda value: value if abs(value) > 1e-20 else 0.0)
plain_values = st.one_of(arrays(np.float32, plain_numbers), arrays(np.float64, plain_numbers))


def back(quantiser: Quantiser, values: np.ndarray) -> np.ndarray:
    return quantiser.reconstruct(quantiser.quantise(values, b""), values.shape, values.dtype, b"")


@pytest.mark.parametrize("quantiser", QUANTISERS, ids=repr)
@settings(max_examples=60, deadline=None)
@given(values=any_values)
def test_every_finite_tensor_is_quantised(quantiser, values):
    quantised = quantiser.quantise(values, b"")
    assert isinstance(quantised.symbols, np.ndarray)
    assert quantised.symbols.shape == values.shape
    decoded = quantiser.reconstruct(quantised, values.shape, values.dtype, b"")
    assert isinstance(decoded, np.ndarray)
    assert (decoded.shape, decoded.dtype) == (values.shape, values.dtype)
    assert np.isfinite(decoded).all()
    assert not np.signbit(decoded[decoded == 0]).any()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("coder", ["raw", "zstd"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_decoded_is_what_the_codes_stand_for(spec, coder, dtype):
    generator = torch.Generator().manual_seed(0)
    source = {
        "empty": torch.zeros(0, 3),
        "matrix": torch.randn(7, 5, generator=generator),
        "number": torch.tensor(-0.3),
        "steps": torch.arange(6),
        "zeros": torch.zeros(4),
    }
    source = {name: value.to(dtype) if value.is_floating_point() else value for name, value in source.items()}
    code = f"{spec}|{coder}"
    data = encode_checkpoint(source, code)
    (description,) = describe(source, code)
    assert description.value == 8 * len(data)
    prove(source, description)
    decoded = decode_checkpoint(data)
    assert torch.equal(decoded["steps"], source["steps"])
    quantiser = build_estimator(code).quantiser
    for name, value in source.items():
        if value.is_floating_point():
            values = values_of(value)
            expected = torch.from_numpy(np.ascontiguousarray(back(quantiser, values))).to(dtype).reshape(value.shape)
            assert decoded[name].dtype == dtype
            assert words_of(decoded[name]).tolist() == words_of(expected).tolist()


@settings(max_examples=150, deadline=None)
@given(values=any_values, bits=st.integers(2, 16), per_row=st.booleans())
def test_quantising_twice_is_quantising_once(values, bits, per_row):
    quantiser = Uniform(bits, per_row)
    once = quantiser.quantise(values, b"")
    again = quantiser.quantise(quantiser.reconstruct(once, values.shape, values.dtype, b""), b"")
    np.testing.assert_array_equal(once.symbols, again.symbols)


@settings(max_examples=100, deadline=None)
@given(values=plain_values, bits=st.integers(2, 16))
def test_uniform_is_within_half_a_step(values, bits):
    largest = np.abs(values).max(initial=0)
    step = largest / (2 ** (bits - 1) - 1)
    # Half a step, and what the values' own precision rounds.
    allowed = step / 2 + 4 * np.finfo(values.dtype).eps * largest
    assert (np.abs(back(Uniform(bits), values) - values) <= allowed).all()


@settings(max_examples=100, deadline=None)
@given(values=plain_values, bits=st.integers(2, 16), zeros=st.none() | st.floats(0, 0.99))
def test_dead_zones_hold_the_share_of_zeros_and_keep_the_rest_close(values, bits, zeros):
    quantiser = DeadZone(bits, zeros)
    decoded = back(quantiser, values)
    magnitudes = np.abs(values)
    gone = decoded == 0
    slack = 8 * np.finfo(values.dtype).eps * magnitudes.max(initial=0)
    assert (gone[values == 0]).all()
    assert (decoded[~gone] * values[~gone] > 0).all()
    if values.size:
        rank = None if zeros is None else min(int(zeros * values.size), values.size - 1)
        largest = magnitudes.max()
        threshold = largest / (2**bits - 1) if rank is None else np.sort(magnitudes, axis=None)[rank]
        assert (gone == ((magnitudes < threshold) | (values == 0)))[np.abs(magnitudes - threshold) > slack].all()
        if rank is not None:
            assert (gone & (values != 0)).sum() <= zeros * values.size
        step = (largest - threshold) / (2 ** (bits - 1) - 1)
        assert (np.abs(decoded - values)[~gone] <= step / 2 + slack).all()


def test_the_share_of_zeros_is_met():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for zeros in (0.0, 0.25, 0.7, 0.999):
        assert (back(DeadZone(bits=4, zeros=zeros), values) == 0).mean() == zeros


def test_the_share_of_zeros_is_met_in_every_row():
    scales = np.logspace(-2, 2, 5, dtype=np.float32)[:, None]
    values = scales * np.random.default_rng(0).standard_normal((5, 200)).astype(np.float32)
    assert (back(DeadZone(zeros=0.7, per_row=True), values) == 0).mean(axis=1).tolist() == [0.7] * 5


def test_a_dead_zone_without_a_share_is_as_wide_as_a_step():
    decoded = back(DeadZone(bits=3, zeros=None), np.linspace(-7, 7, 1401))
    np.testing.assert_allclose(np.unique(decoded), np.arange(-3, 4) * 2.0)


@settings(max_examples=100, deadline=None)
@given(values=plain_values)
def test_signs_are_kept_with_the_mean_magnitude(values):
    decoded = back(Sign(), values)
    mean = np.abs(values).mean(dtype=np.float64) if values.size else 0.0
    np.testing.assert_allclose(np.abs(decoded), np.full(values.shape, mean), rtol=1e-5)
    assert ((decoded > 0) == (values > 0)).all()


def test_rows_have_their_own_scales_and_vectors_keep_one():
    table = np.array([[1.0, -0.5], [100.0, 20.0]], np.float32)
    np.testing.assert_allclose(back(Uniform(8, per_row=True), table), table, rtol=0.02)
    assert back(Sign(per_row=True), table).tolist() == [[0.75, -0.75], [60.0, 60.0]]
    np.testing.assert_allclose(back(DeadZone(8, 0.0, per_row=True), table), table, rtol=0.02)
    for quantiser, scales in ((Uniform(per_row=True), 1), (Sign(per_row=True), 1), (DeadZone(per_row=True), 2)):
        assert len(quantiser.quantise(table, b"").side) == 8 * scales
        assert len(quantiser.quantise(table[0], b"").side) == 4 * scales
        assert len(quantiser.quantise(table.astype(np.float64), b"").side) == 16 * scales


def test_more_bits_leave_less_error():
    weights = {"w": torch.randn(500, generator=torch.Generator().manual_seed(0))}
    errors = [describe(weights, f"uniform:bits={bits}|zstd")[0].distortion for bits in (2, 4, 8, 12, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_a_uniformly_quantised_network_is_kept_exactly():
    scale = torch.tensor(0.25)
    weights = {"w": scale * torch.randint(-7, 8, (40,)), "top": scale * torch.tensor([7.0, -7.0])}
    described = describe({"w": torch.cat(list(weights.values()))}, "uniform:bits=4|raw")[0]
    assert described.lossless


@pytest.mark.parametrize("quantiser", QUANTISERS, ids=repr)
@pytest.mark.parametrize("damage", ["short", "long", "nan", "inf", "negative"])
def test_corrupted_scales_are_refused(quantiser, damage):
    values = np.ones((3, 2), np.float32)
    quantised = quantiser.quantise(values, b"")
    wrong = {"nan": np.nan, "inf": np.inf, "negative": -1.0}
    side = {"short": quantised.side[:-1], "long": quantised.side + b"\0"}.get(damage)
    if side is None:
        side = np.array([wrong[damage]], "<f4").tobytes() + quantised.side[4:]
    with pytest.raises(StreamError):
        quantiser.reconstruct(Quantised(quantised.symbols, side), values.shape, values.dtype, b"")


@pytest.mark.parametrize(
    ("quantiser", "code"),
    [(Uniform(bits=4), 8), (Uniform(bits=8), -128), (DeadZone(bits=2), 2), (DeadZone(bits=4), -8), (Sign(), 2)],
    ids=repr,
)
def test_impossible_codes_are_refused(quantiser, code):
    values = np.ones(3, np.float32)
    quantised = quantiser.quantise(values, b"")
    quantised.symbols[1] = code
    with pytest.raises(StreamError, match="corrupted"):
        quantiser.reconstruct(quantised, values.shape, values.dtype, b"")


@pytest.mark.parametrize("spec", ["uniform", "deadzone", "sign", "grid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_cant_be_quantised(spec, value):
    with pytest.raises(WeightsError, match="'w'"):
        describe({"w": torch.tensor([1.0, value])}, f"{spec}|raw")


@pytest.mark.parametrize(
    "spec",
    [
        "uniform:bits=1",
        "uniform:bits=17",
        "deadzone:bits=1",
        "deadzone:bits=17",
        "deadzone:zeros=1",
        "deadzone:zeros=-1",
        "grid:step=0",
        "grid:step=inf",
        "grid:price=-1",
        "grid:price=nan",
        "grid:rounding=0.6,trellis=False,price=0",
        "grid:rounding=0.3",
    ],
)
def test_senseless_options_are_refused(spec):
    with pytest.raises(SpecError, match=r"bits|zeros|step|price|rounding"):
        build_estimator(f"{spec}|raw")


@pytest.mark.parametrize("spec", SPECS)
def test_specifications_build_the_quantisers_again(spec):
    built = build_estimator(f"{spec}|raw")
    assert build_estimator(built.spec) == built
