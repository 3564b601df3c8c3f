"""Runs: deterministic, resumable bit for bit, skipped when done."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kcomplex.analyses.experiments.data.data import load
from kcomplex.analyses.experiments.experiment import Experiment, experiment_from, read_experiment
from kcomplex.analyses.experiments.networks.networks import network
from kcomplex.analyses.experiments.run import CHECKPOINT, CONFIGURATION, FINAL, is_done, run
from kcomplex.analyses.experiments.training import Training
from kcomplex.errors import RunError, SpecError
from kcomplex.measuring.measure import describe
from kcomplex.tracking.frames import load_configurations, load_runs, load_snapshots

SHORT = Experiment(
    "short", network="mlp:hidden=16", epochs=2, fine_tune_epochs=1, batch_size=200, lr=0.01, estimators=("raw", "zstd")
)
MODES = [
    "baseline",
    "uniform_qat",
    "codeq:target_zeros=0.5",
    "momos:capacity=0.2",
    "momos:capacity=0.2,quantiser=codeq,bits=4",
    "pmmp:rising_epochs=2",
    "drr|codeq",
    "gradual_pruning:span=10,every=2",
    "lottery_ticket:rounds=1,epochs=1",
    "low_rank:every=4",
    "hashed_sharing",
]


class Interruption(Exception):
    """Stands for whatever may stop a run."""


def same(one: Path, other: Path) -> bool:
    left, right = load_file(one / FINAL), load_file(other / FINAL)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides_the_weights(tmp_path: Path, mode: str) -> None:
    experiment = dataclasses.replace(SHORT, mode=mode)
    first = run(experiment, tmp_path / "a")
    torch.rand(7)
    assert same(first, run(experiment, tmp_path / "b"))
    assert not same(first, run(dataclasses.replace(experiment, seed=1), tmp_path / "c"))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_continues_to_the_same_weights(tmp_path: Path, mode: str, stop: int) -> None:
    experiment = dataclasses.replace(SHORT, mode=mode)
    whole = run(experiment, tmp_path / "whole")

    def interrupt(epoch: int, metrics: Mapping[str, float]) -> None:
        if epoch == stop:
            raise Interruption

    with pytest.raises(Interruption):
        run(experiment, tmp_path / "parts", progress=interrupt)
    assert not is_done(experiment, tmp_path / "parts")
    epochs: list[int] = []
    parts = run(experiment, tmp_path / "parts", progress=lambda epoch, metrics: epochs.append(epoch))
    assert epochs == list(range(stop + 1, 4))
    assert same(whole, parts)
    columns = ["step", "epoch", "accuracy", "train_loss_nats", "validation_loss_nats"]
    assert load_snapshots(parts)[columns].equals(load_snapshots(whole)[columns])


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stop", [0, 1])
def test_a_run_that_stops_inside_an_epoch_begins_that_epoch_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = run(SHORT, tmp_path / "whole")
    original = Training._pass

    def interrupt(training: Training) -> float:
        mean = original(training)
        if training.epoch == stop:
            raise Interruption
        return mean

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_pass", interrupt)
        with pytest.raises(Interruption):
            run(SHORT, tmp_path / "parts")
    parts = run(SHORT, tmp_path / "parts")
    assert same(whole, parts)
    assert list(load_snapshots(parts)["epoch"]) == [0, 1, 2, 3]


@pytest.mark.usefixtures("unmeasured")
def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    path = run(SHORT, tmp_path)
    assert is_done(SHORT, tmp_path)
    assert not (path / CHECKPOINT).exists()
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}

    def refuse(epoch: int, metrics: Mapping[str, float]) -> None:
        raise AssertionError("a finished run was trained again")

    assert run(SHORT, tmp_path, progress=refuse) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.usefixtures("unmeasured")
def test_the_configuration_is_kept_with_the_run(tmp_path: Path) -> None:
    path = run(SHORT, tmp_path)
    assert read_experiment(path / CONFIGURATION) == SHORT
    stored = load_configurations(path).iloc[0]
    assert stored["status"] == "finished"
    assert SHORT.mode in str(stored.to_dict())
    with safe_open(path / FINAL, framework="pt") as file:
        assert experiment_from(json.loads(file.metadata()["experiment"]), "metadata") == SHORT


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("field", "value"), [("seed", 5), ("mode", "codeq"), ("estimators", ("raw",))])
def test_another_experiment_in_the_same_folder_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = run(SHORT, tmp_path)
    content = (path / FINAL).read_bytes()
    with pytest.raises(RunError, match=f"another experiment .*{field} is"):
        run(dataclasses.replace(SHORT, **{field: value}), tmp_path)
    assert (path / FINAL).read_bytes() == content


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / SHORT.name).mkdir()
    (tmp_path / SHORT.name / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="isn't a run"):
        run(SHORT, tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / SHORT.name).write_text("precious")
    with pytest.raises(RunError, match="isn't a run"):
        run(SHORT, tmp_path)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no" * 99])
def test_a_broken_checkpoint_is_refused(tmp_path: Path, damage: Any) -> None:
    def interrupt(epoch: int, metrics: Mapping[str, float]) -> None:
        raise Interruption

    with pytest.raises(Interruption):
        run(SHORT, tmp_path, progress=interrupt)
    checkpoint = tmp_path / SHORT.name / CHECKPOINT
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(RunError, match=r"checkpoint\.pt"):
        run(SHORT, tmp_path)


@pytest.mark.usefixtures("unmeasured")
def test_a_run_leaves_the_generator_and_the_number_of_threads_alone(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(dataclasses.replace(SHORT, threads=threads + 1), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("unmeasured")
def test_snapshots_are_taken_as_asked_and_at_the_end_of_each_phase(tmp_path: Path) -> None:
    path = run(dataclasses.replace(SHORT, epochs=5, fine_tune_epochs=2, every=3), tmp_path)
    snapshots = load_snapshots(path)
    assert list(snapshots["epoch"]) == [0, 3, 5, 6, 7]
    assert list(snapshots["step"]) == [0, 18, 30, 36, 42]
    assert snapshots["accuracy"].isna().tolist() == [True, False, False, False, False]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("mode", MODES)
def test_the_final_weights_are_the_plain_network_that_was_evaluated(tmp_path: Path, mode: str) -> None:
    last: dict[str, float] = {}
    path = run(dataclasses.replace(SHORT, mode=mode), tmp_path, progress=lambda _, metrics: last.update(metrics))
    data = load("digits")
    plain = network(SHORT.network).build(data.input_shape, data.classes)
    plain.load_state_dict(load_file(path / FINAL), strict=True)
    with torch.no_grad():
        right = (plain(data.test.inputs).argmax(1) == data.test.labels).double().mean()
    assert float(right) == pytest.approx(last["accuracy"])


@pytest.mark.usefixtures("unmeasured")
def test_training_improves_the_network(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    run(
        dataclasses.replace(SHORT, epochs=12, lr=0.02), tmp_path, progress=lambda _, metrics: seen.append(dict(metrics))
    )
    assert seen[-1]["accuracy"] > 0.85
    assert seen[-1]["train_loss_nats"] < seen[0]["train_loss_nats"] / 2
    assert all(0 <= metrics[name] <= 1 for metrics in seen for name in ("accuracy", "validation_accuracy"))


@pytest.mark.usefixtures("unmeasured")
def test_a_training_that_diverges_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="lower lr"):
        run(dataclasses.replace(SHORT, optimizer="sgd", lr=1e18), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no CUDA device"):
        run(dataclasses.replace(SHORT, device="cuda"), tmp_path)


def test_a_mode_that_prices_parameters_gets_the_number_of_training_samples() -> None:
    data = load("digits")
    free = Training(dataclasses.replace(SHORT, mode="pmmp"), data)
    fixed = Training(dataclasses.replace(SHORT, mode="pmmp:samples=7"), data)
    assert free.mode.samples == len(data.train)  # type: ignore[attr-defined]
    assert fixed.mode.samples == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_falls_to_zero_in_each_phase_or_stays(schedule: Any) -> None:
    training = Training(dataclasses.replace(SHORT, schedule=schedule), load("digits"))
    rates: list[float] = []
    training.optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    while not training.finished:
        training.run_epoch()
    steps = training.steps_per_epoch
    falling = [0.005 * (1 + math.cos(math.pi * step / (2 * steps))) for step in range(2 * steps)] + [
        0.005 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)
    ]
    assert rates == pytest.approx(falling if schedule == "cosine" else [0.01] * (3 * steps))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stop", [7, 9])
def test_a_run_that_stops_early_is_shorter_and_goes_on_where_it_was_interrupted(tmp_path: Path, stop: int) -> None:
    # A rate at which nothing is learnt: every phase is saturated as soon as its window is full.
    experiment = dataclasses.replace(SHORT, epochs=50, fine_tune_epochs=30, window=6, lr=1e-9)
    whole = run(experiment, tmp_path / "whole")
    snapshots = load_snapshots(whole)
    assert snapshots["epoch"].max() == 12

    def interrupt(epoch: int, metrics: Mapping[str, float]) -> None:
        if epoch == stop:
            raise Interruption

    with pytest.raises(Interruption):
        run(experiment, tmp_path / "parts", progress=interrupt)
    parts = run(experiment, tmp_path / "parts")
    assert same(whole, parts)
    assert load_snapshots(parts)["epoch"].max() == 12


def test_while_a_price_rises_the_objectives_are_not_compared() -> None:
    # Nothing is learned: all that changes is the price, until the eighth epoch or the twenty-fifth.
    still = dataclasses.replace(SHORT, lr=1e-12, schedule="constant", epochs=40, fine_tune_epochs=0, window=6)
    early, late = (
        Training(dataclasses.replace(still, mode=f"drr:alpha=0.01,rising_epochs={epochs}|uniform_qat"), load("digits"))
        for epochs in (8, 25)
    )
    while not early.finished:
        early.run_epoch()
    # Six objectives under the full price; what is seen after seven epochs is priced as the eighth one is.
    assert early.epoch == 7 + 6 - 1
    for _ in range(20):
        late.run_epoch()
        assert late._kept is None


def test_a_price_that_never_rises_to_its_value_is_refused(tmp_path: Path) -> None:
    experiment = dataclasses.replace(SHORT, mode="drr:rising_epochs=3|uniform_qat")
    with pytest.raises(SpecError, match="epochs must be 3 or more for 'drr:rising_epochs=3"):
        run(experiment, tmp_path)
    dataclasses.replace(experiment, epochs=3).check()


def test_a_network_that_does_not_take_the_data_leaves_nothing_behind(tmp_path: Path) -> None:
    wrong = dataclasses.replace(SHORT, network="gpt")
    with pytest.raises(SpecError, match="gpt takes characters"):
        run(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []
    run(SHORT, tmp_path)


def test_the_best_turning_point_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(dataclasses.replace(SHORT, epochs=24, window=24), load("digits"))
    objectives = iter([*[1.0] * 20, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(Training, "_objective", lambda _: next(objectives))
    weights = []
    for _ in range(24):
        training.run_epoch()
        weights.append({name: tensor.clone() for name, tensor in training.model.state_dict().items()})
    assert all(torch.equal(weights[19][name], weights[23][name]) for name in weights[0])
    assert not torch.equal(weights[19]["1.weight"], weights[22]["1.weight"])


def test_what_the_store_says_of_the_last_snapshot_holds_for_the_final_weights(tmp_path: Path) -> None:
    path = run(dataclasses.replace(SHORT, mode="momos:capacity=0.2", estimators=("raw", "palette|entropy")), tmp_path)
    frame = load_runs(path)
    last = frame[frame["step"] == frame["step"].max()].set_index("estimator")
    for description in describe(path / FINAL, ["raw", "palette|entropy"]):
        assert last.loc[description.estimator, "bits"] == description.bits
        assert last.loc[description.estimator, "kind"] == "code"
    assert last["accuracy"].notna().all()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("wanted", "times"), [(False, 0), (True, 4)])
def test_batch_norm_is_estimated_anew_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool, times: int
) -> None:
    calls: list[int] = []

    def remember(model: torch.nn.Module, batches: Any) -> int:
        calls.append(sum(len(batch) for batch in batches))
        return 0

    monkeypatch.setattr("kcomplex.analyses.experiments.training.reestimate_batch_norm", remember)
    run(dataclasses.replace(SHORT, mode="momos:capacity=0.2", reestimate_batch_norm=wanted), tmp_path)
    # After each of three epochs, and after pruning.
    assert calls == [len(load("digits").train)] * times
