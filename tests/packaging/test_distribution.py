"""One distribution: the same import names in a wheel, in an editable install and from the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kcomplex as kc
from tests.children import run as run_child

Python = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kcomplex", "compressors", "analyses")
PROBE = """
import importlib.metadata, pathlib, kcomplex, kcomplex.compressors.general.zstandard, kcomplex.analyses
print(pathlib.Path(kcomplex.__file__).parent)
print(pathlib.Path(kcomplex.compressors.__file__).parent)
print(kcomplex.describe({}, "zstd", partial=True)[0].kind)
try:
    import compressors
except ModuleNotFoundError:
    print("no bare name")
"""


def test_every_package_is_listed() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            dotted = ".".join(init.parent.relative_to(ROOT).parts)
            found.add(dotted if folder == "kcomplex" else f"kcomplex.{dotted}")
    assert set(settings["packages"]) == found


def test_the_wheel_holds_everything(tmp_path: Path, install: Callable[..., None], python: Python) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "out", "runs", "*.egg-info", "__pycache__")
    )
    target = tmp_path / "site"
    install(source, target)
    answer = python("-c", PROBE, cwd=tmp_path, path=target)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines == [str(target / "kcomplex"), str(target / "kcomplex" / "compressors"), "code", "no bare name"]
    assert not (target / "compressors").exists()
    assert (target / "kcomplex" / "py.typed").exists()
    assert (target / "kcomplex" / "compressors" / "proxies" / "ctm_b2_d12.npz").exists()


def test_the_installed_package_needs_no_checkout_folder(tmp_path: Path, python: Python) -> None:
    answer = python("-c", PROBE, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[2:] == ["code", "no bare name"]


def test_the_checkout_imports_without_an_installation() -> None:
    answer = run_child(
        [sys.executable, "-c", "import kcomplex.compressors, kcomplex.analyses; print(kcomplex.compressors.__file__)"],
        cwd=ROOT,
    )
    assert Path(answer.stdout.strip()).resolve() == ROOT / "compressors" / "__init__.py"


def test_importing_kcomplex_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'pandas', 'matplotlib', 'scipy', 'sklearn', 'joblib', 'rich'}"
    script = f"import sys, kcomplex; print(sorted({heavy} & set(sys.modules)))"
    answer = run_child([sys.executable, "-c", script])
    assert answer.stdout.strip() == "[]"


def test_the_public_surface_is_small_and_real() -> None:
    assert len(kc.__all__) <= 20
    for name in kc.__all__:
        assert getattr(kc, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        kc.nothing_like_this  # noqa: B018
    with pytest.raises(AttributeError, match=r"no 'Nothing'; known: .*momos"):
        kc.modes.Nothing  # noqa: B018


@pytest.mark.slow
def test_the_type_checker_sees_compressors(tmp_path: Path) -> None:
    """An error planted in compressors/ must be found: editable installs hide mapped folders from type checkers."""
    layout = run_child([sys.executable, str(ROOT / "tests" / "type_tree.py"), str(tmp_path / "tree")], check=True)
    assert not layout.stderr
    compressors = tmp_path / "tree" / "kcomplex" / "compressors"
    compressors.unlink()
    shutil.copytree(ROOT / "compressors", compressors, ignore=shutil.ignore_patterns("__pycache__"))
    settings = str(ROOT / "pyproject.toml")
    with (compressors / "general" / "raw.py").open("a") as file:
        file.write("\n\nPLANTED: int = Raw()\n")
    answer = run_child(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            settings,
            "-m",
            "kcomplex.compressors.general.raw",
        ],
        cwd=tmp_path / "tree",
        check=False,
    )
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert "compressors/general/raw.py" in answer.stdout
    assert 'Incompatible types in assignment (expression has type "Raw", variable has type "int")' in answer.stdout
