"""One model in every format: the same names, shapes, dtypes and words."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kcomplex.errors import FormatError
from kcomplex.sources.open import open_weights
from kcomplex.weights import Weights, words_of

Tensors = dict[str, torch.Tensor]


def save_sharded(tensors: Tensors, folder: Path) -> None:
    import json

    folder.mkdir()
    places = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        places[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / places[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_single(tensors: Tensors, folder: Path) -> None:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")


def save_npz(tensors: Tensors, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


WRITERS: dict[str, Callable[[Tensors, Path], object]] = {
    "model.safetensors": save_file,
    "model.pt": torch.save,
    "legacy.pt": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "protocol4.pt": lambda tensors, path: torch.save(tensors, path, pickle_protocol=4),
    "legacy4.pt": lambda tensors, path: torch.save(
        tensors, path, pickle_protocol=4, _use_new_zipfile_serialization=False
    ),
    "model.npz": save_npz,
    "small.npz": lambda tensors, path: np.savez_compressed(path, **{name: t.numpy() for name, t in tensors.items()}),
    "sharded": save_sharded,
    "single": save_single,
}
NUMPY = [
    *("float16", "float32", "float64", "complex64", "complex128", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
]


def contents(weights: Weights) -> dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]:
    return {name: (handle.shape, handle.dtype, handle.words().tobytes()) for name, handle in weights.items()}


@pytest.mark.parametrize("file", WRITERS)
def test_a_model_is_the_same_in_every_format(tmp_path: Path, file: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 4)
    )
    state = model.state_dict()
    WRITERS[file](state, tmp_path / file)
    with open_weights(tmp_path / file) as weights:
        assert list(weights) == sorted(state)
        assert weights.skipped == ()
        assert str(tmp_path / file) in weights.source
        assert contents(weights) == contents(open_weights(state)) == contents(open_weights(model))


@pytest.mark.parametrize("file", WRITERS)
def test_every_dtype_that_a_format_has(tmp_path: Path, file: str, every_dtype: Tensors) -> None:
    tensors = dict(every_dtype)
    if file in ("model.safetensors", "sharded"):
        del tensors["complex32"], tensors["complex128"]
    if file.endswith(".npz"):
        tensors = {name: tensors[name] for name in NUMPY}
    WRITERS[file](tensors, tmp_path / file)
    with open_weights(tmp_path / file) as weights:
        assert contents(weights) == contents(open_weights(tensors))
        assert {name: handle.nbytes for name, handle in weights.items()} == {
            name: tensor.nbytes for name, tensor in tensors.items()
        }


@pytest.mark.parametrize("file", WRITERS)
def test_odd_shapes(tmp_path: Path, file: str) -> None:
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(3, 0, 2), "none": torch.zeros(0), "one": torch.ones(1)}
    WRITERS[file](tensors, tmp_path / file)
    with open_weights(tmp_path / file) as weights:
        assert contents(weights) == contents(open_weights(tensors))
        assert weights["empty"].values().shape == (3, 0, 2)
        assert weights["scalar"].values() == 3.5


@pytest.mark.parametrize("file", [*WRITERS, "array.npy"])
def test_a_closed_file_says_so_instead_of_crashing(tmp_path: Path, file: str) -> None:
    tensors = {"w": torch.arange(100_000)}
    if file == "array.npy":
        np.save(tmp_path / file, tensors["w"].numpy())
    else:
        WRITERS[file](tensors, tmp_path / file)
    weights = open_weights(tmp_path / file)
    (handle,) = weights.values()
    kept = handle.read()
    weights.close()
    with pytest.raises(FormatError, match="closed"):
        handle.read()
    # What was read before stays valid.
    assert kept.sum() == 4_999_950_000


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt", "legacy.pt"])
def test_writing_to_what_was_read_changes_no_file(tmp_path: Path, file: str) -> None:
    WRITERS[file]({"w": torch.zeros(100_000)}, tmp_path / file)
    with open_weights(tmp_path / file) as weights:
        weights["w"].read().fill_(1)
    with open_weights(tmp_path / file) as weights:
        assert weights["w"].read().sum() == 0


@pytest.mark.parametrize("file", WRITERS)
def test_threads_read_the_same(tmp_path: Path, file: str) -> None:
    tensors = {str(number): torch.full((1000 * number,), number) for number in range(40)}
    WRITERS[file](tensors, tmp_path / file)
    with open_weights(tmp_path / file) as weights, ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda name: weights[name].words().tobytes(), list(weights) * 3))
        assert reads == [words_of(tensors[name]).tobytes() for name in list(weights) * 3]


@pytest.mark.parametrize("file", WRITERS)
def test_the_content_counts_and_not_the_name(tmp_path: Path, file: str) -> None:
    if file in ("sharded", "single"):
        pytest.skip("a folder has no suffix")
    tensors = {"w": torch.arange(3)}
    with (tmp_path / "model").open("wb") as target:
        WRITERS[file](tensors, tmp_path / file)
        target.write((tmp_path / file).read_bytes())
    for suffix in ("", ".safetensors", ".npy", ".npz", ".pt", ".txt"):
        renamed = (tmp_path / "model").rename(tmp_path / f"model{suffix}")
        with open_weights(renamed) as weights:
            assert contents(weights) == contents(open_weights(tensors))
        renamed.rename(tmp_path / "model")
