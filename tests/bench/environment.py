"""The virtual environment of the packages that benchmarks compare with; the product never imports them."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".venv-bench"
# pybdm 0.1.0 imports pkg_resources, which later setuptools don't have.
PACKAGES = ("pybdm==0.1.0", "setuptools<81", "numpy")


def peer_python() -> Path:
    """Return the interpreter of the peers' environment, which the first call creates.

    Raises
    ------
    subprocess.CalledProcessError
        The packages can't be installed.
    """
    python = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = FOLDER / "packages.txt"
    if not done.exists() or done.read_text().split() != list(PACKAGES):
        print(f"installing {', '.join(PACKAGES)} into {FOLDER}")
        venv.create(FOLDER, clear=True, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES], check=True
        )
        done.write_text("\n".join(PACKAGES))
    return python
