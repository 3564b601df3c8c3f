"""Fixtures of the readers' tests: the hostile files, and one state dict for all formats."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from kcomplex.weights import DTYPES, tensor_from_words, word_dtype, words_an_element

HOSTILE = Path(__file__).parents[1] / "hostile_files.py"


def load_hostile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_files", HOSTILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hostile_name" in metafunc.fixturenames:
        metafunc.parametrize("hostile_name", list(load_hostile().BUILDERS))


@pytest.fixture(scope="session")
def hostile_module() -> ModuleType:
    """The module that writes the hostile files; its helpers make files that say anything."""
    return load_hostile()


@pytest.fixture(scope="session")
def hostile_folder(hostile_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all hostile files."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile_module.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of random bits (NaN, subnormal and negative zero included) for each dtype, called like it."""
    generator = np.random.default_rng(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        words = generator.integers(0, 256, 30 * words_an_element(dtype) * word_dtype(dtype).itemsize, np.uint8)
        if dtype == torch.bool:
            words &= 1
        tensors[name] = tensor_from_words(words.view(word_dtype(dtype)), dtype, (5, 2, 3))
    return tensors
