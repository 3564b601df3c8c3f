"""The front of finished runs: what is reported is what comes out of the decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from kcomplex.analyses.experiments.data.data import load
from kcomplex.analyses.experiments.experiment import Experiment
from kcomplex.analyses.experiments.networks.networks import network
from kcomplex.analyses.experiments.run import BITS, FINAL, run
from kcomplex.analyses.experiments.training import evaluate
from kcomplex.analyses.studies.front import compute, compute_from_runs, measured, plot, upper_hull
from kcomplex.cli.plot import plot as plot_command
from kcomplex.errors import RunError, SpecError, WeightsError

QUANTISED = "drr:alpha=0.001,include=*,cleaning=graph|uniform_qat:bits=4,include=*"
SHORT = Experiment(
    "pruned", network="mlp:hidden=16", mode=QUANTISED, epochs=8, fine_tune_epochs=2, lr=0.01, estimators=("raw",)
)


@pytest.fixture
def runs(tmp_path: Path, unmeasured: None) -> Path:
    run(SHORT, tmp_path)
    run(dataclasses.replace(SHORT, name="plain", mode="baseline", epochs=1), tmp_path)
    (tmp_path / "unfinished").mkdir()
    return tmp_path


def test_runs_are_measured_on_what_their_decoder_gives_back(runs: Path) -> None:
    frame = compute_from_runs(runs)
    assert list(frame["run"]) == ["pruned", "plain"]
    pruned, plain = (frame.iloc[place] for place in range(2))
    tensors, data = load_file(runs / "pruned" / FINAL), load("digits")
    model = network(SHORT.network).build(data.input_shape, data.classes)
    model.load_state_dict(tensors)
    assert pruned["accuracy"] == pytest.approx(evaluate(model, data.test)[1])
    assert pruned["parameters"] == plain["parameters"] == plain["non_zeros"] == 64 * 16 + 16 + 16 * 10 + 10
    assert pruned["non_zeros"] <= sum(int(tensor.count_nonzero()) for tensor in tensors.values())
    assert pruned["rate"] == pytest.approx(pruned["parameters"] / pruned["non_zeros"])
    assert plain["units"] == "16-10"
    assert pruned["bytes"] < plain["bytes"]
    # The values of the plain network alone don't fit into less.
    assert plain["bytes"] > 3.5 * plain["non_zeros"]
    assert plain["bit_operations"] == 1
    # Every weight multiplies once: 4 bits for 32, and zeros none at all.
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight")]
    alive = sum(int(tensor.count_nonzero()) for tensor in weights) / sum(tensor.numel() for tensor in weights)
    assert pruned["bit_operations"] == pytest.approx(alive * 4 / 32)
    for _, row in frame.iterrows():
        assert row["description_bytes"] == pytest.approx(row["bytes"] + row["data_bytes"])
    assert frame["pareto"].iloc[0]
    figure = plot(frame)
    assert {text.get_text() for text in figure.get_legend().get_texts()} >= {"baseline", "drr | uniform_qat"}


def test_what_a_run_did_not_keep_is_not_made_up(runs: Path) -> None:
    bits = runs / "pruned" / BITS
    bits.unlink()
    frame = measured(runs).set_index("run")
    assert np.isnan(frame.loc["pruned", "bit_operations"])
    assert frame.loc["plain", "bit_operations"] == 1
    for broken in ("{", "[4]", '{"1.weight": "x"}', '{"another": 4}'):
        bits.write_text(broken)
        with pytest.raises(RunError, match="pruned"):
            measured(runs)


def test_another_code_can_be_chosen_and_must_be_one(runs: Path) -> None:
    assert (measured(runs, "lzma")["bytes"] != measured(runs)["bytes"]).all()
    with pytest.raises(WeightsError, match="sparsity"):
        measured(runs, "sparsity")
    with pytest.raises(SpecError, match="decoded"):
        compute_from_runs(runs, metric="train_loss_nats")


def test_a_folder_without_finished_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finished"):
        measured(tmp_path)


def test_the_command_writes_table_and_figure(runs: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(plot_command)
    CliRunner().invoke(app, ["front", str(runs), "-o", str(tmp_path / "front.png")], catch_exceptions=False)
    assert list(pd.read_csv(tmp_path / "front.png.csv")["run"]) == ["pruned", "plain"]
    assert (tmp_path / "front.png").stat().st_size > 1000


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_the_hull_is_above_every_point_and_concave(points: list[tuple[int, int]]) -> None:
    costs, gains = np.array(points, float).T
    chosen = upper_hull(costs, gains)
    order = np.argsort(costs[chosen])
    x, y = costs[chosen][order], gains[chosen][order]
    assert y[-1] == gains.max()
    assert x[0] == costs.min()
    inside = costs <= x[-1]
    assert (gains[inside] <= np.interp(costs[inside], x, y) + 1e-9).all()
    slopes = np.diff(y) / np.diff(x)
    assert (np.diff(slopes) < 1e-9).all()
    assert (slopes > 0).all()


def test_a_single_row_is_on_the_front() -> None:
    frame = compute(pd.DataFrame({"bytes": [10], "accuracy": [0.5]}))
    assert frame[["pareto", "hull"]].all(axis=None)
