import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.pruning.fpp import FPP
from kcomplex.training.pruning.pmmp import PMMP


def single(values: list[float]) -> nn.Linear:
    """Return a layer whose weights are these values."""
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


def companions(configured: PMMP) -> dict[str, torch.Tensor]:
    return configured.state_dict()["companions"]["weight"]


def test_gradients_are_those_of_the_saddle_function():
    layer = single([0.5]).double()
    configured = PMMP(alpha=0.01, u0=2.0, p0=0.6)
    configured.prepare(layer)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    w, gamma, u = (group["params"][0] for group in configured.parameter_groups(lr=0.1)[1:])
    with torch.no_grad():
        w.fill_(0.8)
    (0.1 * layer.weight.sum() + configured.penalty()).backward()
    assert layer.weight.grad.item() == pytest.approx(0.18)
    assert w.grad.item() == pytest.approx(0.72)
    assert gamma.grad.item() == pytest.approx(-0.31)
    assert u.grad.item() == pytest.approx(0.154)


@pytest.mark.parametrize("method", [PMMP, FPP])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_compiled_loop_computes_what_tensor_operations_do(method, dtype, monkeypatch):
    def slopes() -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 5, 3).to(dtype, memory_format=torch.channels_last)
        configured = method(alpha=0.03, u0=0.5, p0=0.7)
        configured.prepare(layer)
        with torch.no_grad():
            layer.weight.mul_(3)
        tensors = [layer.weight, *(group["params"][0] for group in configured.parameter_groups(lr=0.1)[1:])]
        penalty = configured.penalty()
        return [penalty.detach(), *torch.autograd.grad(2 * penalty, tensors)]

    compiled = slopes()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, theirs in zip(compiled, slopes(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5 if dtype.itemsize > 2 else 1e-2)


def test_curvature_is_that_of_the_saddle_function():
    layer = single([0.5, -0.2]).double()
    configured = PMMP(alpha=0.01, u0=2.0, p0=0.6)
    configured.prepare(layer)
    weights = layer.weight
    direction = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    # Of a sum, as in training: the gradient that reaches the penalty is a constant.
    (slope,) = torch.autograd.grad((weights**3).sum() + configured.penalty(), weights, create_graph=True)
    (product,) = torch.autograd.grad((slope * direction).sum(), weights)
    torch.testing.assert_close(product, (6 * weights.detach() + 2 * 2.0) * direction)


def test_gradients_agree_with_differentiating_the_published_form():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    configured = PMMP(alpha=0.03)
    configured.prepare(model)
    groups = configured.parameter_groups(lr=0.1)
    with torch.no_grad():
        for group in groups[1:]:
            for tensor in group["params"]:
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    mine = [model[0].weight, model[1].weight, *(tensor for group in groups[1:] for tensor in group["params"])]
    expected = sum(
        (0.03 * gamma + u * ((theta - w * gamma) ** 2 + w**2 * gamma * (1 - gamma))).sum()
        for theta, w, gamma, u in zip(*(mine[start : start + 2] for start in range(0, 8, 2)), strict=True)
    )
    penalty = configured.penalty()
    assert penalty.item() == pytest.approx(expected.item())
    for ours, theirs in zip(
        torch.autograd.grad(3 * penalty, mine), torch.autograd.grad(3 * expected, mine), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_five_steps_of_gradient_descent_are_the_published_ones():
    layer = single([0.3]).double()
    with torch.no_grad():
        layer.weight.fill_(0.3)
    configured = PMMP(alpha=0.5, u0=0.0, gamma_lr=0.1, u_lr=0.1)
    configured.prepare(layer)
    optimizer = torch.optim.SGD(configured.parameter_groups(lr=0.1), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        ((layer.weight - 1).square().sum() + configured.penalty()).backward()
        optimizer.step()
        configured.after_step()
    assert layer.weight.item() == pytest.approx(0.76719665, abs=1e-8)
    parts = {key: tensor.item() for key, tensor in companions(configured).items()}
    assert parts == pytest.approx({"w": 0.30262319, "gamma": 0.75134526, "u": 0.05134004}, abs=1e-8)


@pytest.mark.parametrize(("u0", "kept"), [(1.0, [0, 0, 1, 1, 1]), (0.0, [0, 0, 1, 1, 0]), (2.0, [0, 1, 1, 1, 1])])
def test_training_keeps_what_is_worth_its_price(u0, kept):
    wanted = torch.tensor([[0.05, 0.2, 0.5, 1.0, -0.3]])
    layer = single(wanted[0].tolist())
    configured = PMMP(alpha=0.05, u0=u0, gamma_lr=0.01, u_lr=0.01)
    configured.prepare(layer)
    optimizer = torch.optim.Adam(configured.parameter_groups(lr=0.01), lr=0.01)
    for _ in range(5000):
        optimizer.zero_grad()
        ((layer.weight - wanted).square().sum() + configured.penalty()).backward()
        optimizer.step()
        configured.after_step()
    gamma = companions(configured)["gamma"][0]
    torch.testing.assert_close(gamma, torch.tensor(kept, dtype=torch.float32), atol=0.02, rtol=0)
    # Before anything is pruned, gamma decides what a converted model keeps.
    assert (configured.convert(layer).weight != 0).int().tolist() == [kept]
    assert (layer.weight != 0).all()


@pytest.mark.parametrize(
    "options",
    [{"alpha": -1.0}, {"samples": 0}, {"p0": 1.5}, {"u0": -1.0}, {"gamma_lr": math.nan}, {"bits_per_parameter": -2.0}],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        PMMP(**options)


def test_probabilities_and_multipliers_stay_in_their_range():
    layer = single([0.001, 2.0])
    configured = PMMP(alpha=1.0, gamma_lr=5.0, u_lr=5.0)
    configured.prepare(layer)
    optimizer = torch.optim.SGD(configured.parameter_groups(lr=0.5), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        configured.penalty().backward()
        optimizer.step()
        configured.after_step()
        parts = companions(configured)
        assert ((parts["gamma"] >= 0) & (parts["gamma"] <= 1)).all()
        assert (parts["u"] >= 0).all()


def test_the_mode_adds_nothing_to_the_models_own_state():
    layer = single([0.1, 0.2])
    PMMP(alpha=0.1).prepare(layer)
    assert list(layer.state_dict()) == ["weight"]


def test_the_multipliers_alone_are_maximised_and_nothing_of_the_modes_own_decays():
    configured = PMMP(alpha=0.1, gamma_lr=0.3, u_lr=0.4)
    configured.prepare(nn.Linear(3, 3))
    base, *own = configured.parameter_groups(lr=0.2, weight_decay=0.5)
    assert base["weight_decay"] == 0.5
    assert len(base["params"]) == 2
    assert [group["lr"] for group in own] == [0.2, 0.3, 0.4]
    assert [group["maximize"] for group in own] == [False, False, True]
    assert [group["weight_decay"] for group in own] == [0.0, 0.0, 0.0]


def test_a_higher_price_leaves_fewer_weights():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 20, generator=generator)
    labels = (inputs[:, 0] - inputs[:, 1]).unsqueeze(1)
    kept = []
    for alpha in (0.001, 0.03, 1.0):
        torch.manual_seed(0)
        layer = nn.Linear(20, 1)
        configured = PMMP(alpha=alpha, gamma_lr=0.02, u_lr=0.02)
        configured.prepare(layer)
        optimizer = torch.optim.Adam(configured.parameter_groups(lr=0.02), lr=0.02)
        for _ in range(250):
            optimizer.zero_grad()
            ((layer(inputs) - labels).square().mean() + configured.penalty()).backward()
            optimizer.step()
            configured.after_step()
        kept.append(int((configured.convert(layer).weight != 0).sum()))
    assert all(more > less for more, less in pairwise(kept)), kept
    assert kept[1] >= 2
