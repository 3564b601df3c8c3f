"""Means over seeds: which runs belong together, and what is told of them."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from kcomplex.analyses.experiments.experiment import Experiment
from kcomplex.analyses.experiments.run import BITS, run
from kcomplex.analyses.studies.front import measured
from kcomplex.analyses.studies.seeds import compute, compute_from_runs
from kcomplex.cli.plot import plot as plot_command
from kcomplex.errors import SpecError

SHORT = Experiment("first", network="mlp:hidden=8", mode="codeq", epochs=1, estimators=("raw",))


@pytest.fixture
def runs(tmp_path: Path, unmeasured: None) -> Path:
    for name, changes in (
        ("first", {}),
        ("second", {"seed": 1}),
        ("alone", {"lr": 0.01}),
        ("measured_otherwise", {"seed": 2, "estimators": ("zlib",), "every": 5}),
    ):
        run(dataclasses.replace(SHORT, name=name, **changes), tmp_path)
    return tmp_path


def test_runs_that_differ_in_their_seed_alone_are_one_row(runs: Path) -> None:
    single = measured(runs).set_index("run")
    table = compute_from_runs(runs).sort_values("seeds")
    alone, together = (table.iloc[place] for place in range(2))
    assert (alone["seeds"], together["seeds"]) == (1, 3)
    assert alone["accuracy"] == single.loc["alone", "accuracy"]
    assert pd.isna(alone["accuracy_std"])
    for column in ("accuracy", "bytes", "rate", "bit_operations"):
        values = single.loc[["first", "second", "measured_otherwise"], column]
        assert together[column] == pytest.approx(statistics.mean(values))
        assert together[f"{column}_std"] == pytest.approx(statistics.stdev(values))


def test_what_one_of_several_runs_lacks_has_no_mean(runs: Path) -> None:
    (runs / "second" / BITS).unlink()
    together = compute_from_runs(runs).set_index("seeds").loc[3]
    assert pd.isna(together["bit_operations"])
    assert together["accuracy"] > 0


def test_a_run_counts_once(runs: Path) -> None:
    frame = measured(runs)
    with pytest.raises(SpecError, match="first"):
        compute(pd.concat([frame, frame[frame["run"] == "first"]]))
    with pytest.raises(SpecError, match="decoded"):
        compute_from_runs(runs, metric="train_loss_nats")


def test_the_command_writes_table_and_figure(runs: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(plot_command)
    CliRunner().invoke(app, ["seeds", str(runs), "-o", str(tmp_path / "seeds.png")], catch_exceptions=False)
    assert sorted(pd.read_csv(tmp_path / "seeds.png.csv")["seeds"]) == [1, 3]
    assert (tmp_path / "seeds.png").stat().st_size > 1000
