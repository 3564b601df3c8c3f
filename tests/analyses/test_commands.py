"""``kcomplex train``, ``sweep`` and ``demo`` from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from kcomplex.analyses import commands, demo
from kcomplex.analyses.experiments.experiment import Experiment, read_experiment
from kcomplex.analyses.experiments.run import CONFIGURATION, FINAL
from kcomplex.errors import KComplexError, RunError, SpecError, UnknownNameError
from kcomplex.registry import registry

QUICK = ["--network", "mlp:hidden=8", "--epochs", "1", "--batch-size", "300", "-e", "raw", "-e", "zstd"]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    application = typer.Typer()
    for name in ("train", "sweep", "demo"):
        application.command(name)(registry("kcomplex.commands").load(name))
    return application


def invoke(app: typer.Typer, *arguments: object) -> Any:
    """Return the result of a command; what kcomplex refuses is raised, as the command line's main function sees it."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(result.exception, KComplexError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_train_makes_a_run_and_says_what_it_costs(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "x"
    result = invoke(app, "train", "--mode", "momos:capacity=0.2", *QUICK, "--run", path, "--csv")
    frame = pd.read_csv(io.StringIO(result.stdout))
    assert frame["estimator"].tolist() == ["raw", "zstd"]
    assert frame["accuracy"].between(0, 1).all()
    assert (frame["weights"] == 64 * 8 + 8 + 80 + 10).all()
    assert (path / FINAL).is_file()
    assert read_experiment(path / CONFIGURATION) == Experiment(
        "x", network="mlp:hidden=8", mode="momos:capacity=0.2", epochs=1, batch_size=300, estimators=("raw", "zstd")
    )
    again = invoke(app, "train", "--config", path / CONFIGURATION, "--run", path, "--json")
    assert "already done" in again.stderr
    assert [row["bits_per_weight"] for row in json.loads(again.stdout)] == frame["bits_per_weight"].tolist()


def test_options_override_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(Experiment("named", epochs=7, seed=3).to_toml())
    assert commands._experiment(config, None, {"epochs": 2}) == (Experiment("named", epochs=2, seed=3), Path("runs"))
    assert commands._experiment(config, tmp_path / "b" / "c", {}) == (Experiment("c", epochs=7, seed=3), tmp_path / "b")


@pytest.mark.usefixtures("unmeasured")
def test_a_run_that_could_not_be_measured_is_told(app: typer.Typer, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing is measured"):
        invoke(app, "train", *QUICK, "--run", tmp_path / "x")


def test_a_run_needs_a_place(app: typer.Typer) -> None:
    with pytest.raises(SpecError, match="--run"):
        invoke(app, "train", "--epochs", "1")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--mode", "momo"], UnknownNameError),
        (["--epochs", "0"], SpecError),
        (["--optimizer", "adam"], SpecError),
        (["-e", "zsdt"], UnknownNameError),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    app: typer.Typer, tmp_path: Path, arguments: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        invoke(app, "train", "--run", tmp_path / "x", *arguments)
    assert list(tmp_path.iterdir()) == []


SWEEP = """
[experiment]
network = "mlp:hidden=8"
epochs = 1
batch_size = 300
estimators = ["raw"]
[sweep]
mode = ["baseline", "codeq"]
"""


def test_sweep_trains_every_combination_once(app: typer.Typer, tmp_path: Path) -> None:
    file, runs = tmp_path / "sweep.toml", tmp_path / "runs"
    file.write_text(SWEEP)
    listed = pd.read_csv(io.StringIO(invoke(app, "sweep", file, "--runs", runs, "--dry-run", "--csv").stdout))
    assert listed["name"].tolist() == ["baseline", "codeq"]
    assert not runs.exists()
    result = invoke(app, "sweep", file, "--runs", runs, "--csv")
    assert pd.read_csv(io.StringIO(result.stdout))["run"].tolist() == ["baseline", "codeq"]
    assert invoke(app, "sweep", file, "--runs", runs, "--csv").stderr.count("already done") == 2


def test_a_sweep_with_a_wrong_run_trains_nothing(app: typer.Typer, tmp_path: Path) -> None:
    file, runs = tmp_path / "sweep.toml", tmp_path / "runs"
    file.write_text(SWEEP.replace("codeq", "codec"))
    with pytest.raises(UnknownNameError, match="codec"):
        invoke(app, "sweep", file, "--runs", runs)
    assert not runs.exists()


@pytest.mark.parametrize("data", ["digits", "mnist", "fashion-mnist"])
def test_the_demo_differs_in_nothing_but_the_mode(data: str) -> None:
    experiments = demo.demo_experiments(data, seed=4)
    assert [item.name for item in experiments] == ["baseline", "uniform_qat", "codeq", "momos", "pmmp"]
    same = [{k: v for k, v in item.to_dict().items() if k not in ("name", "mode")} for item in experiments]
    assert all(values == same[0] for values in same)
    for item in experiments:
        item.check()
        assert item.mode.partition(":")[0] == item.name


def test_the_demo_keeps_to_the_number_of_epochs() -> None:
    for epochs in (1, 2, 10):
        for item in demo.demo_experiments(epochs=epochs):
            assert item.epochs + item.fine_tune_epochs == epochs
    with pytest.raises(SpecError, match="epochs"):
        demo.demo_experiments(epochs=0)
    with pytest.raises(SpecError, match="digits, mnist, fashion-mnist"):
        demo.demo_experiments("hf:x")


def check_demo(app: typer.Typer, out: Path, modes: list[str]) -> None:
    result = invoke(app, "demo", "--epochs", "2", "--out", out)
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted(modes)
    table = demo.demo_table([out / "runs" / mode for mode in modes])
    for row in table.to_dict("records"):
        line = next(line for line in result.stdout.splitlines() if line.strip().startswith(f"{row['mode']} "))
        assert f"{row['accuracy']:.1%}" in line
        assert f"{row['bytes']:,.0f}" in line
        assert 0 < row["non_zeros"] <= row["weights"]
        assert row["bytes"] * 8 / row["weights"] == pytest.approx(min(row[spec] for spec in demo.ESTIMATORS))
    assert "What next" in result.stdout
    for name in demo.FIGURES.values():
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    again = invoke(app, "demo", "--epochs", "2", "--out", out)
    assert again.stderr.count("already done") == len(modes)
    assert again.stdout == result.stdout
    with pytest.raises(RunError, match="another experiment"):
        invoke(app, "demo", "--epochs", "1", "--out", out)


def test_the_demo_of_one_mode(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo._MODES, "digits", {"codeq": "codeq:bits=3"})
    check_demo(app, tmp_path, ["codeq"])


@pytest.mark.slow
def test_the_whole_demo(app: typer.Typer, tmp_path: Path) -> None:
    check_demo(app, tmp_path, ["baseline", "uniform_qat", "codeq", "momos", "pmmp"])
