"""Weights without influence, and units without use: what is removed changes no output."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.training.pruning.drr import DRR
from kcomplex.training.shrinking.chain import links_of
from kcomplex.training.shrinking.dead_units import remove_dead_units
from kcomplex.training.shrinking.random_gradients import without_gradient
from kcomplex.training.shrinking.reachability import unreachable


def golden() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -1], [0, 0], [0.7, 0.2], [0, 0]]))
        model[0].bias.copy_(torch.tensor([0.1, 0.3, -0.2, 0]))
        model[2].weight.copy_(torch.tensor([[1.5, -0.8, 0, 0.6]]))
        model[2].bias.fill_(0.05)
        # Exactly, where float32 wasn't.
        for parameter in model.parameters():
            parameter.copy_((parameter * 1000).round() / 1000)
    return model


@pytest.mark.parametrize("find", [unreachable, lambda model: without_gradient(model, (1, 2))])
def test_what_has_no_influence_is_found(find):
    masks = {name: mask.tolist() for name, mask in find(golden()).items()}
    assert masks == {
        "0.weight": [[False] * 2, [False] * 2, [True] * 2, [False] * 2],
        "0.bias": [False, False, True, False],
        "2.weight": [[False, False, False, True]],
        "2.bias": [False],
    }


def test_the_constant_unit_goes_into_the_bias_and_one_unit_is_left():
    model = golden()
    shrunk = remove_dead_units(model)
    assert shrunk.units == {"0": 1, "2": 1}
    assert shrunk.removed == {"0": 3, "2": 0}
    smaller = shrunk.model
    assert smaller[0].weight.tolist() == [[0.5, -1.0]]
    assert smaller[2].bias.item() == pytest.approx(-0.18305009, abs=1e-8)
    inputs = torch.tensor([[0.4, -0.7]], dtype=torch.float64)
    assert smaller(inputs).item() == pytest.approx(0.95934114, abs=1e-8)
    assert model[0].weight.shape == (4, 2)
    assert (smaller[0].out_features, smaller[2].in_features) == (1, 1)


def convolutional(padding: int = 1, norm: bool = True, bias: bool = True, average: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=bias),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=1) if average else nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 5, 3, padding=padding, bias=bias), nn.Sigmoid()),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(5 * (5 if average else 4) ** 2 if padding else 5 * (3 if average else 2) ** 2, 8, bias=bias),
        nn.BatchNorm1d(8) if norm else nn.Identity(),
        nn.GELU(),
        nn.Linear(8, 3, bias=bias),
        nn.LogSoftmax(1),
    )


def sparse(model: nn.Module, seed: int, share: float) -> nn.Module:
    """Zero random weights, and whole rows and columns of them, and give batch norms something to do."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(-1, 1, generator=generator)
            if parameter.ndim > 1:
                parameter *= torch.rand(parameter.shape, generator=generator) > share
                parameter[torch.rand(len(parameter), generator=generator) < 0.3] = 0
                parameter[:, torch.rand(parameter.shape[1], generator=generator) < 0.3] = 0
            elif "bias" in name:
                parameter *= torch.rand(parameter.shape, generator=generator) > 0.5
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.uniform_(-1, 1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    options=st.fixed_dictionaries(
        {"padding": st.sampled_from([0, 1]), "norm": st.booleans(), "bias": st.booleans(), "average": st.booleans()}
    ),
)
def test_removing_changes_no_output_and_nothing_is_left_to_remove(seed, share, options):
    torch.manual_seed(seed)
    model = sparse(convolutional(**options), seed, share)
    inputs = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    expected = model(inputs).detach()
    cleaned = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in unreachable(cleaned).items():
            cleaned.get_parameter(name).masked_fill_(mask, 0)
    torch.testing.assert_close(cleaned(inputs), expected, rtol=1e-12, atol=1e-12)
    shrunk = remove_dead_units(model)
    torch.testing.assert_close(shrunk.model(inputs), expected, rtol=1e-9, atol=1e-9)
    for link in links_of(shrunk.model):
        assert link.units == shrunk.units[link.name] >= 1
    again = remove_dead_units(shrunk.model)
    assert not any(again.removed.values())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.5, 0.9]))
def test_random_gradients_find_whatever_the_graph_finds(seed, share):
    model = sparse(convolutional(), seed, share)
    by_graph, by_gradients = unreachable(model), without_gradient(model, (3, 2, 8, 8), draws=2, seed=seed)
    for name, mask in by_graph.items():
        assert (by_gradients[name] | ~mask).all(), name


