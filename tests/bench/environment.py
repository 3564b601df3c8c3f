"""The virtual environment of the packages that benchmarks compare with; the product never imports them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".venv-bench"
# pybdm 0.1.0 imports pkg_resources, which later setuptools don't have.
PACKAGES = (
    "pybdm==0.1.0",
    "setuptools<81",
    "numpy",
    "brotli==1.2.1",
    "constriction==0.5.0",
    "pcodec==1.1.0",
    "safetensors==0.8.0",
    "zstandard==0.25.0",
)
# Of nncodec only the compiled coder is used, without the packages of its Python part; zipnn asks for torch.
ALONE = ("nncodec==2.1.3", "zipnn==0.5.4")


def peer_python() -> Path:
    """Return the interpreter of the peers' environment, which the first call creates; it sees the product's torch.

    Raises
    ------
    subprocess.CalledProcessError
        The packages can't be installed.
    """
    python = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = FOLDER / "packages.txt"
    if not done.exists() or done.read_text().split() != [*PACKAGES, *ALONE]:
        print(f"installing {', '.join([*PACKAGES, *ALONE])} into {FOLDER}")
        venv.create(FOLDER, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", *ALONE], check=True)
        _add_path(python)
        done.write_text("\n".join([*PACKAGES, *ALONE]))
    return python


def _add_path(python: Path) -> None:
    """Let the peers find torch where this interpreter does, after the packages of their own."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    Path(packages, "torch.pth").write_text(str(Path(torch.origin).parents[1]))
