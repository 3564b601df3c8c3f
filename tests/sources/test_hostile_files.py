"""Hostile and broken files: one clear error each, nothing run, nothing allocated on the word of a header."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kcomplex.errors import KComplexError
from kcomplex.sources.open import open_weights
from tests.children import run

TESTS = Path(__file__).parents[1]


def read_everything(path: Path) -> dict[str, bytes]:
    with open_weights(path) as weights:
        return {name: handle.words().tobytes() for name, handle in weights.items()}


def test_a_hostile_file_is_refused_with_one_clear_error(hostile_folder: Path, hostile_name: str) -> None:
    with pytest.raises(KComplexError) as caught:
        read_everything(hostile_folder / hostile_name)
    message = str(caught.value)
    assert hostile_name in message
    assert len(message) < 800
    assert message.isprintable()
    assert "weights_only=False" not in message


def test_there_are_enough_hostile_files(hostile_module: ModuleType) -> None:
    assert len(hostile_module.BUILDERS) >= 40


def test_nothing_that_is_planted_is_run(hostile_folder: Path, hostile_module: ModuleType) -> None:
    planted = [path for path in sorted(hostile_folder.iterdir()) if path.name.startswith("planted")]
    assert len(planted) > 10
    for path in planted:
        with pytest.raises(KComplexError):
            read_everything(path)
    assert not (hostile_folder / hostile_module.PLANTED).exists()


def test_the_planted_pickles_would_do_harm(tmp_path: Path, hostile_module: ModuleType) -> None:
    import pickle

    hostile_module.BUILDERS["planted_system.bin"](tmp_path / "planted_system.bin")
    pickle.loads((tmp_path / "planted_system.bin").read_bytes())
    assert (tmp_path / hostile_module.PLANTED).exists()


# Reads every hostile file with little room: an allocation on the word of a header would fail, and say so.
CONFINED = """
import importlib.util, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kcomplex.errors import KComplexError
from kcomplex.sources.files import open_path
from kcomplex.registry import registry

folder = Path(sys.argv[1])
for name in registry("kcomplex.formats").names():
    registry("kcomplex.formats").load(name)
paths = sorted(folder.iterdir())
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (address_space + 400_000_000,) * 2)
for path in paths:
    try:
        with open_path(str(path)) as weights:
            for handle in weights.values():
                handle.words()
    except KComplexError as error:
        if "memory" in str(error):
            print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
if grown > 150_000:
    print(f"grew by {grown} kB")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures memory the way Linux does")
def test_nothing_is_allocated_on_the_word_of_a_header(hostile_folder: Path) -> None:
    result = run([sys.executable, "-c", CONFINED, hostile_folder], check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sound")
    generator = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.randn(5, 3, generator=generator), "b": torch.arange(7)}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    save_file(tensors, folder / "x.safetensors")
    torch.save(tensors, folder / "x.pt")
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(folder / "x.npz", **arrays)
    np.savez_compressed(folder / "small.npz", **arrays)
    np.save(folder / "x.npy", arrays["a.weight"])
    return {path.name: path for path in folder.iterdir()}


# A checksum covers every byte of weights and names in these; the others have none.
CHECKED = ("x.pt", "x.npz", "small.npz")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "old.pt", "x.npz", "small.npz", "x.npy"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.booleans())
def test_damage_is_refused_or_harmless(
    tmp_path: Path, sound_files: dict[str, Path], name: str, place: float, value: int, cut: bool
) -> None:
    data = bytearray(sound_files[name].read_bytes())
    position = int(place * len(data))
    if cut:
        del data[position:]
    else:
        data[position] ^= value
    damaged = tmp_path / name
    damaged.write_bytes(data)
    try:
        found = read_everything(damaged)
    except KComplexError as error:
        message = str(error)
    else:
        assert not cut
        message = str(damaged)
        if name in CHECKED:
            assert found == read_everything(sound_files[name])
    assert str(damaged) in message


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are different there")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.pt"
    torch.save({"w": torch.ones(1)}, path)
    path.chmod(0)
    try:
        path.open("rb").close()
    except PermissionError:
        with pytest.raises(KComplexError, match=r"secret\.pt: can't be read: Permission denied"):
            open_weights(path)
    else:
        pytest.skip("this user may read everything")