def test_removing_a_channel_shrinks_everything_around_it():
    model = convolutional().double().eval()
    with torch.no_grad():
        model[4][0].weight[:, 2] = 0
        model[7].weight.reshape(8, 5, 16)[:, 3] = 0
    shrunk = remove_dead_units(model)
    assert shrunk.removed == {"0": 1, "4.0": 1, "7": 0, "10": 0}
    smaller = shrunk.model
    assert (smaller[0].out_channels, smaller[1].num_features, smaller[4][0].in_channels) == (5, 5, 5)
    assert smaller[4][0].weight.shape == (4, 5, 3, 3)
    assert (smaller[7].in_features, smaller[7].weight.shape) == (64, (8, 64))
    # A network of the smaller widths takes the weights.
    smaller.train()(torch.randn(3, 2, 8, 8, dtype=torch.float64)).sum().backward()


def test_a_constant_map_stays_where_padding_would_show():
    model = convolutional(padding=1, norm=False).double()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.7
        model[0].weight[2] = 0
        model[0].bias[2] = -0.7
    # ReLU makes the second constant a zero, which no border can be told from.
    assert remove_dead_units(model).removed["0"] == 1
    assert remove_dead_units(nn.Sequential(*model[:4], nn.Conv2d(6, 5, 3).double())).removed["0"] == 2


def test_a_network_that_is_constant_keeps_a_unit_in_every_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    shrunk = remove_dead_units(model)
    assert shrunk.units == {"0": 1, "2": 1, "4": 2}
    torch.testing.assert_close(shrunk.model(torch.ones(1, 3)), model(torch.ones(1, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.inner(inputs)


SHARED = nn.Linear(3, 3)
REFUSED = {
    "Residual": nn.Sequential(nn.Linear(3, 3), Residual(), nn.Linear(3, 3)),
    "no nn.Linear": Residual(),
    "grouped": nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)),
    "share": nn.Sequential(SHARED, nn.ReLU(), SHARED),
    "flatten": nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(4, 4)),
    "inputs": nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(8, 4)),
    "running": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 3)),
    "one by one": nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)),
}


@pytest.mark.parametrize("reason", list(REFUSED))
@pytest.mark.parametrize("function", [remove_dead_units, unreachable, links_of])
def test_other_networks_are_refused(function, reason):
    with pytest.raises(SpecError, match=reason):
        function(REFUSED[reason])


def test_a_mode_that_cleans_by_the_graph_refuses_other_networks_before_it_trains():
    configured = DRR(alpha=1e-3, cleaning="graph")
    with pytest.raises(SpecError, match="Residual"):
        configured.prepare(REFUSED["Residual"])
    configured.prepare(golden())


@pytest.mark.parametrize("cleaning", ["none", "graph", "gradients"])
def test_a_mode_prunes_weights_without_influence_too(cleaning):
    model = golden()
    inputs = torch.tensor([[0.4, -0.7], [0.1, 0.9]], dtype=torch.float64)
    configured = DRR(alpha=1e-3, cleaning=cleaning, tolerance=0.0, include=("*",))
    configured.prepare(model)
    expected = model(inputs).detach()
    configured.begin_fine_tuning(lambda: 1 + float((model(inputs) - expected).detach().square().sum()))
    torch.testing.assert_close(model(inputs), expected)
    assert (model[0].weight[2] == 0).all() == (cleaning != "none")
    assert (model[0].bias[2] == 0) == (cleaning != "none")
    assert (model[2].weight[0, 3] == 0) == (cleaning != "none")


def test_random_gradients_mistake_less_with_more_draws():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-1.0)
    # Alive for one standard normal input in six.
    mistakes = [
        sum(bool(without_gradient(model, (1, 1), draws, seed)["0.weight"].any()) for seed in range(30))
        for draws in (1, 30)
    ]
    assert mistakes[0] > 15
    assert mistakes[1] <= 1


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(3, 3), {"draws": 0}, "draw"),
        (nn.Embedding(5, 3), {}, "Embedding"),
        (nn.LSTM(2, 3), {}, "tuple"),
    ],
)
def test_random_gradients_say_what_they_need(model, options, message):
    with pytest.raises(SpecError, match=message):
        without_gradient(model, (4, 2), **options)


def test_random_gradients_leave_the_model_and_the_generator_alone():
    model = convolutional()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    without_gradient(model, (3, 2, 8, 8))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
