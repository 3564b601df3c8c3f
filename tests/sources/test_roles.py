"""What is counted: roles by name and shape, products of latent tensors, and files that give a module's number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.optim.swa_utils import AveragedModel

import kcomplex as kc
from kcomplex.errors import SpecError, WeightsError
from kcomplex.weights import words_of


def roles(tensors: dict[str, torch.Tensor], **choices: object) -> dict[str, str]:
    """Return the role of every tensor; of those that are left out, in brackets."""
    weights = kc.open_weights(tensors, **choices)  # type: ignore[arg-type]
    left_out = {item.name: f"({item.role})" for item in weights.skipped}
    return left_out | {name: handle.role for name, handle in weights.items()}


class Attention(nn.Module):
    """Masks and position numbers as GPT-2 and BERT have kept them in their files, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.ln_1 = nn.Embedding(40, 16), nn.LayerNorm(16)
        self.c_attn, self.lm_head = nn.Linear(16, 48), nn.Linear(16, 40, bias=False)
        self.lm_head.weight = self.wte.weight
        self.attn = nn.Module()
        self.attn.register_buffer("bias", torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril())
        self.attn.register_buffer("masked_bias", torch.tensor(-1e4))
        self.register_buffer("position_ids", torch.arange(8).unsqueeze(0))


def masked() -> nn.Module:
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    for part in (model[0], model[2]):
        prune.l1_unstructured(part, "weight", 0.8)
    return model


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.ConvTranspose1d(6, 4, 3), dim=1)
        whole = nn.utils.weight_norm(nn.Linear(5, 7), dim=None)
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), old, whole, parametrizations.weight_norm(nn.Linear(1, 4))
    )


def spectral_normed() -> nn.Module:
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 3)),
        old_spectral_norm(nn.Linear(8, 5)),
        old_spectral_norm(nn.ConvTranspose2d(4, 4, 3)),
    )
    for part in model:
        part.train()
        part(torch.randn(2, 8) if isinstance(part, nn.Linear) else torch.randn(2, 4, 7, 7))
    return model


def pruned_direction() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(6, 5))
    prune.l1_unstructured(layer, "weight_v", 0.5)
    layer(torch.ones(1, 6))
    layer(torch.ones(1, 6))
    return layer


