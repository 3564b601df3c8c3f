import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.quantising import dead_zone
from kcomplex.training.quantising.codeq import CoDeQ
from kcomplex.training.quantising.dead_zone import DeadZoneQuantiser, Scheme, quantile_and_maximum
from tests.golden import golden_files

CPU = torch.device("cpu")

values = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=8),
    elements=st.floats(-100, 100, width=32).map(lambda value: value if abs(value) > 1e-20 else 0.0),
)


def quantiser(
    logit: float = 3.0,
    bits: int = 4,
    logit_bits: float | None = None,
    max_bits: int = 8,
    quantile: float = 0.99,
    reference: bool = False,
    per_channel: bool = False,
) -> DeadZoneQuantiser:
    scheme = Scheme(bits, max_bits, quantile, reference, per_channel)
    made = DeadZoneQuantiser(scheme, logit_bits is not None, logit, CPU)
    if logit_bits is not None:
        with torch.no_grad():
            made.logit_bits.fill_(logit_bits)
    return made


def files_with(key: str) -> list:
    """Return the golden files of one layout, which has an array whose name ends so."""
    return [
        pytest.param(file, id=file.stem)
        for file in golden_files("codeq_*.npz")
        if any(name.endswith(key) for name in np.load(file).files)
    ]


def golden_cases() -> list:
    cases = []
    for file in golden_files("codeq_*.npz"):
        with np.load(file) as arrays:
            for number in range(int(arrays["n_cases"]) if "n_cases" in arrays.files else 0):
                prefix = f"c{number:02d}_"
                case = {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
                cases.append(pytest.param(case, id=f"{file.stem}-{case['name']}"))
    return cases


@pytest.mark.parametrize("case", golden_cases())
def test_the_reference_gives_the_published_values_and_gradients(case):
    made = quantiser(
        float(case["logit_dz"]),
        int(case["fixed_bit"]),
        float(case["logit_bit"]) if case["learnable_bit"] else None,
        int(case["max_bits"]),
        reference=True,
    )
    weights = torch.tensor(case["w"], requires_grad=True)
    quantised = made(weights)
    (quantised * torch.tensor(case["upstream"])).sum().backward()
    # Half precision was quantised in its own arithmetic there and is in float32 here.
    half = weights.dtype == torch.float16
    absmax = float(case["absmax"])
    np.testing.assert_allclose(
        quantised.detach().double().numpy(),
        case["w_hat"].astype(np.float64),
        rtol=0,
        atol=(1e-3 if half else 2e-7) * absmax,
    )
    np.testing.assert_allclose(weights.grad.numpy(), case["grad_w"], rtol=1e-3 if half else 1e-4, atol=1e-6)
    integers = made.integers(weights.detach())
    assert integers.bits == case["bits"]
    np.testing.assert_array_equal(integers.symbols.numpy(), case["code"])
    if not half:
        assert float(integers.dead_zone) == pytest.approx(float(case["deadzone_width"]), rel=1e-5, abs=1e-7)
        assert float(integers.step) == pytest.approx(float(case["step"]), rel=1e-6)
    for logit, key in ((made.logit_dead_zone, "grad_logit_dz"), (made.logit_bits, "grad_logit_bit")):
        if logit is not None and not np.isnan(case[key]):
            assert logit.grad.item() == pytest.approx(float(case[key]), rel=5e-2 if half else 1e-4, abs=1e-7)


@pytest.mark.parametrize("path", files_with("deadzone_over_absmax"))
def test_the_reference_opens_as_published(path):
    arrays = np.load(path)
    absmax = torch.tensor(1.0)
    logits = torch.tensor(arrays["logit"])
    for key in arrays.files:
        if not key.startswith("bits_max"):
            continue
        scheme = Scheme(4, int(key.removeprefix("bits_max")), 0.99, True)
        grids = [scheme.grid(absmax, logit, logit) for logit in logits]
        assert [float(grid.bits) for grid in grids] == arrays[key].tolist()
        np.testing.assert_allclose(
            [float(grid.dead_zone) for grid in grids], arrays["deadzone_over_absmax"], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("path", files_with("_np_q99"))
def test_quantiles_are_the_published_ones(path):
    arrays = np.load(path)
    for key in arrays.files:
        if key.endswith("_x"):
            number = key.removesuffix("_x")
            for quantile, expected in ((0.99, arrays[f"{number}_q99"]), (0.5, arrays[f"{number}_q50"])):
                found, largest = quantile_and_maximum(torch.tensor(arrays[key]).reshape(1, -1), quantile)
                assert found.item() == pytest.approx(float(expected), rel=1e-6)
                assert largest.item() == arrays[key].max()


@settings(max_examples=60, deadline=None)
@given(
    magnitudes=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(0, 1e6, width=32)),
    quantile=st.floats(0, 1),
)
def test_quantiles_are_those_of_numpy(magnitudes, quantile):
    found, largest = quantile_and_maximum(torch.tensor(magnitudes).reshape(1, -1), quantile)
    assert largest == magnitudes.max()
    assert found.item() == pytest.approx(
        float(np.quantile(magnitudes.astype(np.float64), quantile)), rel=1e-5, abs=1e-30
    )


@settings(max_examples=100, deadline=None)
@given(values=values, bits=st.integers(2, 16), logit=st.floats(-3, 6), quantile=st.sampled_from([0.5, 0.99, 1.0]))
def test_values_are_levels_of_the_grid(values, bits, logit, quantile):
    weights = torch.from_numpy(values)
    made = quantiser(logit, bits, quantile=quantile)
    quantised = made(weights).detach()
    integers = made.integers(weights)
    top = 2 ** (bits - 1) - 1
    assert quantised.shape == weights.shape
    assert torch.equal(integers.values(), quantised)
    assert integers.symbols.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert int(integers.symbols.abs().max()) <= top
    assert quantised.contiguous().view(torch.int32).unique().numel() <= 2 * top + 1
    largest = weights.abs().max()
    if largest > 0:
        assert quantised.abs().max() <= largest * (1 + 1e-5)
        assert bool((quantised * weights >= 0).all())
        # What lies clearly inside the dead zone is zero, what lies clearly outside isn't.
        margin = 1e-4 * float(largest)
        assert (quantised[weights.abs() < integers.dead_zone / 2 - margin] == 0).all()
        assert (quantised[weights.abs() > integers.dead_zone / 2 + margin] != 0).all()


@settings(max_examples=40, deadline=None)
@given(values=values, scale=st.integers(-40, 40), logit=st.floats(0, 4))
def test_scaling_the_weights_scales_the_values(values, scale, logit):
    weights = torch.from_numpy(values).double()
    made = quantiser(logit)
    torch.testing.assert_close(made(weights * 2.0**scale), made(weights) * 2.0**scale, rtol=0, atol=0)


def straight_through(made: DeadZoneQuantiser, weights: torch.Tensor) -> torch.Tensor:
    """Return the quantised weights from elementary steps, for autograd to differentiate."""

    def passed(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return exact + (rounded - exact).detach()

    absmax = made.scheme.absmax(weights.detach().reshape(1, -1))[0]
    bits = torch.tensor(float(made.scheme.bits))
    if made.logit_bits is not None:
        bits = 2 + (made.scheme.max_bits - 2) * torch.sigmoid(2 * made.logit_bits - 3)
        bits = passed(bits, bits.round())
    top = 2 ** (bits - 1) - 1
    dead_zone = 2 * absmax * (1 - torch.sigmoid(2 * made.logit_dead_zone - 3))
    step = (absmax - dead_zone / 2) / (top - 0.5)
    shift = (dead_zone - step) / 2
    beyond = weights.abs() - shift
    sign = weights.sign().detach()
    position = sign * passed(beyond, beyond.relu()) / step
    kept = position.detach().abs().round().clamp(max=top.detach())
    # A clipped weight's position is the top level, whatever the logits; the weight itself still moves it.
    clipped = position.detach().abs() > top
    position = torch.where(clipped, sign * top + (weights - weights.detach()) / step.detach(), position)
    code = passed(position, sign * kept)
    level = passed(sign.detach() + 0 * position, sign * (kept > 0))
    return step * code + shift * level


@pytest.mark.parametrize("logit", [0.0, 0.7, 2.0, 3.0, -0.5])
@pytest.mark.parametrize("logit_bits", [None, 0.0, 1.2, 3.0])
def test_closed_form_gradients_are_those_of_the_elementary_steps(logit, logit_bits):
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upstream = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for function in (lambda made, w: made(w), straight_through):
        made = quantiser(logit, bits=3, logit_bits=logit_bits, max_bits=6, quantile=0.9)
        made.double()
        latent = weights.clone().requires_grad_()
        (function(made, latent) * upstream).sum().backward()
        gradients.append([latent.grad, *(parameter.grad for parameter in made.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    values=values,
    bits=st.none() | st.floats(-2, 5),
    logit=st.floats(-2, 5),
    per_channel=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_compiled_loops_do_what_the_tensor_operations_do(values, bits, logit, per_channel, dtype):
    weights = torch.from_numpy(values).to(dtype)
    upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    outcomes = []
    for compiled in (True, False):
        made = quantiser(logit, 3, bits, quantile=0.9, per_channel=per_channel)
        latent = weights.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(dead_zone, "_compiled", lambda *_: False)
            quantised = made(latent)
            (quantised * upstream).sum().backward()
            integers = made.integers(weights)
        assert torch.equal(integers.values(), quantised.detach())
        assert not torch.signbit(quantised[quantised == 0]).any()
        outcomes.append((quantised.detach(), latent.grad, *(logit.grad for logit in made.parameters())))
    scale = float(weights.abs().max())
    # A weight on the edge of a bin may fall on either side: one step, of one weight.
    differing = ~torch.isclose(outcomes[0][0].float(), outcomes[1][0].float(), atol=1e-5 * scale)
    if not differing.any():
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3, atol=1e-3 * scale)
    assert int(differing.sum()) <= 2


@pytest.mark.parametrize("compiled", [True, False])
def test_each_channel_is_quantised_as_if_it_were_alone(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(dead_zone, "_compiled", lambda *_: False)
    weights = (
        torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 10, 0.1, 0, 5])[:, None, None]
    )
    together = quantiser(1.5, bits=3, per_channel=True)
    alone = [quantiser(1.5, bits=3) for _ in weights]
    latent = weights.clone().requires_grad_()
    upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    (together(latent) * upstream).sum().backward()
    slope = 0.0
    for row, (made, part) in enumerate(zip(alone, weights, strict=True)):
        single = part.clone().requires_grad_()
        quantised = made(single)
        (quantised * upstream[row]).sum().backward()
        assert torch.equal(together(weights)[row], quantised)
        slope += made.logit_dead_zone.grad.item()
    assert together.logit_dead_zone.grad.item() == pytest.approx(slope, rel=1e-4)
    integers = together.integers(weights)
    assert integers.step.shape == (5,)
    assert torch.equal(integers.values(), together(weights))


def test_weights_that_are_zero_have_a_gradient_by_default_and_none_as_published():
    for reference, expected in ((False, [1.0, 1.0, 1.0]), (True, [0.0, 1.0, 0.0])):
        weights = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
        quantiser(reference=reference)(weights).sum().backward()
        assert weights.grad.tolist() == expected


def test_no_logit_is_a_dead_point():
    weights = torch.randn(100, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(100, generator=torch.Generator().manual_seed(1))
    for reference in (False, True):
        made = quantiser(0.0, logit_bits=0.0, reference=reference)
        (made(weights) * upstream).sum().backward()
        assert (made.logit_dead_zone.grad == 0) == reference
        assert (made.logit_bits.grad == 0) == reference


def test_opening_the_quantiser_narrows_the_dead_zone_and_adds_bits():
    scheme = Scheme(4, 8, 0.99, False)
    grids = [scheme.grid(torch.tensor(1.0), logit, logit) for logit in torch.linspace(-4, 6, 101)]
    dead_zones = [float(grid.dead_zone) for grid in grids]
    bits = [float(grid.bits) for grid in grids]
    assert dead_zones == sorted(dead_zones, reverse=True)
    assert bits == sorted(bits)
    assert (bits[0], bits[-1]) == (2.0, 8.0)
    zero, three = (scheme.grid(torch.tensor(1.0), torch.tensor(t), torch.tensor(t)) for t in (0.0, 3.0))
    assert (float(zero.bits), float(three.bits)) == (2.0, 8.0)
    assert float(zero.dead_zone) == pytest.approx(2 / (1 + math.exp(-3)))
    assert float(three.dead_zone) == pytest.approx(2 / (1 + math.exp(3)))


def test_a_tensor_almost_all_zeros_keeps_its_survivors():
    weights = torch.zeros(1000)
    weights[:3] = torch.tensor([1.0, -0.5, 0.25])
    quantised = quantiser()(weights).detach()
    torch.testing.assert_close(quantised[:3], weights[:3], rtol=0, atol=0.1)
    assert (quantised[3:] == 0).all()


def test_a_tensor_of_zeros_stays_and_can_leave():
    weights = torch.zeros(50, requires_grad=True)
    made = quantiser(logit_bits=2.0)
    quantised = made(weights)
    quantised.sum().backward()
    assert not quantised.any()
    assert not torch.signbit(quantised).any()
    assert (weights.grad == 1).all()
    assert made.logit_dead_zone.grad == 0
    assert made.logit_bits.grad == 0


def test_divergence_stays_visible():
    assert quantiser()(torch.tensor([1.0, float("nan"), 2.0])).isnan().any()


def test_weight_decay_on_the_logits_makes_zeros():
    torch.manual_seed(0)
    layer = nn.Linear(40, 40)
    configured = CoDeQ(dead_zone_lr=0.02, dead_zone_weight_decay=1.0)
    configured.prepare(layer)
    inputs = torch.randn(64, 40)
    targets = inputs @ (torch.randn(40, 40) * (torch.rand(40, 40) < 0.1))
    optimizer = torch.optim.AdamW(configured.parameter_groups(lr=0.01), lr=0.01)
    before = configured.report()["zeros"]
    for _ in range(150):
        optimizer.zero_grad()
        (layer(inputs) - targets).square().mean().backward()
        optimizer.step()
    assert before < 0.1
    assert configured.report()["zeros"] > 0.6


def test_groups_hold_the_logits_apart_with_their_own_rates():
    configured = CoDeQ(learnable_bits=True, dead_zone_lr=0.1, bits_lr=0.2, bits_weight_decay=0.3)
    configured.prepare(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    base, dead_zones, bits = configured.parameter_groups(lr=0.5, weight_decay=0.25)
    assert (base["lr"], base["weight_decay"], len(base["params"])) == (0.5, 0.25, 4)
    assert (dead_zones["lr"], dead_zones["weight_decay"], len(dead_zones["params"])) == (0.1, 1.0, 2)
    assert (bits["lr"], bits["weight_decay"], len(bits["params"])) == (0.2, 0.3, 2)


def test_fixed_precision_has_no_logits_of_bits():
    configured = CoDeQ(bits=3)
    model = nn.Linear(3, 3)
    configured.prepare(model)
    assert len(configured.parameter_groups(lr=0.1)) == 2
    assert configured.report()["bits"] == 3


def test_integers_are_the_weights_that_the_network_computes_with():
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 4)).to(torch.bfloat16)
    configured = CoDeQ(learnable_bits=True, initial_logit=1.0)
    configured.prepare(model)
    integers = configured.integers()
    assert list(integers) == ["0.weight", "1.weight"]
    for layer, tensor in zip(model, integers.values(), strict=True):
        assert torch.equal(tensor.values(), layer.weight)
        assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "name"),
    [({"bits": 1}, "bits"), ({"bits": 17}, "bits"), ({"max_bits": 2}, "max_bits"), ({"quantile": 0.0}, "quantile")],
)
def test_senseless_options_are_refused(options, name):
    with pytest.raises(SpecError, match=name):
        CoDeQ(**options)
