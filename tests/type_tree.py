"""Lays out a folder of links in which the package stands as a wheel installs it, for type checkers to read."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lay_out(target: Path) -> None:
    """Make ``target`` hold ``kcomplex`` with ``compressors`` and ``analyses`` inside it."""
    shutil.rmtree(target, ignore_errors=True)
    package = target / "kcomplex"
    package.mkdir(parents=True)
    for entry in (*(ROOT / "kcomplex").iterdir(), ROOT / "compressors", ROOT / "analyses"):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
