"""Networks by specification string."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex.analyses.experiments.networks.networks import MLP, NETWORKS, ConvNet, network
from kcomplex.analyses.experiments.networks.residual import ResidualBlock
from kcomplex.errors import SpecError, UnknownNameError
from kcomplex.training.protocol.mode import WEIGHT_LAYERS, chosen_parameters


def parameters(spec: str, shape: tuple[int, ...], classes: int = 10) -> int:
    return sum(parameter.numel() for parameter in network(spec).build(shape, classes).parameters())


@pytest.mark.parametrize(
    ("spec", "shape", "count"),
    [
        ("lenet300", (1, 28, 28), 266_610),
        ("lenet5", (1, 28, 28), 431_080),
        ("mlp:hidden=300+100", (1, 28, 28), 266_610),
        ("mlp:hidden=256+256+256+256", (3, 32, 32), 986_634),
        ("resnet20", (3, 32, 32), 269_722),
        ("vgg16", (3, 32, 32), 15_253_578),
    ],
)
def test_published_networks_have_the_published_number_of_parameters(
    spec: str, shape: tuple[int, ...], count: int
) -> None:
    assert parameters(spec, shape) == count


# Of arXiv:2505.17469, from two numbers to one.
@pytest.mark.parametrize(("hidden", "count"), [("5+8", 72), ("25+25", 751)], ids=["teacher", "student"])
def test_teacher_and_student_have_the_published_number_of_parameters(hidden: str, count: int) -> None:
    assert parameters(f"mlp:hidden={hidden}", (1, 1, 2), classes=1) == count


def test_transformers_have_the_number_of_parameters_of_their_layers() -> None:
    block = 12 * 32**2 + 13 * 32
    assert parameters("vit:width=32,depth=3", (3, 32, 32)) == (
        (3 * 16 + 1) * 32 + 64 * 32 + 3 * block + 2 * 32 + 33 * 10
    )
    # The output layer has no weights of its own.
    assert parameters("gpt:width=32,depth=3", (24,), 65) == 65 * 32 + 24 * 32 + 3 * block + 2 * 32


def test_an_mlp_without_hidden_layers_is_linear() -> None:
    assert MLP(hidden=()).build((1, 8, 8), 10)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert sum(1 for layer in MLP(hidden=()).build((1, 8, 8), 10) if layer.parameters()) == 2


@pytest.mark.parametrize("name", sorted(name for name, cls in NETWORKS.items() if cls.axes == 3))
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
    "spec",
    [
        "mlp:hidden=0",
        "mlp:hidden=8+-1",
        "convnet:channels=",
        "mlp:width=3",
        "lenet300:x=1",
        "vgg16:width=0",
        "vgg16:dropout=1",
        "resnet20:width=0",
        "vit:patch=0",
        "vit:heads=3",
        "gpt:depth=0",
        "gpt:heads=0",
    ],
)
def test_wrong_options_are_refused(spec: str) -> None:
    with pytest.raises(SpecError):
        network(spec)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="convnet, gpt, lenet300, lenet5, mlp, resnet20, vgg16, vit"):
        network("resnet")


def test_a_convolution_must_be_named() -> None:
    with pytest.raises(SpecError, match="at least one"):
        ConvNet(channels=())


@pytest.mark.parametrize("training", [True, False])
def test_a_gpt_looks_back_only(training: bool) -> None:
    torch.manual_seed(0)
    model = network("gpt:width=16,depth=2,heads=2").build((8,), 5).train(training)
    text = torch.randint(0, 5, (6, 8))
    changed = text.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 5
    with torch.no_grad():
        before, after = model(text), model(changed)
        beginning = model(text[:, :3])
    assert before.shape == (6, 8, 5)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    torch.testing.assert_close(before[:, :3], beginning)
    assert not torch.isclose(before[:, 4], after[:, 4]).all()


def test_a_shortcut_adds_every_second_place_and_maps_of_zeros() -> None:
    block = ResidualBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    maps = torch.rand(1, 2, 5, 6)
    with torch.no_grad():
        out = block(maps)
    assert torch.equal(out[:, :2], maps[:, :, ::2, ::2])
    assert out.shape == (1, 4, 3, 3)
    assert not out[:, 2:].any()


def test_images_are_filled_up_to_whole_patches() -> None:
    torch.manual_seed(0)
    model = network("vit:patch=4,width=8,depth=1,heads=2").build((1, 5, 8), 3)
    images = torch.rand(2, 1, 5, 8)
    changed = images.clone()
    changed[:, :, 4:] += 1
    assert model.stack.positions.num_embeddings == 4  # type: ignore[union-attr]
    assert not torch.isclose(model(images), model(changed)).all()


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("mlp", (64,), "mlp takes images, .* What takes those: gpt"),
        ("gpt", (1, 8, 8), "gpt takes characters, .* What takes those: convnet, .*vit"),
        ("vit", (8, 8), "nothing"),
    ],
)
def test_inputs_of_another_kind_are_refused(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        network(spec).build(shape, 10)


def test_modes_work_on_attention_and_embeddings_and_leave_norms_and_biases() -> None:
    model = network("gpt:width=8,depth=1,heads=2").build((8,), 5)
    assert [full for _, _, full in chosen_parameters(model, WEIGHT_LAYERS, (), ())] == [
        "characters.weight",
        "stack.positions.weight",
        "stack.blocks.0.self_attn.in_proj_weight",
        "stack.blocks.0.self_attn.out_proj.weight",
        "stack.blocks.0.linear1.weight",
        "stack.blocks.0.linear2.weight",
    ]
