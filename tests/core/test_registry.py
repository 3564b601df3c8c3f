"""Plug-ins are found through entry points, and say why when they can't be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from kcomplex.errors import KComplexError, PluginError, UnknownNameError
from kcomplex.registry import GROUPS, Registry


def install(folder: Path, distribution: str, entry_points: str) -> None:
    """Write what importlib.metadata sees of an installed distribution."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("group", GROUPS)
def test_every_builtin_plugin_loads(group: str) -> None:
    registry = Registry(group)
    assert registry.names()
    for name in registry.names():
        assert registry.load(name) is not None


def test_names_are_known_without_importing_anything(site: Path) -> None:
    install(site, "far-away", "[kcomplex.estimators]\nnowhere = module_that_is_not_there:Thing\n")
    assert "nowhere" in Registry("kcomplex.estimators").names()


def test_unknown_name_lists_the_known_and_the_close() -> None:
    with pytest.raises(UnknownNameError, match=r"no estimator is called 'zst'\. Did you mean 'zstd'\? Known: .*lzma"):
        Registry("kcomplex.estimators").load("zst")


def test_missing_module_names_the_package_to_install(site: Path) -> None:
    install(site, "far-away", "[kcomplex.estimators]\nnowhere = module_that_is_not_there.part:Thing\n")
    with pytest.raises(PluginError, match=r"'nowhere' of far-away .*pip install module_that_is_not_there") as caught:
        Registry("kcomplex.estimators").load("nowhere")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_missing_extra_names_the_extra(site: Path) -> None:
    install(site, "far-away", "[kcomplex.estimators]\nnowhere = module_that_is_not_there:Thing [speed]\n")
    with pytest.raises(PluginError, match=r"pip install 'far-away\[speed\]'"):
        Registry("kcomplex.estimators").load("nowhere")


def test_a_module_that_fails_shows_its_own_error(site: Path) -> None:
    (site / "broken_plugin_module.py").write_text("raise RuntimeError('the moon is full')\n")
    install(site, "lunar", "[kcomplex.estimators]\nmoon = broken_plugin_module:Moon\n")
    with pytest.raises(PluginError, match="RuntimeError: the moon is full"):
        Registry("kcomplex.estimators").load("moon")


def test_a_name_claimed_twice_is_refused(site: Path) -> None:
    install(site, "rival-one", "[kcomplex.estimators]\nzstd = rival_module:Zstd\n")
    registry = Registry("kcomplex.estimators")
    with pytest.raises(PluginError, match=r"'zstd' is claimed by kcomplex .* and rival-one"):
        registry.load("zstd")
    assert registry.load("raw").name == "raw"


def test_errors_have_one_root() -> None:
    assert issubclass(PluginError, KComplexError)
    assert issubclass(PluginError, ImportError)
    assert issubclass(UnknownNameError, LookupError)
