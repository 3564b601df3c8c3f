"""The frame of the fuzzing scripts finds what it is there for."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.children import run

ROOT = Path(__file__).parents[2]
# What fails, fails in another way each; one case is refused.
SCRIPT = """
import os, signal
from kcomplex.errors import KComplexError
from tests.fuzz import frame
frame.SECONDS = 1.5
def make(random):
    return frame.Input(".txt", str(random.randrange(10)).encode())
def read(path):
    match int(path.read_text()):
        case 3: raise ValueError("a foreign exception")
        case 4:
            while True: pass
        case 5: bytearray(300_000_000)
        case 6: os.kill(os.getpid(), signal.SIGSEGV)
        case 7: raise SystemExit
        case 8: raise KComplexError("refused")
frame.main("tried", make, read)
"""


def test_what_fails_is_told_and_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "--cases", "12", "--seed", "16", "--keep", tmp_path]
    answer = run(command, check=False, cwd=ROOT)
    assert answer.returncode == 1, answer.stderr
    *failures, summary = answer.stdout.splitlines()
    assert summary.startswith("tried: seeds 16 to 27: ")
    kept = {path.stem: int(path.read_text()) for path in (tmp_path / "tried").iterdir()}
    assert set(kept.values()) == {3, 4, 5, 6, 7}
    assert len(failures) == len(kept) == int(summary.split()[9])
    for line in failures:
        seed, told = line.split()[1], line.partition("): ")[2]
        expected = {3: "ValueError: a foreign exception", 5: "it takes too much memory"}
        assert told.startswith(expected.get(kept[seed], "the process was ended"))
        assert 16 <= int(seed) <= 27
