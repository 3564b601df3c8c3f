"""The README's plug-in is a working package, found through its entry point; a broken one tells why."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Python = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "run_length_plugin"
MAIN = "from kcomplex.cli.main import main; main()"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, install: Callable[[Path, Path], None]) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install(folder / "source", folder / "site")
    return folder / "site"


def test_the_readme_shows_the_example_word_for_word() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("kcomplex_run_length.py", "pyproject.toml"):
        assert (EXAMPLE / name).read_text().strip() in readme, f"README.md and {name} differ"


def test_a_separate_package_is_found(site: Path, tmp_path: Path, python: Python) -> None:
    np.save(tmp_path / "w.npy", np.repeat(np.arange(20, dtype=np.float32), 500))
    arguments = ["describe", "w.npy", "-e", "run_length", "-e", "palette|run_length:length_bytes=4", "--verify"]
    answer = python("-c", MAIN, *arguments, cwd=tmp_path, path=site)
    assert answer.returncode == 0, answer.stderr
    rows = list(csv.DictReader(io.StringIO(answer.stdout)))
    assert [row["estimator"] for row in rows] == ["run_length", "palette|run_length:length_bytes=4"]
    assert float(rows[0]["bits"]) < 20 * 6 * 8 + 1000
    assert {row["kind"] for row in rows} == {"code"}


def test_a_broken_package_tells_why(site: Path, tmp_path: Path, python: Python) -> None:
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    (broken / "kcomplex_run_length.py").write_text("import a_library_that_is_not_installed\n")
    np.save(tmp_path / "w.npy", np.zeros(5))
    answer = python("-c", MAIN, "describe", "w.npy", "-e", "run_length", cwd=tmp_path, path=broken)
    assert answer.returncode == 2
    error = answer.stderr
    assert "'run_length' of kcomplex-run-length" in error
    assert "No module named 'a_library_that_is_not_installed'" in error
    assert "Traceback" not in error
    # The others still work, and the list of estimators shows the broken one with its reason.
    assert python("-c", MAIN, "describe", "w.npy", "-e", "zstd", cwd=tmp_path, path=broken).returncode == 0
    listing = python("-c", MAIN, "estimators", cwd=tmp_path, path=broken).stdout
    assert any(row["kind"] == "broken" and "No module" in row["what"] for row in csv.DictReader(io.StringIO(listing)))
