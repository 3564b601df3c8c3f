"""``kcomplex describe`` through its entry point, on real files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch

import kcomplex
from kcomplex.cli.main import main
from kcomplex.errors import VerificationError
from tests.children import run as run_child

Run = Callable[..., CompletedProcess[str]]
TESTS = Path(__file__).parent.parent


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.weight": torch.randn(40, 30, generator=generator).round(decimals=1),
        "encoder.bias": torch.randn(40, generator=generator).half(),
        "steps": torch.tensor(12),
        "head.weight": torch.randn(3, 40, generator=generator, dtype=torch.float64),
        "head.mask": torch.rand(3, 40, generator=generator) > 0.5,
    }


def write_every_format(folder: Path) -> list[Path]:
    """Write one model in every format; return the paths."""
    model = tensors()
    safetensors.torch.save_file(model, folder / "model.safetensors")
    torch.save(model, folder / "model.pt")
    torch.save({"epoch": 3, "state_dict": model}, folder / "lightning.ckpt")
    torch.save(model, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    np.savez(folder / "model.npz", **{name: tensor.numpy() for name, tensor in model.items()})
    sharded = folder / "sharded"
    sharded.mkdir()
    names = list(model)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, members in shards.items():
        safetensors.torch.save_file({name: model[name] for name in members}, sharded / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return [path for path in folder.iterdir() if path.is_dir() or path.is_file()]


def test_one_model_in_every_format_has_identical_bits(tmp_path: Path, run: Run) -> None:
    paths = write_every_format(tmp_path)
    assert len(paths) == 6
    specs = ["raw", "zstd:level=19", "lzma", "planes|zstd", "palette|entropy", "uniform:bits=4|entropy", "bdm", "l2"]
    answer = run("describe", *map(str, paths), *[word for spec in specs for word in ("-e", spec)], "--json")
    assert answer.returncode == 0, answer.stderr
    by_path = {
        document["path"]: [(item["estimator"], item["value"], item["parts"]) for item in document["descriptions"]]
        for document in json.loads(answer.stdout)
    }
    assert len(by_path) == 6
    first, *others = by_path.values()
    assert [spec for spec, _, _ in first] == specs
    for other in others:
        assert other == first


def test_piped_output_is_csv_with_every_column(tmp_path: Path, run: Run) -> None:
    torch.save(tensors(), tmp_path / "model.pt")
    answer = run("describe", str(tmp_path / "model.pt"), "-e", "zstd", "-e", "sparsity")
    rows = list(csv.DictReader(io.StringIO(answer.stdout)))
    assert [(row["estimator"], row["kind"], row["unit"]) for row in rows] == [
        ("zstd", "code", "bits"),
        ("sparsity", "proxy", "share"),
    ]
    assert float(rows[0]["bytes"]) * 8 == float(rows[0]["bits"])


def test_per_tensor_selection_and_verification(tmp_path: Path, run: Run) -> None:
    torch.save(tensors(), tmp_path / "model.pt")
    answer = run(
        "describe",
        str(tmp_path / "model.pt"),
        "-e",
        "palette|entropy",
        "--per-tensor",
        "--include",
        "*.weight",
        "--verify",
    )
    assert answer.returncode == 0, answer.stderr
    assert [row["tensor"] for row in csv.DictReader(io.StringIO(answer.stdout))] == ["encoder.weight", "head.weight"]
    assert "not included" in answer.stderr


def test_dry_run_lists_what_is_there_and_what_is_skipped(tmp_path: Path, run: Run) -> None:
    torch.save({"state_dict": tensors(), "epoch": 3, "optimizer_states": []}, tmp_path / "last.ckpt")
    answer = run("describe", "--dry-run", str(tmp_path / "last.ckpt"))
    rows = {row["tensor"]: row for row in csv.DictReader(io.StringIO(answer.stdout))}
    assert rows["encoder.weight"]["shape"] == "40x30"
    assert rows["encoder.bias"]["dtype"] == "float16"
    assert rows["encoder.bias"]["role"] == "bias"
    assert (rows["encoder.weight"]["counted"], rows["epoch"]["counted"]) == ("True", "False")
    assert rows["epoch"]["why"]


def test_dry_run_reads_headers_only(tmp_path: Path, run: Run) -> None:
    # A header that declares 8 GB, and a sparse file behind it: reading the data would take far more than the limit.
    header = json.dumps({"w": {"dtype": "F32", "shape": [2_000_000_000], "data_offsets": [0, 8_000_000_000]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8_000_000_000)
    answer = run("describe", "--dry-run", str(path), "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)[0]["bytes"] == 8_000_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_file.pt"], "no such file"),
        (["{model}", "-e", "zst"], "Did you mean 'zstd'"),
        (["{model}", "--include", "decoder*"], "no tensor matches 'decoder*'"),
        (["{model}", "--json", "--csv"], "exclude each other"),
        (["{model}", "--jobs", "0"], "jobs"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, run: Run, arguments: list[str], message: str) -> None:
    torch.save(tensors(), tmp_path / "model.pt")
    answer = run("describe", *[text.format(model=tmp_path / "model.pt") for text in arguments])
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


@pytest.fixture
def hostile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_files", TESTS / "hostile_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hostile_files_are_refused_one_by_one(tmp_path: Path, hostile: ModuleType) -> None:
    """Every broken file: exit code 2, one error that names it, no traceback (in one process, for speed)."""
    paths = hostile.write_all(tmp_path)
    assert len(paths) >= 30
    script = """
