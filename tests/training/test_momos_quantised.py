"""MoMos: motifs of codes, selections, schedules, the fixed mosaic of fine-tuning, and mosaics in a file."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.errors import FormatError, SourceNotFoundError, SpecError
from kcomplex.motifs import selection as motif_selection
from kcomplex.motifs.blocks import blocks_of
from kcomplex.motifs.nearest import nearest, squared_distances
from kcomplex.motifs.selection import SELECTIONS, select_motifs
from kcomplex.training.protocol.sequence import mode
from kcomplex.training.quantising.codeq import CoDeQ
from kcomplex.training.quantising.uniform_qat import UniformQAT
from kcomplex.training.sharing.momos import MoMos
from kcomplex.training.sharing.mosaic_file import load_mosaics, save_mosaics

CONFIGURATIONS = {
    "plain": {},
    "weighted": {"selection": "weighted", "keep": 0.5},
    "spread, steps": {"selection": "spread", "every": "3 steps", "lloyd_steps": 3},
    "uniform_qat": {"quantiser": "uniform_qat", "bits": 4},
    "uniform_qat per tensor": {"quantiser": "uniform_qat", "bits": 3, "scope": "tensor"},
    "codeq": {"quantiser": "codeq", "bits": 3, "target_zeros": 0.5},
    "reference": {"reference": True, "quantiser": "uniform_qat", "bits": 3},
}
SIZE = 4


@pytest.fixture(params=list(CONFIGURATIONS))
def options(request):
    return CONFIGURATIONS[request.param]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 12), nn.ReLU(), nn.Linear(12, 3)
    )


class Loop:
    """A training in progress."""

    def __init__(self, configured: MoMos) -> None:
        self.model = network()
        self.mode = configured
        self.mode.prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.mode.parameter_groups(lr=0.02), lr=0.02)
        self.inputs = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.labels = self.inputs[:, 0, :, :3].mean(1).argmax(1)

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.model(self.inputs), self.labels)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            self.mode.after_step()
        self.mode.after_epoch()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mode": self.mode.state_dict(),
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mode.load_state_dict(state["mode"])


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [model[index].weight.detach() for index in (0, 3, 5)]


def distinct_blocks(tensors: list[torch.Tensor]) -> int:
    return len(np.unique(blocks_of([tensor.numpy() for tensor in tensors], SIZE).rows, axis=0))


@pytest.mark.parametrize("phase", ["training", "fine-tuning"])
def test_training_resumes_bit_for_bit(options, phase):
    first = Loop(MoMos(capacity=0.25, **options))
    first.steps(4)
    if phase == "fine-tuning":
        first.mode.begin_fine_tuning(lambda: 0.0)
        first.steps(2)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Loop(MoMos(capacity=0.25, **options))
    second.load(torch.load(file, weights_only=True))
    for loop in (first, second):
        loop.steps(8)
    for ours, theirs in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert first.mode.report() == second.mode.report()
    converted = (loop.mode.convert(loop.model).state_dict().values() for loop in (first, second))
    assert all(torch.equal(*pair) for pair in zip(*converted, strict=True))


@pytest.mark.parametrize("name", ["plain", "uniform_qat", "uniform_qat per tensor", "codeq"])
def test_fine_tuning_trains_motifs_on_a_fixed_mosaic(name):
    loop = Loop(MoMos(capacity=0.25, **CONFIGURATIONS[name]))
    loop.steps(5)
    loop.mode.begin_fine_tuning(lambda: 0.0)
    mosaics = loop.mode.state_dict()["mosaics"]
    before = loop.loss().item()
    loop.steps(15)
    after = loop.mode.state_dict()["mosaics"]
    assert loop.loss().item() < before
    for old, new in zip(mosaics, after, strict=True):
        assert torch.equal(old["assignment"], new["assignment"])
        assert not torch.equal(old["motifs"], new["motifs"])
        assert not new["motifs"][0].any()
    plain = loop.mode.convert(loop.model)
    assert all(torch.equal(*pair) for pair in zip(weights_of(plain), weights_of(loop.model), strict=True))
    if loop.mode.scope == "global" and name == "plain":
        # The tail of the first tensor is the beginning of a motif.
        assert distinct_blocks(weights_of(plain)) <= len(mosaics[0]["motifs"]) + 1


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(("quantiser", "bits"), [("uniform_qat", 2), ("uniform_qat", 4), ("codeq", 3)])
def test_quantised_motifs_have_values_of_so_many_bits(scope, quantiser, bits):
    loop = Loop(MoMos(capacity=0.25, quantiser=quantiser, bits=bits, scope=scope))
    for _ in range(2):
        loop.steps(4)
    plain = loop.mode.convert(loop.model)
    for ours, theirs in zip(weights_of(plain), weights_of(loop.model), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.unique().numel() <= 2**bits - 1
    report = loop.mode.report()
    blocks = [-(-weights.numel() // SIZE) for weights in weights_of(plain)]
    if scope == "global":
        used = report["motifs_used"]
        assert report["nominal_bits"] == used * SIZE * bits + sum(blocks) * math.ceil(math.log2(used))


def test_projecting_again_changes_nothing(options):
    if options.get("reference"):
        return
    loop = Loop(MoMos(capacity=0.25, **{**options, "every": "epoch"}))
    loop.steps(3)
    before = copy.deepcopy(loop.model.state_dict())
    loop.mode.after_epoch()
    assert loop.mode.report()["changed"] == 0
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())


@pytest.mark.parametrize(
    ("every", "projections"), [("step", 6), ("3 steps", 2), ("4 steps", 1), ("epoch", 2), ("2 epochs", 1)]
)
def test_projections_come_when_they_are_due(every, projections, monkeypatch):
    loop = Loop(MoMos(capacity=0.25, every=every))
    calls = []
    monkeypatch.setattr(MoMos, "_project", lambda *args, **options: calls.append(1))
    loop.steps(3)
    loop.steps(3)
    assert len(calls) == projections


@pytest.mark.parametrize("configured", [UniformQAT(bits=3), CoDeQ(bits=3)], ids=lambda configured: configured.name)
def test_a_quantiser_that_was_there_before_serves_too(configured):
    model = network()
    configured.prepare(model)
    momos = MoMos(capacity=0.25)
    momos.prepare(model)
    momos.after_epoch()
    used, blocks = momos.report()["motifs_used"], 12 + 540 + 9
    assert momos.report()["nominal_bits"] == 3 * SIZE * used + blocks * math.ceil(math.log2(used))
    for weights in weights_of(momos.convert(model)):
        assert weights.unique().numel() <= 7


def test_quantisers_of_different_bits_share_no_motifs():
    model = network()
    codeq = CoDeQ(learnable_bits=True)
    codeq.prepare(model)
    with torch.no_grad():
        model[3].parametrizations.weight[0].logit_bits.fill_(-3)
    with pytest.raises(SpecError, match="scope=tensor"):
        MoMos(capacity=0.25).prepare(model)
    MoMos(capacity=0.25, scope="tensor").prepare(model)


def test_other_parametrisations_are_refused():
    model = network()
    torch.nn.utils.parametrizations.orthogonal(model[3])
    with pytest.raises(SpecError, match="exclude it"):
        MoMos(capacity=0.25).prepare(model)
    MoMos(capacity=0.25, exclude=("3",)).prepare(model)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("force_zero", [True, False])
def test_selections_give_distinct_blocks_in_the_number_asked_for(selection, force_zero):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (1000,), generator=generator).double().numpy()
    blocks = blocks_of([values, values[:7]], 2)
    motifs = select_motifs(blocks, 20, generator, selection, force_zero=force_zero)
    rows = {tuple(row) for row in blocks.rows}
    assert {tuple(row) for row in motifs[int(force_zero) :]} <= rows
    assert len(motifs) == 20
    assert force_zero == (not motifs[0].any() and selection != "random") or selection == "random" or not force_zero
    if selection != "random":
        assert len(np.unique(motifs, axis=0)) == 20
    again = select_motifs(blocks, 20, torch.Generator().manual_seed(7), selection, force_zero=force_zero)
    same = select_motifs(blocks, 20, torch.Generator().manual_seed(7), selection, force_zero=force_zero)
    np.testing.assert_array_equal(again, same)


def test_weighted_selection_prefers_frequent_blocks():
    values = np.concatenate([np.repeat([[1.0, 1.0]], 900, 0), np.arange(200.0).reshape(100, 2) + 5]).reshape(-1)
    blocks = blocks_of([values], 2)
    found = [
        (select_motifs(blocks, 4, torch.Generator().manual_seed(seed), "weighted")[1:] == 1).all(1).any()
        for seed in range(20)
    ]
    assert sum(found) >= 18


def test_spread_selection_finds_far_blocks():
    values = np.random.default_rng(0).normal(size=(2000, 2)) * 0.01
    values[7] = (5, 5)
    blocks = blocks_of([values], 2)
    motifs = select_motifs(blocks, 10, torch.Generator().manual_seed(0), "spread")
    assert (motifs == 5).all(1).any()


def first_distortion(blocks, count, selection) -> float:
    motifs = select_motifs(blocks, count, torch.Generator().manual_seed(0), selection)
    assert len(motifs) == count
    return squared_distances(blocks.rows, motifs[nearest(blocks.rows, motifs)]).sum()


def test_spread_selection_of_many_blocks_finds_far_ones_in_a_sample(monkeypatch):
    # As of a network's layers, few of which have large weights: uniform draws leave those far from every motif.
    generator = np.random.default_rng(0)
    layers = [generator.normal(size=(200_000, 2)) * 0.02, generator.normal(size=(100, 2))]
    blocks = blocks_of(layers, 2)
    searched = []

    def counting(rows, motifs, *others):
        searched.append(len(rows))
        return nearest(rows, motifs, *others)

    monkeypatch.setattr(motif_selection, "nearest", counting)
    sampled = first_distortion(blocks, 200, "spread")
    assert set(searched) == {1 << 17}
    monkeypatch.setattr(motif_selection, "_SAMPLED", len(blocks.rows))
    assert sampled < 1.2 * first_distortion(blocks, 200, "spread")
    assert sampled < 0.2 * first_distortion(blocks, 200, "distinct")


def test_spread_selection_from_mostly_zeros_finds_as_many_motifs_as_there_are():
    values = np.zeros((400_000, 2))
    values[::20] = np.random.default_rng(0).normal(size=(20_000, 2))
    motifs = select_motifs(blocks_of([values], 2), 15_000, torch.Generator().manual_seed(0), "spread")
    assert len(motifs) == 15_000


def test_equal_blocks_pull_motifs_as_often_as_they_are():
    # Nine motifs for ten places: the place of few blocks is the one to go without, wherever it is.
    places = np.arange(20.0).reshape(10, 2) + 1
    for rare in range(10):
        frequent = np.repeat(places, [1 if place == rare else 500 for place in range(10)], axis=0)
        found = [
            (
                select_motifs(
                    blocks_of([frequent], 2), 9, torch.Generator().manual_seed(seed), "spread", force_zero=False
                )
                == places[rare]
            )
            .all(1)
            .any()
            for seed in range(5)
        ]
        assert sum(found) <= 1


@pytest.mark.parametrize("selection", SELECTIONS)
def test_motifs_that_are_kept_are_part_of_the_selection(selection):
    # Each block is there twice.
    blocks = blocks_of([np.tile(np.random.default_rng(0).normal(size=(500, 2)), (2, 1))], 2)
    kept = np.concatenate([np.zeros((1, 2)), blocks.rows[:20]])
    for count in (5, 21, 60, 501):
        motifs = select_motifs(blocks, count, torch.Generator().manual_seed(0), selection, kept=kept)
        np.testing.assert_array_equal(motifs[:21], kept[:count])
        assert len(motifs) == len(np.unique(motifs, axis=0)) == count


def test_kept_motifs_are_the_most_used_ones():
    loop = Loop(MoMos(capacity=0.25, keep=0.5, lloyd_steps=0))
    loop.steps(2)
    item = loop.mode.state_dict()["mosaics"][0]
    counts = torch.bincount(item["assignment"], minlength=len(item["motifs"]))
    top = item["motifs"][counts[1:].argmax() + 1]
    loop.steps(2)
    after = loop.mode.state_dict()["mosaics"][0]["motifs"]
    assert (after == top).all(1).any()


@pytest.mark.parametrize("name", ["plain", "uniform_qat", "uniform_qat per tensor", "codeq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mosaic_files_reach_the_nominal_length_and_reload_bit_for_bit(name, dtype, tmp_path):
    options = CONFIGURATIONS[name]
    model = network().to(dtype)
    momos = MoMos(capacity=0.25, **options)
    momos.prepare(model)
    momos.after_epoch()
    bits = save_mosaics(tmp_path / "a.safetensors", momos)
    nominal = momos.report()["nominal_bits"]
    assert nominal <= bits < nominal + 16 * len(momos.state_dict()["mosaics"])
    state = load_mosaics(tmp_path / "a.safetensors")
    plain = momos.convert(model)
    assert set(state) == set(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), key
        assert state[key].dtype == value.dtype
        assert state[key].is_floating_point() is False or not torch.signbit(state[key][state[key] == 0]).any()
    network().to(dtype).load_state_dict(state)


def test_mosaic_files_keep_tied_weights_and_refuse_what_is_broken(tmp_path):
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "head": nn.Linear(8, 20)})
    model["head"].weight = model["embedding"].weight
    momos = MoMos(motifs=5, quantiser="uniform_qat", bits=4)
    momos.prepare(model)
    momos.after_epoch()
    path = tmp_path / "a.safetensors"
    save_mosaics(path, momos)
    state = load_mosaics(path)
    assert torch.equal(state["head.weight"], momos.convert(model)["embedding"].weight)
    with pytest.raises(SpecError, match="momos"):
        save_mosaics(path, UniformQAT())
    with pytest.raises(SourceNotFoundError):
        load_mosaics(tmp_path / "b.safetensors")
    data = path.read_bytes()
    for broken in (b"", data[:50], data[:-3], data.replace(b'\\"motifs\\": 5', b'\\"motifs\\": 9')):
        path.write_bytes(broken)
        with pytest.raises(FormatError):
            load_mosaics(path)


@pytest.mark.parametrize(
    "options",
    [
        {"every": "0 steps"},
        {"every": "often"},
        {"selection": "best"},
        {"keep": 1.5},
        {"quantiser": "sign"},
        {"bits": 1, "quantiser": "codeq"},
        {"target_zeros": 0.5},
    ],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(SpecError, match="momos"):
        MoMos(**options)


def test_specifications_build_the_mode_again(options):
    configured = MoMos(capacity=0.25, **options)
    assert mode(configured.spec) == configured
