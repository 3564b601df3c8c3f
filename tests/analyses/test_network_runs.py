"""Deep networks and transformers in every mode: interrupted, continued, converted, coded and decoded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from kcomplex.analyses.experiments import run as running
from kcomplex.analyses.experiments.data.augmentation import crop_and_flip, shift
from kcomplex.analyses.experiments.data.data import Dataset, Split, load
from kcomplex.analyses.experiments.data.text import windows
from kcomplex.analyses.experiments.experiment import Experiment
from kcomplex.analyses.experiments.networks.networks import network
from kcomplex.analyses.experiments.run import FINAL, load_final, run
from kcomplex.analyses.experiments.training import Training, evaluate
from kcomplex.analyses.studies import front
from kcomplex.errors import RunError, SpecError
from kcomplex.measuring.measure import describe
from kcomplex.measuring.stream import decode_checkpoint, encode_checkpoint
from kcomplex.training.protocol.batch_norm import reestimate_batch_norm

NETWORKS = {
    "resnet20:width=2": "digits",
    "vgg16:width=2": "digits",
    "vit:width=8,depth=1,heads=2": "digits",
    "gpt:width=8,depth=1,heads=2": "tinyshakespeare:window=8",
}
MODES = [
    "codeq:learnable_bits=true,target_bits=4,target_zeros=0.5",
    "momos:capacity=0.2,quantiser=codeq,bits=4",
    "pmmp|uniform_qat",
    "drr:include=*|momos:capacity=0.2",
    "gradual_pruning:span=4,every=1",
    "low_rank:every=2",
    "hashed_sharing",
]


class Interruption(Exception):
    """Stands for whatever may stop a run."""


def small_set(name: str) -> Dataset:
    """Return some tens of images, or of windows of a text whose letters follow one another."""
    if name == "digits":
        data = load(name)
        parts = (Split(part.inputs[:90], part.labels[:90]) for part in (data.train, data.validation, data.test))
        return Dataset(name, *parts, data.classes)
    letters = torch.arange(90 * 8 + 1).remainder(11).numpy()
    split = Split(*windows(letters, 8))
    return Dataset(name, split, split, split, 11)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch, unmeasured: None) -> None:
    for module in (running, front):
        monkeypatch.setattr(module, "load", lambda name, folder=None: small_set(name))


def experiment(spec: str, mode: str, name: str = "tiny") -> Experiment:
    return Experiment(
        name,
        data=NETWORKS.get(spec, "digits"),
        network=spec,
        mode=mode,
        epochs=1,
        fine_tune_epochs=1,
        batch_size=30,
        lr=0.01,
        reestimate_batch_norm=True,
        estimators=("raw",),
    )


def plain_network(path: Path, spec: str) -> nn.Module:
    data = small_set(NETWORKS[spec])
    plain = network(spec).build(data.input_shape, data.classes)
    load_final(path / FINAL, plain)
    return plain


@pytest.mark.parametrize("spec", NETWORKS)
@pytest.mark.parametrize("mode", MODES)
def test_a_network_is_trained_continued_and_decoded(tmp_path: Path, spec: str, mode: str) -> None:
    last: dict[str, float] = {}
    tiny = experiment(spec, mode)
    whole = run(tiny, tmp_path / "whole", progress=lambda _, metrics: last.update(metrics))

    def interrupt(epoch: int, metrics: Mapping[str, float]) -> None:
        if epoch == 1:
            raise Interruption

    with pytest.raises(Interruption):
        run(tiny, tmp_path / "parts", progress=interrupt)
    parts = run(tiny, tmp_path / "parts")
    plain, continued = (plain_network(path, spec) for path in (whole, parts))
    assert all(torch.equal(tensor, continued.state_dict()[name]) for name, tensor in plain.state_dict().items())
    test = small_set(NETWORKS[spec]).test
    assert evaluate(plain, test)[1] == pytest.approx(last["accuracy"])
    stream = encode_checkpoint(plain, "palette|entropy")
    back = decode_checkpoint(stream)
    assert all(torch.equal(tensor, back[name]) for name, tensor in plain.state_dict().items())
    # A tied weight is there twice and counts once.
    assert describe(plain, "palette|entropy")[0].bits == 8 * len(stream)


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    spec = "gpt:width=8,depth=1,heads=2"
    path = run(experiment(spec, "uniform_qat:bits=2"), tmp_path)
    plain = plain_network(path, spec)
    assert plain.head.weight is plain.characters.weight
    assert len(plain.head.weight.unique()) <= 3
    with safe_open(path / FINAL, framework="pt") as file:
        assert {"characters.weight", "head.weight"} - set(file.keys()) == {"head.weight"}


def test_a_last_batch_of_one_is_refused_where_it_cant_be_normalised(tmp_path: Path) -> None:
    tiny = experiment("vgg16:width=2", "baseline")
    with pytest.raises(SpecError, match="batch_size=89 leaves one of 90"):
        run(dataclasses.replace(tiny, batch_size=89), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run(dataclasses.replace(tiny, network="resnet20:width=2", batch_size=89), tmp_path)


def test_broken_final_weights_are_told(tmp_path: Path) -> None:
    spec = "resnet20:width=2"
    path = run(experiment(spec, "baseline"), tmp_path)
    with pytest.raises(RunError, match="weights of the run's network"):
        load_final(path / FINAL, nn.Linear(3, 3))
    (path / FINAL).write_bytes((path / FINAL).read_bytes()[:99])
    with pytest.raises(RunError, match=FINAL):
        plain_network(path, spec)


def test_the_front_measures_networks_and_counts_the_units_of_chains(tmp_path: Path) -> None:
    for number, spec in enumerate(NETWORKS):
        run(experiment(spec, "uniform_qat", f"run{number}"), tmp_path)
    run(experiment("mlp", "baseline", "mlp"), tmp_path)
    table = front.measured(tmp_path).set_index("run")
    chains = {"vgg16:width=2": "2-2-4-4-8-8-8-16-16-16-16-16-16-16-16-10"}
    units = {f"run{number}": chains.get(spec, "") for number, spec in enumerate(NETWORKS)}
    assert table["units"].to_dict() == {"mlp": "128-10", **units}
    for number, spec in enumerate(NETWORKS):
        data = small_set(NETWORKS[spec])
        loss, _ = evaluate(plain_network(tmp_path / f"run{number}", spec), data.train)
        wanted = loss / math.log(2) * data.train.labels.numel() / 8
        assert table["data_bytes"][f"run{number}"] == pytest.approx(wanted, rel=1e-5)


def test_a_price_in_bits_is_one_of_predictions() -> None:
    name = "gpt:width=8,depth=1,heads=2"
    training = Training(experiment(name, "drr"), small_set(NETWORKS[name]))
    assert training.mode.samples == 90 * 8  # type: ignore[attr-defined]


def test_loss_and_accuracy_of_text_are_of_characters() -> None:
    split = Split(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1, 2], [0, 0]]))
    scores = torch.eye(3)[[1, 2, 0]] * 5
    model = nn.Embedding.from_pretrained(scores)
    loss, accuracy = evaluate(model, split)
    assert accuracy == 0.75
    wanted = [scores[a].log_softmax(0)[b] for a, b in ((0, 1), (1, 2), (2, 0), (0, 0))]
    assert loss == pytest.approx(-float(sum(wanted)) / 4)


def test_layerwise_masks_need_what_multiplies_in_layers_excluded(tmp_path: Path) -> None:
    spec = "vit:width=8,depth=1,heads=2"
    with pytest.raises(SpecError, match="exclude it"):
        run(experiment(spec, "layerwise", "all"), tmp_path)
    attention = "type:MultiheadAttention+type:NonDynamicallyQuantizableLinear"
    path = run(experiment(spec, f"layerwise:steps=20,exclude={attention}+type:Embedding", "some"), tmp_path)
    assert (plain_network(path, spec).classifier.weight == 0).any()


def test_random_gradients_refuse_characters(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="doesn't take random floats"):
        run(experiment("gpt:width=8,depth=1,heads=2", "drr:cleaning=gradients"), tmp_path)


def test_batch_norms_of_a_residual_network_are_those_of_the_projected_weights() -> None:
    training = Training(experiment("resnet20:width=2", "momos:capacity=0.01"), small_set("digits"))
    training.run_epoch()
    model, batch = training.model, training.data.train.inputs
    statistics = [module.running_mean.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(statistics) == 19
    assert reestimate_batch_norm(model, [batch]) == 19
    again = [module.running_mean for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for before, after in zip(statistics, again, strict=True):
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("augmentation", ["shift", "crop_flip"])
def test_an_augmented_training_can_be_continued(tmp_path: Path, augmentation: Any) -> None:
    spec = "resnet20:width=2"
    tiny = dataclasses.replace(experiment(spec, "baseline"), augmentation=augmentation, epochs=2)

    def interrupt(epoch: int, metrics: Mapping[str, float]) -> None:
        if epoch == 1:
            raise Interruption

    with pytest.raises(Interruption):
        run(tiny, tmp_path / "parts", progress=interrupt)
    whole, parts, plain = (
        plain_network(run(one, tmp_path / place), spec).state_dict()
        for one, place in (
            (tiny, "whole"),
            (tiny, "parts"),
            (dataclasses.replace(tiny, augmentation="none"), "plain"),
        )
    )
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert not torch.equal(whole["conv.weight"], plain["conv.weight"])


def test_characters_are_not_augmented(tmp_path: Path) -> None:
    tiny = dataclasses.replace(experiment("gpt:width=8,depth=1,heads=2", "baseline"), augmentation="crop_flip")
    with pytest.raises(SpecError, match="for images"):
        run(tiny, tmp_path)


def test_shifted_images_are_moved_by_one_place_at_most_and_each_way() -> None:
    images = torch.rand(200, 2, 6, 5)
    changed = shift(images, torch.Generator().manual_seed(0))
    assert torch.equal(changed, shift(images, torch.Generator().manual_seed(0)))
    padded = nn.functional.pad(images, (1,) * 4)
    found = {
        (row, column)
        for image, other in zip(padded, changed, strict=True)
        for row in range(3)
        for column in range(3)
        if torch.equal(other, image[:, row : row + 6, column : column + 5])
    }
    assert len(found) == 9
    for image, other in zip(padded, changed, strict=True):
        assert any(
            torch.equal(other, image[:, row : row + 6, column : column + 5]) for row in range(3) for column in range(3)
        )


def test_crops_and_mirrored_images_are_what_a_loop_finds() -> None:
    images = torch.rand(40, 2, 6, 5)
    changed = crop_and_flip(images, torch.Generator().manual_seed(0))
    assert torch.equal(changed, crop_and_flip(images, torch.Generator().manual_seed(0)))
    found = set()
    for image, other in zip(nn.functional.pad(images, (4,) * 4), changed, strict=True):
        fitting = [
            (row, column, flipped)
            for row in range(9)
            for column in range(9)
            for flipped in (False, True)
            if torch.equal(other.flip(2) if flipped else other, image[:, row : row + 6, column : column + 5])
        ]
        # A corner of zeros may be found at several places, never at none.
        assert fitting
        found.add(fitting[0])
    assert len(found) > 20
    assert {flipped for _, _, flipped in found} == {False, True}
    assert {row for row, _, _ in found} >= {0, 8}