import contextlib, io, json, sys
from kcomplex.cli.main import main
from kcomplex.errors import VerificationError
answers = {}
for path in json.load(sys.stdin):
    sys.argv = ["kcomplex", "describe", path, "-e", "zstd"]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    answers[path] = [code, out.getvalue(), err.getvalue()]
json.dump(answers, sys.stdout)
"""
    told = json.dumps([str(path) for path in paths])
    answer = run_child([sys.executable, "-c", script], input=told, cwd=tmp_path)
    for path, (code, out, err) in json.loads(answer.stdout).items():
        assert code == 2, (path, err)
        assert out == "", path
        assert err.startswith("error: "), (path, err)
        assert Path(path).name in err, (path, err)
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1, (path, err)


def test_explain_tells_where_the_bits_are(tmp_path: Path, run: Run) -> None:
    torch.save(tensors(), tmp_path / "model.pt")
    answer = run("describe", str(tmp_path / "model.pt"), "-e", "palette|entropy", "-e", "zstd", "--shuffled")
    assert answer.returncode == 0, answer.stderr
    rows = list(csv.DictReader(io.StringIO(answer.stdout)))
    for described in kcomplex.describe(tmp_path / "model.pt", ["palette|entropy", "zstd"]):
        own = [row for row in rows if row["estimator"] == described.estimator]
        assert {row["measured"] for row in own} == {"weights", "floor", "shuffled weights"}
        measured = [row for row in own if row["measured"] == "weights"]
        assert sum(float(row["bits"]) for row in measured) == described.bits
        assert {row["tensor"] for row in measured} == {*tensors(), "(shared by all)"}
        assert {row["kind"] for row in own if row["measured"] == "floor"} == {"proxy"}


def test_explain_as_json_and_as_a_figure(tmp_path: Path, run: Run) -> None:
    torch.save(tensors(), tmp_path / "model.pt")
    arguments = ["-e", "zstd", "--verify", "--json", "--figure", str(tmp_path / "bits.svg")]
    answer = run("describe", str(tmp_path / "model.pt"), *arguments)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout)
    assert {row["measured"] for row in rows} == {"weights", "floor"}
    assert "zstd (code)" in (tmp_path / "bits.svg").read_text()
    with (tmp_path / "bits.svg.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--explain", "--dry-run"], "--dry-run measures nothing"),
        (["--figure", "bits.png"], "one path and one -e"),
        (["--figure", "bits.gif", "-e", "zstd"], "ends in .png, .pdf or .svg"),
        (["--explain", "-e", "l2"], "not bits"),
    ],
)
def test_what_can_not_be_explained_is_one_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    torch.save(tensors(), tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kcomplex", "describe", "model.pt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split())
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_weights_of_which_none_is_given_are_refused(tmp_path: Path, run_installed: Run) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    safetensors.torch.save_file({"x": torch.ones(3)}, old)
    safetensors.torch.save_file({"a": torch.ones(2, 2)}, new)
    done = run_installed("describe", str(new), "--given", str(old), "-e", "zstd")
    assert done.returncode == 2
    assert "none of its 1 tensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_is_found_in_the_working_directory(tmp_path: Path, run: Run) -> None:
    (tmp_path / "networks_here.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(40, 30)\n")
    torch.manual_seed(3)
    torch.save(torch.nn.Linear(40, 30).state_dict(), tmp_path / "net.pt")
    recipe = "seed:factory=networks_here:build,seed=3"
    answer = run("describe", "net.pt", "-e", "zstd", "--given", recipe, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "given: 2 of 2 tensors" in answer.stderr


def test_a_check_that_fails_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt")
    monkeypatch.setattr("kcomplex.measuring.stream.prove", _fails)
    monkeypatch.setattr("sys.argv", ["kcomplex", "describe", str(tmp_path / "w.pt"), "-e", "zstd", "--verify"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1


def _fails(*_: object, **__: object) -> None:
    raise VerificationError("what comes back isn't what was described")