def batch_normed() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model(torch.randn(4, 3, 8, 8))
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "masked": masked,
    "weight-normed": weight_normed,
    "spectral-normed": spectral_normed,
    "batch-normed": batch_normed,
    "attention": Attention,
    "pruned direction": pruned_direction,
    "parallel": lambda: nn.DataParallel(batch_normed()),
    "averaged": lambda: AveragedModel(batch_normed()),
    "compiled": lambda: torch.compile(batch_normed(), backend="eager"),  # type: ignore[return-value]
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_and_its_live_module_give_the_same_number(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    live, stored = kc.open_weights(model), kc.open_weights(tmp_path / "net.pt")
    assert [(item.name, item.aliases, item.role) for item in live.values()] == [
        (item.name, item.aliases, item.role) for item in stored.values()
    ]
    for key in live:
        assert words_of(live[key].read()).tobytes() == words_of(stored[key].read()).tobytes(), key
    estimators = ["zstd", "palette|entropy"]
    bits = [[item.bits for item in kc.describe(source, estimators)] for source in (model, tmp_path / "net.pt")]
    assert bits[0] == bits[1]


def test_pruned_weights_are_counted_as_the_network_computes_with_them() -> None:
    model = masked()
    counted = kc.open_weights(model.state_dict())
    assert counted.coverage.share == 1
    assert counted.coverage.left_out == {}
    assert {item.why for item in counted.skipped} == {"folded into 0.weight", "folded into 2.weight"}
    (description,) = kc.describe(model.state_dict(), "sparsity")
    assert description.value > 0.7
    assert "folded into" in description.care[0]
    for part in (model[0], model[2]):
        prune.remove(part, "weight")
    assert kc.describe(model.state_dict(), "zstd")[0].bits == kc.describe(masked_again(model), "zstd")[0].bits


def masked_again(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict as pruning would store it."""
    stored = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("weight"):
            stored |= {f"{name}_orig": tensor, f"{name}_mask": (tensor != 0).float()}
        else:
            stored[name] = tensor
    return stored


def test_latent_tensors_are_counted_as_they_are_stored_where_that_is_asked_for() -> None:
    told = roles(masked().state_dict(), count=["latent", "mask"])
    assert told["0.weight_orig"] == "latent"
    assert told["0.weight_mask"] == "mask"
    assert "0.weight" not in told
    everything = kc.open_weights(masked().state_dict(), count="all")
    assert not everything.skipped
    assert everything.selection == "count=all"


def test_shapes_that_do_not_fit_are_not_folded() -> None:
    told = roles(
        {"a_orig": torch.ones(3, 2), "a_mask": torch.ones(2, 3), "b_v": torch.ones(4, 3), "b_g": torch.ones(3)}
    )
    assert set(told) == {"a_orig", "a_mask", "b_v", "b_g"}


def test_roles_by_name_and_shape() -> None:
    told = roles(
        {
            "conv.weight": torch.ones(4, 3, 3, 3),
            "conv.bias": torch.ones(4),
            "bn1.weight": torch.ones(4),
            "bn1.bias": torch.ones(4),
            "bn1.running_mean": torch.ones(4),
            "bn1.num_batches_tracked": torch.tensor(3),
            "lstm.bias_ih_l0": torch.ones(4),
            "encoder.LayerNorm.gamma": torch.ones(4),
            "h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "h.0.attn.mask": torch.ones(1, 1, 8, 8),
            "layer.attn_mask": torch.ones(2, 5, 5),
            "att.mask": torch.ones(6, 6),
            "norm.weight": torch.ones(2, 3),
            "norm.bias": torch.ones(2, 3),
            "embeddings.position_ids": torch.arange(7),
            "rotary_emb.inv_freq": torch.ones(4),
            "optimizer.0.exp_avg": torch.ones(4),
            "flags": torch.ones(5, dtype=torch.bool),
        }
    )
    assert told == {
        "conv.weight": "weight",
        "conv.bias": "bias",
        "bn1.weight": "norm",
        "bn1.bias": "norm",
        "bn1.running_mean": "statistic",
        "bn1.num_batches_tracked": "statistic",
        "lstm.bias_ih_l0": "bias",
        "encoder.LayerNorm.gamma": "norm",
        "h.0.attn.bias": "(mask)",
        "h.0.attn.mask": "(mask)",
        "layer.attn_mask": "(mask)",
        "att.mask": "(mask)",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "embeddings.position_ids": "(constant)",
        "rotary_emb.inv_freq": "(constant)",
        "optimizer.0.exp_avg": "(optimiser)",
        "flags": "weight",
    }


@pytest.mark.parametrize(
    ("prefix", "dots"), [("ema.", True), ("model_ema.", False), ("teacher.", True), ("net_ema.", True)]
)
def test_an_averaged_copy_beside_its_network_is_left_out(prefix: str, dots: bool) -> None:
    network = {f"net.{part}.weight": torch.ones(3, 2) for part in "abcd"}
    names = {name: name.removeprefix("net.") for name in network}
    copies = {prefix + (rest if dots else rest.replace(".", "")): torch.zeros(3, 2) for rest in names.values()}
    told = roles({**network, **copies, f"{prefix}decay": torch.tensor(0.99)})
    assert {name for name, role in told.items() if role == "(copy)"} == {*copies, f"{prefix}decay"}
    # Alone, it is the network.
    assert set(roles(copies).values()) == {"weight"}
    assert set(kc.open_weights({**network, **copies}, count="copy")) == {*network, *copies}


LAYERS = (
    *("encoder_q", "encoder_k", "encoder_v", "ema_gate", "ema_proj", "shadow_encoder", "image_encoder", "optimizer"),
    *("teacher_head", "student_head", "target_encoder", "source_encoder", "mask_head", "scheduler", "init_block"),
    *("norm_proj", "ln_proj", "upsampler", "score", "loss_weights", "last_block", "previous", "running"),
)


def test_layers_with_unlucky_names_are_weights() -> None:
    network = {f"{prefix}{name}.weight": torch.ones(3, 2) for name in LAYERS for prefix in ("", "attn.", "blocks.0.")}
    assert set(roles(network).values()) == {"weight"}
    # Tensors of other networks that end as those of weight normalisation do.
    rwkv = {f"blocks.0.att.{name}_{end}": torch.ones(1, 1, 8) for name in ("x", "time_maa") for end in "vg"}
    decay = {"ssm.decay": torch.ones(8, 8), "emb.weight": torch.ones(8), "emb.table": torch.ones(8)}
    assert roles({**rwkv, **decay}) == {**dict.fromkeys((*rwkv, *decay), "weight"), "emb.weight": "norm"}


def test_what_is_trained_is_a_weight_whatever_it_is_called() -> None:
    model = nn.Module()
    model.inv_freq, model.attn_mask = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(4, 4))
    assert {handle.role for handle in kc.open_weights(model).values()} == {"weight"}
    assert {item.role for item in kc.open_weights(model.state_dict()).skipped} == {"constant", "mask"}


def test_parametrisations_in_a_row_are_not_folded_in_a_file() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Linear(4, 4, bias=False))
    assert "parametrizations.weight.original" in kc.open_weights(layer.state_dict())
    assert set(kc.open_weights(layer)) == {"weight", "bias"}


def test_roles_are_chosen_by_name() -> None:
    tensors = {"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3), "attn_mask": torch.ones(3, 3)}
    assert set(kc.open_weights(tensors, skip="bias")) == {"a.weight"}
    with pytest.raises(WeightsError, match="role 'mask' and is left out: count that"):
        kc.open_weights(tensors, include="attn*")
    assert set(kc.open_weights(tensors, count="mask")) == {"a.weight", "a.bias", "attn_mask"}
    assert set(kc.open_weights(tensors, count="mask", skip="all")) == {"attn_mask"}
    assert kc.describe(tensors, "zstd", skip="bias")[0].selection == "skip=bias"
    with pytest.raises(SpecError, match=r"no role 'gain'.*weight, bias"):
        kc.open_weights(tensors, count="gain")
    with pytest.raises(SpecError, match="counted and skipped"):
        kc.open_weights(tensors, count="mask", skip="mask")
    with pytest.raises(WeightsError, match="anew"):
        kc.open_weights(kc.open_weights(tensors), skip="bias")


def test_measuring_the_lesser_part_is_an_error_unless_asked_for() -> None:
    tensors = {"small": torch.ones(10), "large": torch.empty(100, device="meta")}
    with pytest.raises(WeightsError, match=r"10 of at least 110 weights.*large: meta tensor"):
        kc.describe(tensors, "raw")
    (description,) = kc.describe(tensors, "raw", partial=True)
    assert (description.weights, description.coverage.tensors, description.coverage.of_tensors) == (10, 1, 2)
    assert "large can't be measured" in description.care


def test_nan_and_infinity_are_told_beside_the_number() -> None:
    tensors = {"w": torch.tensor([1.0, float("nan"), float("inf")]), "c": torch.tensor([complex(0, float("nan")), 1j])}
    (description,) = kc.describe(tensors, "zstd")
    assert description.nonfinite == {"w": 2, "c": 1}
    assert description.to_dict()["nonfinite"] == 3
    assert "3 weights are NaN or infinite" in description.care[0]


@pytest.mark.parametrize("choice", ["include", "exclude", "count", "skip"])
@pytest.mark.parametrize("wrong", [3, [3], [None]])
def test_choices_are_texts(choice: str, wrong: object) -> None:
    with pytest.raises(WeightsError, match="are texts"):
        kc.open_weights({"w": torch.ones(2, 2)}, **{choice: wrong})  # type: ignore[arg-type]
