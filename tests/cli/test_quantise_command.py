"""``kcomplex quantise`` through its entry point; its file is decoded in another process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from kcomplex.cli.app import build_app
from kcomplex.errors import KComplexError

Run = Callable[..., CompletedProcess[str]]

EVALUATION = """
import torch

TARGET = torch.load("target.pt")

def loss(tensors):
    return 1 + torch.nn.functional.mse_loss(tensors["weight"], TARGET)

def fails(tensors):
    raise KeyError("no such layer")

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"weight": weight, "step": torch.tensor(12)}, tmp_path / "model.safetensors")
    torch.save(weight, tmp_path / "target.pt")
    (tmp_path / "evaluation.py").write_text(EVALUATION)
    return tmp_path


def test_what_is_decoded_has_the_loss_that_was_told(folder: Path, run: Run) -> None:
    arguments = ("--evaluate", "evaluation:loss", "--within", "0.01", "--evaluations", "30", "--json")
    answer = run("quantise", "model.safetensors", "-o", "model.kcz", *arguments, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert 1 < told["loss"] <= told["limit"] == pytest.approx(1.01)
    assert told["bits"] == 8 * (folder / "model.kcz").stat().st_size
    assert f"{told['bits'] // 8:,} bytes" in answer.stderr
    assert run("decode", "model.kcz", "-o", "back.safetensors", cwd=folder).returncode == 0
    back = safetensors.torch.load_file(folder / "back.safetensors")
    target = torch.load(folder / "target.pt")
    assert float(1 + torch.nn.functional.mse_loss(back["weight"], target)) == told["loss"]
    verified = run("verify", "model.kcz", "model.safetensors", cwd=folder)
    assert verified.returncode == 0, verified.stderr


def test_norms_and_what_is_excluded_stay_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 9))
    model[1](torch.randn(50, 20))
    state = model.state_dict()
    monkeypatch.chdir(tmp_path)
    torch.save(state, "net.pt")
    runner = CliRunner()
    wish = ["--mse", "1e-4", "--exclude", "2.*"]
    answer = runner.invoke(build_app(), ["quantise", "net.pt", "-o", "net.kcz", *wish])
    assert answer.exit_code == 0, answer.stderr
    assert "coverage: 9 of 9 tensors" in answer.stderr
    assert runner.invoke(build_app(), ["decode", "net.kcz", "-o", "back.safetensors"]).exit_code == 0
    back = safetensors.torch.load_file("back.safetensors")
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, back[name])}
    assert changed == {"0.weight", "0.bias"}


def test_the_tensors_are_told_where_no_format_is_asked_for(folder: Path, run: Run) -> None:
    answer = run("quantise", "model.safetensors", "-o", "model.kcz", "--mse", "1e-4", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("tensor,shape,weights,step,bits,bits_per_weight,distortion\n")


def test_a_failing_evaluation_is_one_clear_error(folder: Path, run: Run) -> None:
    answer = run("quantise", "model.safetensors", "-o", "model.kcz", "--evaluate", "evaluation:fails", cwd=folder)
    assert answer.returncode == 2
    assert "KeyError" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (folder / "model.kcz").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "exactly one"),
        (("--bits", "3", "--mse", "1e-4"), "exactly one"),
        (("--bits", "3", "-e", "uniform|zstd"), "no option 'step'"),
        (("--evaluate", "evaluation"), "module:function"),
        (("--evaluate", "nowhere:loss"), "can't be imported"),
        (("--evaluate", "evaluation:nothing"), "can't be imported"),
        (("--evaluate", "evaluation:number"), "not a function"),
    ],
)
def test_bad_input_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    answer = CliRunner().invoke(build_app(), ["quantise", "model.safetensors", "-o", "model.kcz", *arguments])
    assert isinstance(answer.exception, KComplexError)
    assert told in str(answer.exception)
    assert not (folder / "model.kcz").exists()
