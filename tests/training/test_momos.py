"""MoMos: published projections bit for bit, and what our own mode promises."""

import io
import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.errors import SpecError, WeightsError
from kcomplex.motifs.blocks import blocks_of, draw_motifs, motif_count
from kcomplex.motifs.nearest import nearest, squared_distances
from kcomplex.sources.open import open_weights
from kcomplex.training.protocol.sequence import mode
from kcomplex.training.quantising.uniform_qat import quantise_uniformly
from kcomplex.training.sharing.momos import MoMos
from kcomplex.training.sharing.mosaics import Projection, array_of, replaced
from tests.golden import golden_files


def files_with(key):
    """Return the golden files of one layout, which has an array of this name."""
    return [path for path in golden_files("momos_*.npz") if key in np.load(path).files]


FILES = files_with("motif_block_index")
REPEATED = files_with("perms")
QUANTISED = files_with("q_bits")


class Holder(nn.Module):
    """Arrays as parameters, in order."""

    def __init__(self, arrays, requires_grad=None):
        super().__init__()
        for index, array in enumerate(arrays):
            trainable = requires_grad is None or bool(requires_grad[index])
            self.register_parameter(f"p{index}", nn.Parameter(torch.tensor(array), requires_grad=trainable))


def inputs(case, key="in"):
    return [case[f"{key}_{index}"] for index in range(int(case["n_params_tensors"]))]


def participants(case, key="in"):
    return [a for a, wanted in zip(inputs(case, key), case["requires_grad"], strict=True) if wanted and a.size]


def test_golden_files_are_found():
    assert len(FILES) >= 15


def project(tensors: list[torch.Tensor], motifs: np.ndarray) -> Projection:
    """Return tensors with every block replaced by its nearest motif, padding counted, as published."""
    blocks = blocks_of([array_of(tensor) for tensor in tensors], motifs.shape[1])
    casts = [partial(like, tensor) for tensor in tensors]
    return replaced(tensors, motifs, nearest(blocks.rows, motifs), casts)


