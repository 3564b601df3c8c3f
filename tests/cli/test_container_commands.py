"""``kcomplex encode``, ``decode`` and ``verify`` through their entry point; each decodes in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from kcomplex.cli.app import build_app
from kcomplex.errors import SpecError
from kcomplex.estimators.code import Code
from kcomplex.estimators.coder import Coder
from kcomplex.kcz.container import encode
from kcomplex.registry import registry

Run = Callable[..., CompletedProcess[str]]
RunAll = Callable[[list[list[str]]], list[tuple[int, str]]]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    tensors = {
        "weight": torch.randn(64, 48, generator=generator),
        "quantised": torch.randint(-7, 8, (64, 48), generator=generator, dtype=torch.int8),
        "step": torch.tensor(12),
    }
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "epoch": "9"})
    return path


def test_a_checkpoint_goes_and_comes_back(tmp_path: Path, run_installed: Run, original: Path) -> None:
    packed, unpacked = str(tmp_path / "model.kcz"), tmp_path / "back.safetensors"
    encoded = run_installed("encode", str(original), "-o", packed, "-e", "lin")
    assert encoded.returncode == 0, encoded.stderr
    assert "bits a weight" in encoded.stderr
    decoded = run_installed("decode", packed, "-o", str(unpacked))
    assert decoded.returncode == 0, decoded.stderr
    assert unpacked.read_bytes() == original.read_bytes()


def test_every_code_decodes_in_a_process_that_encoded_nothing(tmp_path: Path, run_all: RunAll, original: Path) -> None:
    random = np.random.default_rng(0)
    network = safetensors.torch.load_file(original)
    network["predictable"] = torch.from_numpy(random.normal(size=(64, 3)) @ random.normal(size=(3, 48))).float()
    network["motifs"] = torch.from_numpy(random.normal(size=(7, 4))[random.integers(7, size=300)]).half()
    safetensors.torch.save_file(network, original, metadata={"format": "pt"})
    names = registry("kcomplex.estimators")
    coders = [name for name in names.names() if issubclass(names.load(name), (Coder, Code)) and name != "best"]
    assert {"raw", "entropy", "lin", "mix"} <= set(coders)
    specs = [*coders, "best", "best:tier=tight", "mosaic|entropy", *(f"palette|{name}" for name in coders)]
    for index, spec in enumerate(specs):
        encode(original, tmp_path / f"{index}.kcz", spec)
    packed = [str(tmp_path / f"{index}.kcz") for index in range(len(specs))]
    answers = run_all(
        [["decode", path, "-o", f"{path}.safetensors"] for path in packed] + [["verify", packed[-1], str(original)]]
    )
    assert [code for code, _ in answers] == [0] * (len(specs) + 1), answers
    for path, spec in zip(packed, specs, strict=True):
        assert Path(f"{path}.safetensors").read_bytes() == original.read_bytes(), spec
    assert f"tensors are those of {original}, bit for bit" in answers[-1][1]


def test_verify_fails_where_the_original_is_another(tmp_path: Path, run: Run, original: Path) -> None:
    packed = tmp_path / "model.kcz"
    encode(original, packed, "planes|zstd")
    tensors = safetensors.torch.load_file(original)
    tensors["weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, original, metadata={"format": "pt", "epoch": "9"})
    answer = run("verify", str(packed), str(original))
    assert answer.returncode == 1
    assert "'weight' isn't what was encoded" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_bad_input_is_one_clear_error(tmp_path: Path, run_all: RunAll, original: Path) -> None:
    packed, damaged, output = tmp_path / "model.kcz", tmp_path / "damaged.kcz", str(tmp_path / "out.safetensors")
    encode(original, packed, "planes|zstd")
    damaged.write_bytes(packed.read_bytes()[:-100])
    cases = (
        (["decode", str(damaged), "-o", output], "truncated or corrupted"),
        (["decode", str(original), "-o", output], "isn't a .kcz file"),
        (["verify", str(tmp_path / "nothing.kcz")], "no such file"),
        (["encode", str(original), "-o", str(tmp_path / "out.kcz"), "-e", "l2"], "kind proxy"),
        (["encode", str(original), "-o", str(original / "out.kcz")], "can't be written"),
    )
    for (code, answer), (arguments, told) in zip(run_all([case[0] for case in cases]), cases, strict=True):
        assert code == 2, arguments
        assert told in answer
        assert "Traceback" not in answer
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model.kcz", "damaged.kcz"}


def test_a_checkpoint_goes_and_comes_back_given_another(tmp_path: Path, run: Run, original: Path) -> None:
    tensors = safetensors.torch.load_file(original)
    tensors["weight"] += 1e-4
    tuned, packed, unpacked = (str(tmp_path / name) for name in ("tuned.safetensors", "tuned.kcz", "back.safetensors"))
    safetensors.torch.save_file(tensors, tuned, metadata={"format": "pt"})
    given = ("--given", str(original))
    described = run("describe", tuned, "-e", "planes|zstd", "--verify", *given)
    assert described.returncode == 0, described.stderr
    assert f"given:{original}|planes|zstd,code" in described.stdout
    assert run("encode", tuned, "-o", packed, *given).returncode == 0
    assert run("decode", packed, "-o", unpacked, *given).returncode == 0
    assert Path(unpacked).read_bytes() == Path(tuned).read_bytes()
    assert run("verify", packed, tuned, *given).returncode == 0
    for arguments, told in (
        (("decode", packed, "-o", unpacked), "give them for decoding, too"),
        (("decode", packed, "-o", unpacked, "--given", tuned), "given other weights"),
        (("describe", tuned, "--given", "seed:factory=absent_package:build,seed=0"), "ModuleNotFoundError"),
        (("describe", tuned, "-e", "l2", *given), "no use for given weights"),
    ):
        answer = run(*arguments)
        assert answer.returncode == 2, arguments
        assert told in answer.stderr
        assert "Traceback" not in answer.stderr


def test_decode_and_verify_say_what_they_did(tmp_path: Path, run_all: RunAll, original: Path) -> None:
    double, damaged, metadata = (tmp_path / name for name in ("double.kcz", "damaged.kcz", "metadata.kcz"))
    quantised, unpacked = tmp_path / "quantised.kcz", str(tmp_path / "back.pt")
    encode({"w": torch.ones(3, dtype=torch.complex128)}, double, "zstd")
    encode({"__metadata__": torch.arange(3)}, metadata, "zstd")
    encode(original, quantised, "uniform|zstd")
    damaged.write_bytes(quantised.read_bytes()[:-1])
    cases = (
        (["verify", str(damaged)], 1, "truncated or corrupted"),
        (["verify", str(quantised)], 0, "are quantised, with a mean squared error of"),
        (["verify", str(quantised), str(original)], 0, f"tensors are those of {original}, bit for bit; "),
        (["verify", str(double), "--limit", "47"], 2, "allow more with limit=48 (on the command line: --limit 48)"),
        (["verify", str(double), "--limit", "48"], 0, "is undamaged and decodes"),
        (
            ["decode", str(double), "-o", f"{unpacked}.safetensors"],
            2,
            "can't hold complex128 (the tensor 'w'): write a .pt",
        ),
        (["decode", str(metadata), "-o", f"{unpacked}.safetensors"], 2, "the name '__metadata__': write a .pt"),
        (["decode", str(metadata), "-o", f"{unpacked}.npz"], 2, "writes .safetensors and .pt files"),
        (["decode", str(double), "-o", unpacked], 0, "1 tensors"),
        (["verify", str(double), unpacked], 0, "1 of 1 tensors"),
        (["decode", str(quantised), "-o", unpacked], 0, "a .pt file has none"),
    )
    for (code, told), (arguments, expected, text) in zip(run_all([case[0] for case in cases]), cases, strict=True):
        assert (code, text in told) == (expected, True), (arguments, told)
    assert not list(tmp_path.glob("*.safetensors.safetensors"))


@pytest.mark.parametrize("command", [("encode",), ("quantise", "--bits", "4")])
def test_a_container_gets_no_name_of_a_checkpoint(command: tuple[str, ...], tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3, 4)}, tmp_path / "w.pt")
    before = (tmp_path / "other.safetensors").write_bytes(b"what somebody trained")
    name, *wish = command
    answer = CliRunner().invoke(
        build_app(), [name, str(tmp_path / "w.pt"), "-o", str(tmp_path / "other.safetensors"), *wish]
    )
    assert isinstance(answer.exception, SpecError)
    assert "no .safetensors file" in str(answer.exception)
    assert (tmp_path / "other.safetensors").stat().st_size == before
