import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.pruning import layerwise
from kcomplex.training.pruning.layerwise import Layerwise, expected_objective, probabilities

FORMS = ["projected", "sigmoid"]


def test_the_objective_is_the_expectation_over_all_masks():
    double = torch.float64
    weights = torch.tensor([[0.13, -0.13, -0.54], [0.64, 0.10, 0.36]], dtype=double)
    kept = torch.tensor([[0.2, 0.9, 0.4], [0.5, 0.7, 1.0]], dtype=double)
    inputs = torch.tensor([[1, -2, 0.5], [0.3, 0.8, -1], [1, 1, 1]], dtype=double)
    target = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0, -0.5]], dtype=double)
    expected = 0.0
    for bits in itertools.product((0, 1), repeat=6):
        mask = torch.tensor(bits, dtype=double).reshape(2, 3)
        chance = torch.where(mask == 1, kept, 1 - kept).prod()
        expected += chance * ((target - weights * mask @ inputs).square().sum() + 0.1 * mask.sum())
    closed = expected_objective(weights, kept, inputs @ inputs.T, target @ inputs.T, target.square().sum(), price=0.1)
    assert closed.item() == pytest.approx(expected.item(), abs=1e-12)
    assert closed.item() == pytest.approx(2.4620899, abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_what_is_worth_its_price(form):
    # With independent inputs, a weight is worth its square times the mean square of its input.
    weights = torch.tensor([[0.5, -0.1, 0.3, 0.0, 2.0]])
    gram = torch.diag(torch.tensor([1.0, 1.0, 4.0, 1.0, 0.01]))
    kept = probabilities(weights, gram, 0.1, form, 0.3, 2000)
    assert kept.tolist() == [[1, 0, 1, 0, 0]]
    assert probabilities(weights, gram, 0.0, form, 0.3, 2000).tolist() == [[1, 1, 1, 0, 1]]


def test_of_two_weights_that_do_the_same_one_is_not_enough_and_none_is_too_few():
    weights = torch.tensor([[1.0, -0.999]])
    # They cancel, so that both can go together.
    assert probabilities(weights, torch.ones(2, 2), 0.01, "projected", 0.3, 2000).tolist() == [[0, 0]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 2, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}],
)
def test_the_moments_of_a_convolution_give_the_change_of_its_outputs(options, bias, monkeypatch):
    monkeypatch.setattr(layerwise, "_CHUNK", 3000)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, bias=bias, **options).double()
    images = torch.randn(7, 2, 9, 8, dtype=torch.float64)
    gram, samples = layerwise._grams({"layer": layer}, lambda: layer(images))["layer"]
    assert samples == 7
    matrix = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1) if bias else layer.weight.flatten(1)
    kept = (torch.rand(matrix.shape) > 0.5).double()
    gram = gram[: matrix.shape[1], : matrix.shape[1]]
    cross = matrix @ gram
    change = expected_objective(matrix, kept, gram, cross, (cross * matrix).sum(), 0.0)
    before = layer(images)
    with torch.no_grad():
        layer.weight.mul_(kept[:, :18].reshape(layer.weight.shape))
        if bias:
            layer.bias.mul_(kept[:, 18])
    torch.testing.assert_close(change, (before - layer(images)).square().sum())


def trained(convolution: bool = True) -> tuple[nn.Sequential, torch.Tensor]:
    """Return a network in which some weights matter and others hardly do, with inputs."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()] if convolution else [nn.Flatten()]
    model = nn.Sequential(*first, nn.Linear(64 if convolution else 36, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= torch.where(torch.rand(parameter.shape) < 0.5, 0.02, 1.0)
    return model, torch.randn(64, 1, 6, 6)


def evaluation(model: nn.Module, inputs: torch.Tensor) -> Callable[[], float]:
    """Return an evaluation that tolerates no further pruning by magnitude."""

    def evaluate() -> float:
        model(inputs)
        return float(sum((parameter == 0).sum() for parameter in model.parameters()))

    return evaluate


@pytest.mark.parametrize(
    ("form", "include", "cleaning"),
    [("projected", (), "none"), ("projected", ("*",), "graph"), ("sigmoid", ("*",), "none")],
)
def test_the_network_is_pruned_and_computes_almost_the_same(form, include, cleaning):
    model, inputs = trained()
    expected = model(inputs).detach()
    configured = Layerwise(alpha=1e-5, form=form, include=include, cleaning=cleaning, tolerance=0.0)
    configured.prepare(model)
    configured.begin_fine_tuning(evaluation(model, inputs))
    error = (model(inputs) - expected).square().mean() / expected.square().mean()
    zeros = configured.report()["zeros"]
    assert 0.3 < zeros < 0.9
    # Sigmoids begin with nothing and often stay where less is explained.
    assert error < (0.1 if form == "projected" else 0.4)
    if not include:
        assert all((model.get_parameter(name) != 0).all() for name in ("0.bias", "3.bias", "5.bias"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    configured.after_step()
    assert configured.report()["zeros"] == zeros


@pytest.mark.parametrize("form", FORMS)
def test_a_higher_price_leaves_fewer_weights(form):
    zeros = []
    for alpha in (1e-5, 1e-2, 10.0):
        model, inputs = trained(convolution=False)
        configured = Layerwise(alpha=alpha, form=form, tolerance=0.0, steps=300)
        configured.prepare(model)
        configured.begin_fine_tuning(evaluation(model, inputs))
        zeros.append(configured.report()["zeros"])
    assert zeros[0] < zeros[1] < zeros[2] == 1.0


def test_training_is_plain():
    configured = Layerwise(alpha=1e-3)
    configured.prepare(trained()[0])
    assert configured.penalty().item() == 0


@pytest.mark.parametrize(
    ("model", "include", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3)), (), "Embedding"),
        (nn.Conv2d(4, 4, 3, groups=2), (), "ungrouped"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), ("*",), "BatchNorm1d"),
        (nn.Sequential(nn.Linear(3, 3)), ("*.bias",), "without"),
    ],
)
def test_other_layers_are_refused_and_the_mode_stays_free(model, include, message):
    configured = Layerwise(alpha=1e-3, include=include)
    with pytest.raises(SpecError, match=message):
        configured.prepare(model)
    with pytest.raises(SpecError, match="prepare"):
        configured.report()


def test_a_layer_that_the_evaluation_leaves_out_is_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    configured = Layerwise(alpha=1e-3)
    configured.prepare(model)
    with pytest.raises(SpecError, match="unused"):
        configured.begin_fine_tuning(lambda: float(model["used"](torch.ones(1, 3)).detach().sum()))


@pytest.mark.parametrize("options", [{"form": "soft"}, {"start": 1.5}, {"steps": 0}])
def test_senseless_options_are_refused(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        Layerwise(**options)