def like(tensor: torch.Tensor, flat: np.ndarray) -> torch.Tensor:
    """Return flat values in the dtype and shape of a tensor."""
    return torch.from_numpy(flat).to(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_blocks_and_bank_are_the_published_ones(path):
    case = np.load(path)
    size, zero = int(case["s"]), bool(case["force_zero"])
    blocks = blocks_of(participants(case), size)
    np.testing.assert_array_equal(blocks.rows, case["blocks"])
    count = int(case["k_requested"])
    if not np.isnan(case["capacity"]):
        assert motif_count(float(case["capacity"]), len(blocks.rows), reference=True) == count
    motifs = draw_motifs(blocks, count, case["perm"].astype(np.intp), force_zero=zero, reference=True)
    np.testing.assert_array_equal(motifs, case["motifs"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_projection_is_the_published_one(path):
    case = np.load(path)
    motifs = case["motifs"].astype(np.float64)
    result = project([torch.tensor(array) for array in participants(case)], motifs)
    chosen = squared_distances(case["blocks"].astype(np.float64), motifs[result.assignment])
    assert (chosen <= case["dist2_best_f64"] * (1 + 1e-6) + 1e-12).all()
    if (case["dist2_chosen_f64"] > case["dist2_best_f64"] * (1 + 1e-6) + 1e-12).any():
        # The published float32 distances cancel here: ours are to be better, and a motif is nearest to itself.
        assert result.distortion <= float(case["distortion"])
        own = case["motif_block_index"]
        np.testing.assert_array_equal(motifs[result.assignment[own]], case["blocks"][own])
        return
    np.testing.assert_array_equal(result.assignment, case["assign"])
    for ours, theirs in zip(result.tensors, participants(case, "out"), strict=True):
        assert ours.numpy().tobytes() == theirs.tobytes()
        assert ours.numpy().dtype == theirs.dtype
    assert result.distortion == pytest.approx(float(case["distortion"]), rel=1e-6)
    assert result.changed == int(case["num_changed_weights"])
    counts = case["motif_counts"]
    np.testing.assert_array_equal(result.counts, counts[: len(result.counts)])
    assert not counts[len(result.counts) :].any()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference_mode_draws_and_projects_as_published(path):
    case = np.load(path)
    capacity = None if np.isnan(case["capacity"]) else float(case["capacity"])
    model = Holder(inputs(case), case["requires_grad"])
    if "buffer_in" in case:
        model.register_buffer("buffer", torch.tensor(case["buffer_in"]))
    momos = MoMos(
        block_size=int(case["s"]),
        capacity=capacity,
        motifs=int(case["k_requested"]) if capacity is None else None,
        force_zero=bool(case["force_zero"]),
        seed=int(case["torch_seed"]),
        reference=True,
    )
    momos.prepare(model)
    momos.after_epoch()
    if "nearone" in path.stem:
        assert momos.report()["distortion"] < float(case["distortion"])
        return
    for ours, theirs in zip(model.parameters(), inputs(case, "out"), strict=True):
        assert ours.detach().numpy().tobytes() == theirs.tobytes()
    if "buffer_out" in case:
        np.testing.assert_array_equal(model.buffer.numpy(), case["buffer_out"])
    assert momos.report()["motifs_used"] == np.count_nonzero(case["motif_counts"])


def originals(case):
    """Return the tensors before the first of repeated projections."""
    return [case[key] for key in sorted(case.files) if re.fullmatch(r"in_\d+", key)]


@pytest.mark.parametrize("path", REPEATED, ids=lambda path: path.stem)
def test_published_bank_collapses_when_projections_repeat(path):
    case = np.load(path)
    tensors = [torch.tensor(array) for array in originals(case)]
    for step, permutation in enumerate(case["perms"]):
        blocks = blocks_of([tensor.numpy() for tensor in tensors], int(case["s"]))
        motifs = draw_motifs(blocks, int(case["k"]), permutation.astype(np.intp), reference=True)
        result = project(tensors, motifs)
        tensors = result.tensors
        for index, tensor in enumerate(tensors):
            np.testing.assert_array_equal(tensor.numpy(), case[f"out_{index}_step{step}"])
        np.testing.assert_array_equal(result.counts, case[f"counts_step{step}"])
        assert np.count_nonzero(result.counts) == case["used_motifs"][step]
        assert result.distortion == pytest.approx(float(case["distortion"][step]), rel=1e-6)


@pytest.mark.parametrize("path", REPEATED, ids=lambda path: path.stem)
def test_nothing_changes_when_our_projections_repeat(path):
    case = np.load(path)
    model = Holder(originals(case))
    momos = MoMos(block_size=int(case["s"]), motifs=int(case["k"]), include=("p*",))
    momos.prepare(model)
    momos.after_epoch()
    assert momos.report()["distortion"] > 0
    after = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(7):
        momos.after_epoch()
        assert momos.report()["distortion"] == 0
        assert momos.report()["motifs_used"] == int(case["k"])
        for parameter, tensor in zip(model.parameters(), after, strict=True):
            assert torch.equal(parameter, tensor)


@pytest.mark.parametrize("path", QUANTISED, ids=lambda path: path.stem)
def test_latent_weights_under_a_quantiser_are_projected_as_published(path):
    case = np.load(path)
    order = [name.replace("parametrizations.weight.original", "weight") for name in case["param_order"]]
    tensors = [torch.tensor(case["in_" + name.replace(".", "_")]) for name in order]
    blocks = blocks_of([tensor.numpy() for tensor in tensors], int(case["s"]))
    motifs = draw_motifs(blocks, int(case["k"]), case["perm"].astype(np.intp), reference=True)
    result = project(tensors, motifs)
    for name, tensor in zip(case["param_order"], result.tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), case["latent_" + name.replace(".", "_")])
        if not name.endswith("bias"):
            latent = name.endswith("original")
            view = quantise_uniformly(tensor, int(case["q_bits"])) if latent else tensor
            np.testing.assert_array_equal(view.numpy(), case[f"view_{name[0]}_weight"])
    np.testing.assert_array_equal(result.counts, case["motif_counts"])
    assert result.distortion == pytest.approx(float(case["distortion"]), rel=1e-6)
    assert result.changed == int(case["num_changed_weights"])


@pytest.mark.parametrize("path", QUANTISED, ids=lambda path: path.stem)
def test_reference_mode_projects_latent_weights_as_published(path, monkeypatch):
    case = np.load(path)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(case["perm"]))
    model = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 4))
    names = [key.removeprefix("in_") for key in case.files if key.startswith("in_")]
    model.load_state_dict({name.replace("_", "."): torch.tensor(case[f"in_{name}"]) for name in names})
    options = {"quantiser": "uniform_qat", "bits": int(case["q_bits"]), "motifs": int(case["k"])}
    momos = MoMos(int(case["s"]), capacity=None, reference=True, **options)
    momos.prepare(model)
    momos.after_epoch()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), case["latent_" + name.replace(".", "_")])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 7), nn.ReLU())


def train(model, momos, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(momos.parameter_groups(lr=0.05), momentum=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 1, 8, 8, generator=generator)).square().mean()
        (loss + momos.penalty()).backward()
        optimizer.step()
        momos.after_step()


