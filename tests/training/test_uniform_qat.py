import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.quantising.uniform_qat import UniformQAT, quantise_uniformly
from tests.golden import golden_files

tensors = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=6),
    elements=st.floats(-100, 100, width=32).map(lambda value: value if abs(value) > 1e-20 else 0.0),
)


def distinct_bit_patterns(values: torch.Tensor) -> int:
    return values.contiguous().view(torch.int32).unique().numel()


def golden_cases() -> list:
    cases = []
    for file in golden_files("uniform_qat*.npz"):
        with np.load(file) as arrays:
            for prefix in sorted({key.split("_")[0] for key in arrays.files if key.endswith("_w_hat")}):
                case = {
                    key.removeprefix(f"{prefix}_"): arrays[key] for key in arrays.files if key.startswith(f"{prefix}_")
                }
                cases.append(pytest.param(case, id=f"{file.stem}-{prefix}-{case['name']}-{case['bits']}"))
    return cases


@pytest.mark.parametrize("case", golden_cases())
def test_values_and_gradients_are_the_published_ones(case):
    weights = torch.tensor(case["w"], requires_grad=True)
    quantised = quantise_uniformly(weights, int(case["bits"]))
    (quantised * torch.tensor(case["upstream"])).sum().backward()
    largest = float(np.abs(case["w"]).max())
    np.testing.assert_allclose(quantised.detach().numpy(), case["w_hat"], rtol=0, atol=2e-7 * largest)
    np.testing.assert_allclose(weights.grad.numpy(), case["grad_w"], rtol=0, atol=3e-7)


@settings(max_examples=60, deadline=None)
@given(values=tensors, bits=st.integers(2, 10), per_channel=st.booleans())
def test_values_are_multiples_of_the_scale(values, bits, per_channel):
    weights = torch.from_numpy(values)
    quantised = quantise_uniformly(weights, bits, per_channel)
    assert quantised.shape == weights.shape
    rows = list(zip(weights, quantised, strict=True)) if per_channel and weights.ndim else [(weights, quantised)]
    top = 2 ** (bits - 1) - 1
    for row, its_values in rows:
        scale = row.abs().max() / top
        codes = torch.round(its_values / scale) if scale > 0 else torch.zeros_like(row)
        assert torch.equal(codes * scale, its_values)
        assert codes.abs().max() <= top
        assert distinct_bit_patterns(its_values) <= 2**bits - 1
        # Half a step, and what float32 rounds in dividing and multiplying.
        assert bool(((row - its_values).abs() <= scale * (0.5 + 1e-5)).all())


def test_the_gradient_passes_straight_through():
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    upstream = torch.arange(20.0).reshape(5, 4)
    (quantise_uniformly(weights, 3) * upstream).sum().backward()
    assert torch.equal(weights.grad, upstream)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_zeros_stay_positive_zeros(shape):
    assert torch.signbit(quantise_uniformly(-torch.zeros(shape), 4)).sum() == 0
    assert torch.signbit(quantise_uniformly(torch.tensor([-0.01, 1.0]), 4)).sum() == 0


def test_an_empty_tensor_stays_empty():
    assert quantise_uniformly(torch.zeros(0, 3), 4).shape == (0, 3)


def test_full_precision_leaves_the_weights_as_they_are():
    weights = torch.randn(7)
    assert quantise_uniformly(weights, 32) is weights


def test_divergence_stays_visible():
    assert quantise_uniformly(torch.tensor([1.0, float("nan")]), 4).isnan().all()


def test_each_row_has_its_own_scale():
    weights = torch.tensor([[1.0, 0.4], [100.0, 30.0]])
    assert quantise_uniformly(weights, 2, per_channel=True).tolist() == [[1.0, 0.0], [100.0, 0.0]]
    assert quantise_uniformly(weights, 2).tolist() == [[0.0, 0.0], [100.0, 0.0]]


def test_converted_weights_have_no_more_values_than_the_bits_allow():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5))
    configured = UniformQAT(bits=3)
    configured.prepare(model)
    for layer in configured.convert(model):
        assert distinct_bit_patterns(layer.weight.detach()) <= 7
        assert type(layer) is nn.Linear


@pytest.mark.parametrize("bits", [1, 0, -4, 33])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(SpecError, match="bits"):
        UniformQAT(bits=bits)
