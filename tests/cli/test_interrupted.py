"""Commands that are interrupted or killed leave the old file or the new one, whole, and nothing taken for one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL

import pytest
import safetensors.torch
import torch
from torch import nn

import kcomplex as kc
from kcomplex.tracking.worker import measure_pending
from tests.children import PATIENCE, Children, is_gone, run, until
from tests.cli.conftest import COMMAND, Nursery, environment


def write_endless(path: Path) -> None:
    """Write a sparse file of zeros of 2 GB, in tensors that all differ."""
    header, stop = {}, 0
    for index in range(500):
        start, stop = stop, stop + 4 * (1_000_000 + index)
        header[f"t{index}"] = {"dtype": "F32", "shape": [1_000_000 + index], "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)


def test_an_interrupted_encode_leaves_nothing(tmp_path: Path, nursery: Nursery) -> None:
    write_endless(tmp_path / "endless.safetensors")
    (tmp_path / "old.kcz").write_text("old")
    told = tmp_path / "told"
    for number in (signal.SIGINT, signal.SIGTERM):
        order = ("encode", "endless.safetensors", "-o", "old.kcz", "-e", "lzma", "--jobs", "2")
        process = nursery.start(*order, cwd=tmp_path, out="/dev/null", err=told)
        until(lambda: any(path.stat().st_size > 100 for path in tmp_path.glob(".kcomplex-*.partial")))
        os.kill(process, number)
        assert nursery.end() == 128 + number
        assert sorted(path.name for path in tmp_path.iterdir()) == ["endless.safetensors", "old.kcz", "told"]
    assert (tmp_path / "old.kcz").read_text() == "old"
    assert told.read_text() == ""


def test_an_interrupted_describe_ends_without_a_trace(tmp_path: Path, children: Children) -> None:
    write_endless(tmp_path / "endless.safetensors")
    terminal, screen = os.openpty()
    command = [COMMAND, "describe", tmp_path / "endless.safetensors", "-e", "lzma", "--jobs", "2"]
    process = children.start(command, stdout=DEVNULL, stderr=screen, env=environment())
    os.close(screen)
    shown = b""
    # The bar tells the estimator once a tensor has been measured.
    while b"lzma" not in shown:
        shown += os.read(terminal, 65536)
    process.send_signal(signal.SIGINT)
    with suppress(OSError):
        while more := os.read(terminal, 65536):
            shown += more
    assert process.wait(PATIENCE) == 130
    assert is_gone(process.pid)
    assert b"Traceback" not in shown
    os.close(terminal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_interrupted_while_it_starts_ends_without_a_trace(tmp_path: Path, number: int) -> None:
    # Stands in for the library that takes longest until the first line of a command runs.
    (tmp_path / "typer.py").write_text(f"import os, signal; os.kill(os.getpid(), {number:d}); signal.pause()")
    answer = run([COMMAND, "--version"], env={**environment(), "PYTHONPATH": str(tmp_path)}, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (128 + number, "", "")


COMMANDS = {
    "encode": ("encode", "net/model.safetensors", "-o", "net/out.kcz", "-e", "planes|zstd"),
    "quantise": ("quantise", "net/model.safetensors", "-o", "net/out.kcz", "--mse", "1e-3"),
    "plot": ("plot", "bits", "runs/r", "-o", "net/out.png", "-e", "zstd"),
    "decode": ("decode", "net.kcz", "-o", "net/model.safetensors"),
}


class Scene:
    """A folder of a network, in which commands write in place of older files, and are killed."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder, self.nursery = folder, nursery
        (folder / "net").mkdir()
        torch.manual_seed(0)
        tensors = {f"w{index}": torch.randn(60, 50 + index) for index in range(30)}
        safetensors.torch.save_file(tensors, folder / "net" / "model.safetensors")
        self.bits = kc.describe(folder / "net", "raw")[0].bits
        kc.encode({name: -tensor for name, tensor in tensors.items()}, folder / "net.kcz", "raw")
        with kc.attach(nn.Linear(3, 2), run=folder / "runs" / "r", every=None, estimators="zstd", measure=False):
            pass
        measure_pending(folder / "runs" / "r")
        names = ("model.safetensors", "out.kcz", "out.png", "out.png.csv")
        for name in names[1:]:
            (folder / "net" / name).write_bytes(b"old")
        self.old = {name: (folder / "net" / name).read_bytes() for name in names}
        self.new: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        for command, order in COMMANDS.items():
            begun = time.monotonic()
            nursery.start(*order, cwd=folder, out="/dev/null", err=folder / "told")
            assert nursery.end() == 0, (folder / "told").read_text()
            self.seconds[command] = time.monotonic() - begun
            files = {name: (folder / "net" / name).read_bytes() for name in names}
            self.new[command] = {name: files[name] for name in names if files[name] != self.old[name]}
            assert self.new[command]
            self._restore()

    def _restore(self) -> None:
        for path in (self.folder / "net").iterdir():
            if path.name in self.old:
                path.write_bytes(self.old[path.name])
            else:
                path.unlink()

    def kill(self, command: str, share: float) -> None:
        """Kill a command after a share of its time, and check what is there."""
        process = self.nursery.start(*COMMANDS[command], cwd=self.folder, out="/dev/null", err="/dev/null")
        time.sleep(share * self.seconds[command])
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        assert self.nursery.end() in (-signal.SIGKILL, 0)
        there = {path.name: path.read_bytes() for path in (self.folder / "net").iterdir()}
        left = there.keys() - self.old.keys()
        assert all(re.fullmatch(r"\.kcomplex-\w+\.partial", name) for name in left)
        assert self.old.keys() <= there.keys()
        changed = {name for name, old in self.old.items() if there[name] != old}
        assert all(there[name] == self.new[command].get(name) for name in changed)
        # No reader takes what is left for a part of the folder.
        assert kc.describe(self.folder / "net", "raw")[0].bits == self.bits
        self._restore()


def kill_often(scene: Scene, rounds: int) -> None:
    generator = random.Random(0)
    for index in range(rounds):
        for command in COMMANDS:
            scene.kill(command, (index + generator.random()) / rounds)


def test_what_is_killed_leaves_the_old_or_the_new(tmp_path: Path, nursery: Nursery) -> None:
    kill_often(Scene(tmp_path, nursery), 1)


@pytest.mark.slow
def test_what_is_killed_at_any_instant_leaves_the_old_or_the_new(tmp_path: Path, nursery: Nursery) -> None:
    kill_often(Scene(tmp_path, nursery), 12)
