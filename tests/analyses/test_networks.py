"""Networks by specification string."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex.analyses.networks import MLP, NETWORKS, ConvNet, network
from kcomplex.errors import SpecError, UnknownNameError


def parameters(spec: str, shape: tuple[int, int, int], classes: int = 10) -> int:
    return sum(parameter.numel() for parameter in network(spec).build(shape, classes).parameters())


@pytest.mark.parametrize(
    ("spec", "count"), [("lenet300", 266_610), ("lenet5", 431_080), ("mlp:hidden=300+100", 266_610)]
)
def test_published_networks_have_the_published_number_of_parameters(spec: str, count: int) -> None:
    assert parameters(spec, (1, 28, 28)) == count


def test_an_mlp_without_hidden_layers_is_linear() -> None:
    assert MLP(hidden=()).build((1, 8, 8), 10)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert sum(1 for layer in MLP(hidden=()).build((1, 8, 8), 10) if layer.parameters()) == 2


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 23)])
def test_every_network_gives_one_logit_a_class(name: str, shape: tuple[int, int, int]) -> None:
    logits = network(name).build(shape, 7)(torch.rand(5, *shape))
    assert logits.shape == (5, 7)
    assert logits.dtype == torch.float32


@given(st.lists(st.integers(1, 512), max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_specification_builds_the_same_network_again(widths: list[int]) -> None:
    recipe = MLP(hidden=tuple(widths))
    if widths:
        assert network(recipe.spec) == recipe


@pytest.mark.parametrize(
    ("spec", "shape"), [("lenet5", (1, 8, 8)), ("convnet:channels=4+4+4+4", (1, 8, 8)), ("convnet", (1, 28, 3))]
)
def test_too_small_images_are_refused(spec: str, shape: tuple[int, int, int]) -> None:
    with pytest.raises(SpecError, match=r"images|halved"):
        network(spec).build(shape, 10)


@pytest.mark.parametrize(
    "spec", ["mlp:hidden=0", "mlp:hidden=8+-1", "convnet:channels=", "mlp:width=3", "lenet300:x=1"]
)
def test_wrong_options_are_refused(spec: str) -> None:
    with pytest.raises(SpecError):
        network(spec)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="convnet, lenet300, lenet5, mlp"):
        network("resnet")


def test_a_convolution_must_be_named() -> None:
    with pytest.raises(SpecError, match="at least one"):
        ConvNet(channels=())
