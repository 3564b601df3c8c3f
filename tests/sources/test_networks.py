"""Which part of a checkpoint is the network, in a file and in memory: at any depth, among other things, or refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kcomplex.errors import KComplexError
from kcomplex.sources.open import open_weights
from kcomplex.sources.roles import with_roles
from kcomplex.sources.state_dicts import state_dict_weights
from kcomplex.weights import Weights, as_patterns

Opened = Callable[..., Weights]


@pytest.fixture(params=["zip", "legacy", "memory"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """A function that opens a checkpoint from a file, or as it is."""

    def open_as(value: Any, root: str = "", count: str = "") -> Weights:
        if request.param == "memory":
            return with_roles(state_dict_weights(value, root=root), as_patterns(count or ()))
        torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=request.param == "zip")
        return open_weights(tmp_path / "x.pt", root=root, count=count or ())

    return open_as


def net(size: int = 4) -> dict[str, torch.Tensor]:
    return {"0.weight": torch.randn(size, size), "0.bias": torch.zeros(size)}


def optimiser() -> dict[str, Any]:
    layer = nn.Linear(4, 4)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(4)).sum().backward()
    adam.step()
    return adam.state_dict()


NET = ["0.bias", "0.weight"]
PLAIN = {
    "lightning": {"state_dict": net(), "epoch": 3, "optimizer_states": [optimiser()], "callbacks": {"best": "a"}},
    "timm": {"state_dict": net(), "state_dict_ema": net(), "optimizer": optimiser(), "arch": "x", "metric": 1.0},
    "resemblyzer": {"model_state": net(), "step": 3, "optimizer_state": optimiser()},
    "deepspeed": {"module": net(), "optimizer": None, "lr_scheduler": {"last": 3}, "ds_version": "0"},
    "fairseq": {"args": argparse.Namespace(), "model": net(), "last_optimizer_state": optimiser()},
    "detectron": {"model": net(), "optimizer": optimiser(), "scheduler": {}, "iteration": 3},
    "bag of tricks": {"net": net(), "acc": torch.tensor(0.9), "epoch": torch.tensor(3)},
    "params": {"params": net(), "params_ema": net()},
    "dino": {"student": net(), "teacher": net(), "optimizer": optimiser(), "dino_loss": {"center": torch.ones(1, 4)}},
    "average alone": {"ema": net(), "step": 3},
    "unknown key": {"my_wonderful_thing": net(), "steps": 3, "rng_state": torch.zeros(5056, dtype=torch.uint8)},
    "deep": {"checkpoint": {"model": {"state_dict": net(), "epoch": 1}}, "optimizer": optimiser()},
    "rounds": {"global_step": 1, "model_state_dict": net(), "scaler": {"scale": torch.tensor(2.0**16)}},
    "best": {"model": net(), "best_model": net()},
    "list of one": [net()],
    "fastai": {"model": net(), "opt": optimiser()},
    "pair": (net(), optimiser()),
    "loss beside": {"model": net(), "criterion": {"weight": torch.ones(3, 3)}},
    "figures beside": {"weight": net(), "train_loss": torch.ones(9), "val_iou": torch.ones(9)},
    "wrapped thrice": {"classy_state_dict": {"base_model": {"model": net(), "meters": {}}, "optimizer": optimiser()}},
    "random states": {"model": net(), "rng": {"cpu": torch.zeros(100), "cuda": [torch.zeros(100)]}},
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_network_is_plainly_there(opened: Opened, name: str) -> None:
    weights = opened(PLAIN[name])
    assert list(weights) == NET
    assert not {item.name for item in weights.skipped} & set(NET)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"model": {"en": net(), "de": net()}}, ["de.0.bias", "de.0.weight", "en.0.bias", "en.0.weight"]),
        ({"model": {"a": [torch.ones(2), {"b": torch.ones(3)}]}, "epoch": 2}, ["a.0", "a.1.b"]),
        ({"net": {1: {2: {"w": torch.ones(2)}}, "x": torch.ones(1)}}, ["1.2.w", "x"]),
        ({"a": torch.ones(50), "b": {"c": torch.ones(2)}}, ["a", "b.c"]),
        ([torch.ones(2), torch.ones(3)], ["0", "1"]),
        ({"model": {"model": {"w": torch.ones(3)}, "head": {"w": torch.zeros(3)}}}, ["head.w", "model.w"]),
    ],
)  # fmt: skip
def test_nested_names_are_joined(opened: Opened, parts: Any, names: list[str]) -> None:
    assert list(opened(parts)) == names


SEVERAL = {
    "gan": ({"G": net(), "D": net(), "G_optim": optimiser()}, ["'G' (2 tensors, 20 weights)", "'D'"]),
    "stylegan": ({"g": net(), "d": net(), "g_ema": net()}, ["'g'", "'d'", "'g_ema'"]),
    "named gan": ({"generator": net(), "discriminator": net()}, ["'generator'", "'discriminator'"]),
    "one is known": ({"model": net(), "discriminator": net()}, ["'model'", "'discriminator'"]),
    "a layer apart": ({"model": net(), "head": net()}, ["'model'", "'head'"]),
    "translation": ({"model": net(), "generator": net(), "vocab": {}}, ["'model'", "'generator'"]),
    "reinforcement": ({"actor": net(), "critic": net()}, ["'actor'", "'critic'"]),
    "four networks": ({f"{part}_network": net() for part in ("a", "b", "c")}, ["'a_network'", "'c_network'"]),
    "ensemble": ([net(), net()], ["'0'", "'1'"]),
    "lists": ({"weights": [torch.ones(2)], "biases": [torch.ones(2)]}, ["'weights'", "'biases'"]),
    "sequence to sequence": ({"en": net(), "de": net(), "en_opt": optimiser()}, ["'en'", "'de'"]),
    "deep": ({"state": {"a": net(), "model": net(), "net": net()}}, ["'state.a'", "'state.model'"]),
    "much beside": ({"state_dict": net(), "other": {"w": torch.ones(99)}}, ["'state_dict'", "'other'"]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_networks_are_refused_with_their_roots(opened: Opened, name: str) -> None:
    value, roots = SEVERAL[name]
    with pytest.raises(KComplexError, match="several networks") as caught:
        opened(value)
    for root in ["--root", *roots]:
        assert root in str(caught.value)


def test_an_empty_network_beside_another_is_refused(opened: Opened) -> None:
    value = {"state_dict": {}, "model": net(), "scheduler": {}}
    with pytest.raises(KComplexError, match=r"'state_dict' is empty, .*--root KEY.*'model' \(2 tensors, 20 weights\)"):
        opened(value)
    assert list(opened(value, "model")) == NET


def test_a_root_says_which(opened: Opened) -> None:
    value = {"G": {"a.b": {"w": torch.ones(2)}, "a": {"c": {"w": torch.ones(3)}}}, "D": net(), "best.model": net(2)}
    assert {name: handle.shape for name, handle in opened(value, "G.a.b").items()} == {"w": (2,)}
    assert {name: handle.shape for name, handle in opened(value, "G.a.c").items()} == {"w": (3,)}
    assert list(opened(value, "best.model")) == list(opened(value, "D")) == NET
    assert len(opened(value, ".")) == 6
    assert len(opened(value, "G.")) == 2
    with pytest.raises(KComplexError, match=r"nothing is at the root 'E'\. .*'G' \(2 tensors"):
        opened(value, "E")


def test_a_root_may_be_what_is_never_taken_by_itself(opened: Opened) -> None:
    value = {"model": net(), "ema": net(3), "optimizer": optimiser()}
    assert opened(value, "ema")["0.weight"].shape == (3, 3)
    assert "state.0.exp_avg" in opened(value, "optimizer.", count="optimiser")
    assert "0.exp_avg" in opened(value, "optimizer", count="optimiser")


def test_a_root_of_flat_names_is_their_beginning(opened: Opened, tmp_path: Path) -> None:
    value = {"encoder.w": torch.ones(2), "encoder.b": torch.ones(1), "decoder.w": torch.ones(3)}
    assert list(opened(value, "encoder")) == ["b", "w"]
    from safetensors.torch import save_file

    save_file(value, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors", root="encoder") as weights:
        assert {name: handle.shape for name, handle in weights.items()} == {"b": (1,), "w": (2,)}
    with pytest.raises(KComplexError, match=r"no name begins with the root 'coder'; there are decoder\.w"):
        open_weights(tmp_path / "x.safetensors", root="coder")


def test_what_is_left_out_has_its_role(opened: Opened) -> None:
    weights = opened({"model": net(), "ema": net(), "optimizer": optimiser(), "acc": torch.tensor(1.0), "epoch": 3})
    roles = {item.name: (item.role, item.shape) for item in weights.skipped}
    assert roles["ema.0.weight"] == ("copy", (4, 4))
    assert roles["optimizer.state.0.exp_avg"] == ("optimiser", (4, 4))
    assert roles["acc"] == ("other", ())
    assert roles["epoch"] == ("other", None)


def test_what_is_left_out_counts_where_that_is_asked_for(opened: Opened) -> None:
    shared = torch.ones(4, 4)
    value = {"model": {"w": shared}, "best_model": {"w": shared}, "optimizer": optimiser()}
    assert set(opened(value)) == {"w"}
    assert {name: handle.role for name, handle in opened(value, count="copy").items()} == {
        "w": "weight", "best_model.w": "copy"
    }  # fmt: skip
    assert opened(value, count="optimiser")["optimizer.state.0.exp_avg"].role == "optimiser"
    everything = opened(value, count="all")
    assert {"w", "best_model.w", "optimizer.state.1.exp_avg_sq"} < set(everything)
    # Whatever copies hold stays theirs.
    pruned = {"0.weight_orig": torch.ones(3, 3), "0.weight_mask": torch.ones(3, 3)}
    assert set(opened({"model": pruned, "ema": pruned})) == {"0.weight"}
    assert set(opened({"model": {"ema.w": torch.ones(2)}, "ema": {"w": torch.ones(2)}})) == {"ema.w"}


UNLUCKY = (
    *("upsampler", "geometric_head", "metric_head", "history_encoder", "opt_model", "schema_encoder", "init_block"),
    *("last_block", "mid_block", "source_encoder", "target_encoder", "previous_embedding", "scheduler", "sampler"),
    *("loss_weights", "step_embed", "score", "epoch_embedding", "optimizer", "history", "ema", "teacher", "callbacks"),
    *("criterion", "running_block", "averaged_layer", "best_head", "old_head", "amp", "config", "metrics"),
)


@pytest.mark.parametrize("place", ["params", "model", "net"])
def test_no_layer_is_lost_for_its_name(opened: Opened, place: str) -> None:
    layers = {name: {"weight": torch.full((3, 3), float(at))} for at, name in enumerate(UNLUCKY)}
    assert set(opened({place: layers})) == {f"{name}.weight" for name in UNLUCKY}
    assert set(opened({place: layers}, f"{place}.")) == {f"{name}.weight" for name in UNLUCKY}
    loose = {name: torch.full((3, 3), float(at)) for at, name in enumerate(UNLUCKY)}
    assert set(opened({"blocks": {"w": torch.ones(3)}, **loose})) == {"blocks.w", *UNLUCKY}
    assert set(opened(loose)) == set(UNLUCKY)
    flat = {f"{name}.weight": tensor for name, tensor in loose.items()}
    assert set(opened(flat)) == set(opened({"model": flat, "epoch": 3})) == set(flat)


@pytest.mark.parametrize("name", UNLUCKY)
def test_a_part_that_is_called_like_something_else_is_never_passed_over(opened: Opened, name: str) -> None:
    value = {"blocks": net(), name: net(5)}
    with pytest.raises(KComplexError, match="several networks"):
        opened(value)
    assert len(opened(value, ".")) == 4


def test_parts_of_one_shape_are_no_copies_without_the_name_of_a_network(opened: Opened) -> None:
    with pytest.raises(KComplexError, match="several networks"):
        opened({"source_encoder": net(), "target_encoder": net()})
    # A number that isn't called a figure may be of the network.
    assert set(opened({"visual": net(), "logit_scale": torch.tensor(2.0)})) == {
        "visual.0.weight", "visual.0.bias", "logit_scale"
    }  # fmt: skip


COPIES = {
    "wrapped": {"model": net(), "ema": {f"module.{name}": tensor for name, tensor in net().items()}},
    "counted": {"model": net(), "ema_model": {"step": torch.tensor(7), "ema_model": net()}},
    "without buffers": {"state_dict": {**net(), "n": torch.ones(2)}, "state_dict_ema": net()},
    "own": {"generator": net(), "generator_ema": net()},
    "arguments": {"state_dict": net(), "hyper_parameters": {"net": net(), "lr": 0.1}},
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_has_the_names_and_shapes_of_the_network(opened: Opened, name: str) -> None:
    network, copy = COPIES[name]
    value = COPIES[name]
    weights = opened(value)
    assert set(weights) == set(value[network])
    assert {item.role for item in weights.skipped if item.shape} == {"copy"}
    larger = {key: torch.ones(5, 5) for key in net()}
    with pytest.raises(KComplexError, match="several networks"):
        opened({network: net(), copy: larger})


def test_a_part_of_many_names_is_walked_once() -> None:
    walks = 0

    class Shared(dict[str, Any]):
        def values(self) -> Any:
            nonlocal walks
            walks += 1
            return super().values()

    shared = Shared({f"k{at}": at for at in range(9)})
    weights = state_dict_weights({"model": net(), **{f"x{at}": shared for at in range(300)}})
    assert (sorted(weights), len(weights.skipped)) == (NET, 300)
    assert walks < 10


@pytest.mark.parametrize("value", [optimiser(), {"optimizer": optimiser(), "scheduler": {"last": 1}}, {"epoch": 3}])
def test_a_file_without_a_network_is_refused(opened: Opened, value: Any) -> None:
    with pytest.raises(KComplexError, match=r"no network|no tensor"):
        opened(value)


def test_work_is_bounded_where_parts_are_nested_many_times(opened: Opened) -> None:
    part: Any = {"w": torch.ones(2)}
    for _ in range(60):
        part = {"a": part, "b": part}
    with pytest.raises(KComplexError, match="more entries, or longer names, than any checkpoint has"):
        opened({"model": part})


def test_a_part_may_hold_itself(opened: Opened) -> None:
    value: dict[str, Any] = {"w": torch.ones(2)}
    value["again"] = value
    weights = opened({"model": value})
    assert {name: handle.aliases for name, handle in weights.items()} == {"again.w": ("w",)}
