"""What the commands show: names from files never command a terminal, and output that can't be written is told."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, CompletedProcess

import pytest
import torch
from torch import nn

import kcomplex as kc
from kcomplex.tracking.worker import measure_pending
from tests.children import PATIENCE, Children
from tests.cli.conftest import COMMAND, Nursery, environment

Run = Callable[..., CompletedProcess[str]]
OnTerminal = Callable[..., CompletedProcess[bytes]]

# Sets the title of a window, clears the screen, rings, begins a line anew; and Rich's markup.
HOSTILE = "a\x1b]0;TITLE\x07\x1b[2J\r\x9b[/b][red]"
# What Rich itself sends: colours, the cursor hidden, shown and moved over the bar, lines erased.
SENT_BY_RICH = re.compile(rb"\x1b\[(\?25[lh]|[0-9;]*m|[12]?[AKG])")


def assert_harmless(shown: bytes) -> None:
    rest = SENT_BY_RICH.sub(b"", shown)
    text = rest.replace(b"\r\n", b"\n").decode()
    # A bar begins its line anew.
    assert not [letter for letter in text if letter not in "\n\r" and not letter.isprintable()], text
    assert b"Traceback" not in rest
    assert b"fault of kcomplex" not in rest


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a folder with a checkpoint, a container and runs, all of whose names are hostile."""
    torch.manual_seed(0)
    torch.save({HOSTILE: torch.randn(8, 8), f"{HOSTILE}.sparse": torch.eye(3).to_sparse()}, tmp_path / "net.pt")
    torch.save({HOSTILE: torch.full((8, 8), float("nan"))}, tmp_path / "nan.pt")
    torch.save({HOSTILE: torch.randn(8, 8)}, tmp_path / f"other{HOSTILE.replace('/', '')}.pt")
    kc.encode({HOSTILE: torch.randn(8, 8)}, tmp_path / "net.kcz", "raw")
    model = nn.ModuleDict({"w[/b]\x1b]0;TITLE\x07": nn.Linear(3, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with kc.attach(model, optimizer, run=tmp_path / "runs" / "r", every=1, estimators="zstd", measure=False) as tracker:
        tracker.log(**{HOSTILE: 0.5})
        tracker.capture()
    measure_pending(tmp_path / "runs" / "r")
    return tmp_path


def test_names_in_files_never_command_a_terminal(hostile: Path, run_on_terminal: OnTerminal) -> None:
    other = next(path.name for path in hostile.iterdir() if path.name.startswith("other"))
    cases: tuple[tuple[int, tuple[str, ...]], ...] = (
        (0, ("describe", "net.pt", other, "-e", "zstd", "--per-tensor")),
        (0, ("describe", "net.pt", "-e", "zstd", "--per-tensor", "--csv")),
        (0, ("describe", "net.pt", "-e", "zstd", "--json")),
        (0, ("describe", "net.pt", "-e", "zstd", "--explain", "--per-tensor")),
        (0, ("describe", "net.pt", "--dry-run")),
        (2, ("describe", "net.pt", "--include", "\x1b]0;TITLE\x07[/b]")),
        (2, ("describe", "\x1b]0;TITLE\x07[/b]", "-e", "\x1b]0;TITLE\x07[/b]")),
        (0, ("encode", "net.pt", "-o", f"{other}.kcz")),
        (0, ("decode", "net.kcz", "-o", "back.safetensors")),
        (1, ("verify", "net.kcz", other)),
        (2, ("verify", other)),
        (0, ("quantise", other, "-o", "q.kcz", "--mse", "1e-3")),
        (2, ("quantise", "nan.pt", "-o", "q.kcz", "--mse", "1e-3")),
        (0, ("runs", "runs")),
        (0, ("runs", "runs", "--events")),
        (2, ("plot", "accuracy", "runs", "-o", "a.png", "--metric", "\x1b]0;TITLE\x07[/b]")),
    )
    for code, arguments in cases:
        answer = run_on_terminal(*arguments, cwd=hostile)
        assert answer.returncode == code, (arguments, answer.stdout)
        assert_harmless(answer.stdout)
    # They are shown, though, and markup is text like any other.
    shown = run_on_terminal("runs", "runs", cwd=hostile).stdout
    assert rb"\x1b]0;TITLE\x07\x1b[2J" in shown
    assert b"[/b][red]" in shown


def test_what_can_not_be_read_does_not_hide_the_others(tmp_path: Path, run: Run) -> None:
    for name in ("first.pt", "last.pt"):
        torch.save({"w": torch.zeros(9)}, tmp_path / name)
    (tmp_path / "damaged.pt").write_bytes(b"no checkpoint")
    for more in ((), ("--json",), ("--dry-run",), ("--explain",)):
        answer = run("describe", "first.pt", "damaged.pt", "none.pt", "last.pt", "-e", "zstd", *more, cwd=tmp_path)
        assert answer.returncode == 2, more
        assert ("first.pt" in answer.stdout, "last.pt" in answer.stdout) == (True, True), more
        errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
        assert ["damaged.pt" in errors[0], "none.pt" in errors[1], len(errors)] == [True, True, 2], more


def test_output_that_can_not_be_written_is_told(tmp_path: Path, run: Run, nursery: Nursery) -> None:
    torch.save({"w": torch.zeros(9)}, tmp_path / "net.pt")
    kc.encode({"w": torch.zeros(9)}, tmp_path / "net.kcz", "raw")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for output in ("", "folder", "pipe", "/dev/null", "net.pt", "net.pt/below"):
        answer = run("encode", "net.pt", "-o", output, cwd=tmp_path)
        assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
        assert answer.stderr.startswith("error: ")
    for command in (("verify", "pipe"), ("decode", "pipe", "-o", "back.pt"), ("describe", "pipe")):
        answer = run(*command, cwd=tmp_path)
        assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    told = tmp_path / "told"
    nursery.start("describe", "net.pt", "-e", "raw", cwd=tmp_path, out="/dev/full", err=told)
    assert nursery.end() == 2
    assert re.fullmatch("(coverage: .*\n)?error: the standard output .*: No space left on device\n", told.read_text())


def test_a_closed_pipe_ends_a_command_quietly(tmp_path: Path, children: Children) -> None:
    torch.save({"w": torch.zeros(9)}, tmp_path / "net.pt")
    nobody, pipe = os.pipe()
    os.close(nobody)
    command = [COMMAND, "describe", tmp_path / "net.pt", "-e", "raw", "--json"]
    process = children.start(command, stdout=pipe, stderr=PIPE, text=True, env=environment())
    os.close(pipe)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 141
    assert [line.partition(":")[0] for line in told.splitlines()] == ["coverage"]
