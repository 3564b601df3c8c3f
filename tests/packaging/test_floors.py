"""The order of the house: which room may lean on which, held by the imports that the code really makes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kcomplex", "compressors", "analyses")
# From the ground up: a room leans on the floors below it, and not on another one of its own floor.
FLOORS = (
    ("kcomplex.errors", "kcomplex.version"),
    ("kcomplex.machine", "kcomplex.registry"),
    ("kcomplex.weights",),
    ("kcomplex.sources",),
    ("kcomplex.estimators",),
    ("kcomplex.motifs", "kcomplex.kcz", "kcomplex.measuring"),
    ("kcomplex.quantising", "kcomplex.tracking"),
    ("kcomplex.training",),
    ("kcomplex.modes",),
    ("kcomplex.cli",),
    ("kcomplex",),
    ("kcomplex.compressors",),
    ("kcomplex.analyses",),
)
# The same inside the two folders that have rooms of their own.
COMPRESSORS = (
    ("tables",),
    ("general", "entropy", "quantisers", "transforms", "proxies"),
    ("context", "mix", "mosaic"),
    ("best",),
)
ANALYSES = (("figures",), ("experiments",), ("studies",), ("commands",), ("demo",))


def modules() -> dict[str, Path]:
    """Return the file of every module of the package by its full name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            dotted = ".".join(parts if folder == "kcomplex" else ("kcomplex", *parts))
            found[dotted.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Yield every module of the package that a module imports, wherever in its text it does so."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in MODULES or source in MODULES:
                    yield inner if inner in MODULES else source


@cache
def arrows() -> tuple[tuple[str, str], ...]:
    """Return importer and imported of every import, but for those of the package's own face.

    What that offers is loaded on first use; type checkers read its imports, programs don't run them.
    """
    return tuple((name, target) for name in MODULES if name != "kcomplex" for target in imports(name))


def room(name: str) -> str:
    """Return the part of the house that a module belongs to: the longest beginning of its name that has a floor."""
    known = {place for floor in FLOORS for place in floor}
    parts = name.split(".")
    beginnings = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(beginning for beginning in beginnings if beginning in known)


def test_imports_are_found() -> None:
    assert ("kcomplex.sources.open", "kcomplex.weights") in arrows()
    assert ("kcomplex.compressors.best.best", "kcomplex.compressors.best.race") in arrows()
    assert ("kcomplex.training.pruning.pmmp", "kcomplex.training.pruning.pmmp_kernels") in arrows()


def test_no_import_goes_upwards() -> None:
    height = {place: floor for floor, places in enumerate(FLOORS) for place in places}
    upwards = [
        f"{name} imports {target}"
        for name, target in arrows()
        if room(name) != room(target) and height[room(target)] >= height[room(name)]
    ]
    assert not upwards


@pytest.mark.parametrize(("folder", "floors"), [("compressors", COMPRESSORS), ("analyses", ANALYSES)])
def test_no_import_goes_upwards_inside_a_folder(folder: str, floors: tuple[tuple[str, ...], ...]) -> None:
    prefix = f"kcomplex.{folder}."
    height = {place: floor for floor, places in enumerate(floors) for place in places}
    for name, target in arrows():
        if name.startswith(prefix) and target.startswith(prefix):
            own, other = (dotted.removeprefix(prefix).partition(".")[0] for dotted in (name, target))
            assert own == other or height[other] < height[own], f"{name} imports {target}"


def test_every_room_has_a_floor() -> None:
    listed = {place for floor in FLOORS for place in floor}
    assert {name for name in MODULES if name.count(".") == 1} <= listed


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, target in arrows():
        if name != target:
            graph.setdefault(name, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("folder", ["compressors", "analyses"])
def test_a_folder_imports_its_own_modules_relatively(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                assert not name.startswith((f"kcomplex.{folder}", "compressors", "analyses")), f"{path} imports {name}"