def block_values(model, size=4):
    weights = [model[0].weight, model[3].weight]
    return {tuple(row) for row in blocks_of([w.detach().numpy() for w in weights], size).rows.tolist()}


def test_default_projects_weights_of_layers_and_nothing_else():
    model = network()
    others = {name: value.clone() for name, value in model.state_dict().items() if name not in ("0.weight", "3.weight")}
    momos = mode("momos:block_size=4,capacity=0.1")
    momos.prepare(model)
    momos.after_epoch()
    for name, value in others.items():
        assert torch.equal(model.state_dict()[name], value)
    report = momos.report()
    assert report["motifs"] == 32
    # The tails of tensors are beginnings of motifs, so that there may be one more value a tensor.
    assert len(block_values(model)) <= report["motifs_used"] + 2


def digits_loss(momos, lr, epochs=8):
    """Return the final training loss of an MLP on digits that was trained in a mode."""
    images, labels = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    momos.prepare(model)
    optimizer = torch.optim.AdamW(momos.parameter_groups(lr=lr), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
        momos.after_epoch()
    return cross_entropy(model(inputs), labels).item()


@pytest.mark.parametrize("capacity", [0.01, 0.05])
def test_small_steps_train_as_well_as_published(capacity):
    # Blocks that move less in an epoch than motifs are apart are lost if they go back to where they came from.
    ours, published = (digits_loss(MoMos(capacity=capacity, reference=r), lr=1e-3) for r in (False, True))
    assert ours < 1.15 * published


def test_excluded_parameters_keep_their_values():
    model = network()
    before = model[3].weight.detach().clone()
    momos = MoMos(motifs=4, exclude=("3.*",))
    momos.prepare(model)
    momos.after_epoch()
    assert torch.equal(model[3].weight, before)


def test_what_the_network_computes_with_is_the_mosaic():
    model = network()
    momos = MoMos(motifs=4)
    momos.prepare(model)
    momos.after_epoch()
    effective = torch.from_numpy(open_weights(model)["3.weight"].values())
    assert torch.equal(effective, model[3].weight)
    assert len(torch.unique(effective.reshape(-1, 4), dim=0)) <= 4


def test_equal_seeds_give_equal_weights_and_others_do_not():
    states = []
    for seed in (1, 1, 2):
        model, momos = network(), MoMos(capacity=0.05, seed=seed)
        momos.prepare(model)
        torch.manual_seed(len(states))
        momos.after_epoch()
        states.append(model[3].weight.detach().clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("options", [{}, {"reuse": False}, {"scope": "tensor"}, {"reference": True}], ids=str)
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_training_resumes_bit_for_bit(options, every):
    def start():
        model, momos = network(), MoMos(capacity=0.2, every=every, **options)
        momos.prepare(model)
        return model, momos

    straight, mode_straight = start()
    first, mode_first = start()
    for model, momos in ((straight, mode_straight), (first, mode_first)):
        train(model, momos, 3)
        momos.after_epoch()
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "mode": mode_first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, mode_resumed = start()
    resumed.load_state_dict(saved["model"])
    mode_resumed.load_state_dict(saved["mode"])
    assert mode_resumed.report() == mode_first.report()
    for model, momos in ((straight, mode_straight), (resumed, mode_resumed)):
        train(model, momos, 3, seed=1)
        momos.after_epoch()
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert mode_resumed.report() == mode_straight.report()


def test_state_before_the_first_projection_comes_back_too():
    model, momos = network(), MoMos(capacity=0.1)
    momos.prepare(model)
    state = momos.state_dict()
    momos.after_epoch()
    momos.load_state_dict(state)
    assert momos.report() == {}


def test_a_state_of_another_network_is_refused():
    momos, other = MoMos(capacity=0.1), MoMos(capacity=0.1)
    momos.prepare(network())
    other.prepare(nn.Linear(40, 40))
    other.after_epoch()
    with pytest.raises(SpecError, match="other blocks"):
        momos.load_state_dict(other.state_dict())


def test_convert_projects_what_has_left_the_mosaic_and_changes_neither_model_nor_mode():
    model, momos = network(), MoMos(capacity=0.1)
    momos.prepare(model)
    momos.after_epoch()
    train(model, momos, 2)
    before, state = model[3].weight.detach().clone(), momos.state_dict()
    plain = momos.convert(model)
    assert torch.equal(model[3].weight, before)
    assert torch.equal(momos.state_dict()["generator"], state["generator"])
    assert torch.equal(momos.state_dict()["mosaics"][0]["motifs"], state["mosaics"][0]["motifs"])
    assert not torch.equal(plain[3].weight, before)
    assert len(block_values(plain)) <= 32 + 2
    momos.after_epoch()
    assert torch.equal(plain[3].weight, model[3].weight)


@pytest.mark.parametrize("reference", [False, True])
def test_convert_keeps_weights_that_are_on_the_mosaic(reference):
    model, momos = network(), MoMos(capacity=0.1, reference=reference)
    momos.prepare(model)
    momos.after_epoch()
    for one, other in zip(momos.convert(model).parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_convert_makes_a_mosaic_even_before_the_first_projection():
    model, momos = network(), MoMos(motifs=3)
    momos.prepare(model)
    assert len(block_values(momos.convert(model))) <= 3 + 2
    assert momos.report() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_on_the_mosaic_exactly(dtype):
    model = network().to(dtype)
    momos = MoMos(capacity=0.05)
    momos.prepare(model)
    momos.after_epoch()
    assert model[3].weight.dtype is dtype
    before = model[3].weight.detach().clone()
    momos.after_epoch()
    assert momos.report()["changed"] == 0
    assert torch.equal(model[3].weight, before)


def test_each_tensor_may_have_its_own_motifs():
    model, momos = network(), MoMos(motifs=3, scope="tensor")
    momos.prepare(model)
    momos.after_epoch()
    rows = model[3].weight.detach().reshape(-1, 4)
    assert len(torch.unique(rows, dim=0)) == 3
    assert momos.report()["motifs"] == 6
    banks = [item["motifs"] for item in momos.state_dict()["mosaics"]]
    assert not torch.equal(banks[0], banks[1])


def test_lloyd_steps_lower_the_distortion():
    distortions = []
    for steps in (0, 1, 5):
        model, momos = network(), MoMos(capacity=0.1, lloyd_steps=steps)
        momos.prepare(model)
        momos.after_epoch()
        distortions.append(momos.report()["distortion"])
    assert distortions[0] > distortions[1] > distortions[2]


def test_a_bank_drawn_from_equal_blocks_is_drawn_again():
    model = nn.Linear(40, 40, bias=False)
    nn.init.constant_(model.weight, 0.5)
    momos = MoMos(motifs=9)
    momos.prepare(model)
    momos.after_epoch()
    assert momos.report()["motifs"] == 2
    with torch.no_grad():
        model.weight += torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    momos.after_epoch()
    assert momos.report()["motifs_used"] == 9


def test_report_gives_the_nominal_length():
    model, momos = network(), MoMos(capacity=0.1)
    momos.prepare(model)
    assert momos.report() == {}
    momos.after_epoch()
    report = momos.report()
    blocks, weights, used = 12 + 315, 45 + 1260, int(report["motifs_used"])
    assert report["nominal_bits"] == used * 4 * 32 + blocks * np.ceil(np.log2(used))
    assert report["relative_algorithmic_compression"] == 32 * weights / report["nominal_bits"]


def test_diverged_weights_are_named():
    model, momos = network(), MoMos(capacity=0.1)
    momos.prepare(model)
    with torch.no_grad():
        model[3].weight[2, 5] = float("nan")
    with pytest.raises(WeightsError, match=r"'3\.weight'.* flat index 365"):
        momos.after_epoch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size"),
        ({"capacity": None}, "either capacity or motifs"),
        ({"capacity": 0.05, "motifs": 4}, "exclude each other"),
        ({"capacity": 0.0}, r"capacity must be in \(0, 1\]"),
        ({"capacity": 1.5}, r"capacity must be in \(0, 1\]"),
        ({"motifs": 0}, r"motifs must be in \[1, inf\)"),
        ({"motifs": 1}, "every weight would become zero"),
        ({"every": "batch"}, "every"),
        ({"scope": "layer"}, "scope"),
        ({"lloyd_steps": -1}, "lloyd_steps"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        MoMos(**options)


def test_a_capacity_that_leaves_only_zero_is_refused():
    with pytest.raises(SpecError, match="every weight would become zero"):
        MoMos(capacity=0.001).prepare(network())
    MoMos(capacity=0.001, force_zero=False).prepare(network())


def test_complex_parameters_are_refused():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(8, dtype=torch.complex64))
    with pytest.raises(SpecError, match="complex64"):
        MoMos(include=("*",)).prepare(model)


def test_it_must_be_attached_first():
    with pytest.raises(SpecError, match="prepare"):
        MoMos().after_epoch()


def test_specification_and_defaults_agree():
    momos = mode("momos:block_size=8,motifs=64,every=step,include=a*+b*")
    assert momos == MoMos(block_size=8, motifs=64, every="step", include=("a*", "b*"))
    assert mode(momos.spec) == momos
