"""Files of torch.save: what is found in a checkpoint, views and aliases, and what is refused."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kcomplex.errors import FormatError
from kcomplex.sources.open import open_weights
from kcomplex.weights import words_of

W = torch.arange(6.0).reshape(2, 3)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A function that saves an object in one of the two formats and opens the file."""

    def save(value: Any) -> Any:
        torch.save(value, tmp_path / "x.ckpt", _use_new_zipfile_serialization=request.param)
        return open_weights(tmp_path / "x.ckpt")

    return save


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_checkpoint_of_a_training_run(saved: Any, key: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    weights = saved(
        {
            "epoch": 3,
            "global_step": 7,
            "pytorch-lightning_version": "2.5",
            key: model.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [],
            "hyper_parameters": {"width": 3, ("a", 1): {1, 2}, "rate": 0.1, "big": 10**30, "raw": b"ab"},
            "other": {"w": W},
            "ema": W,
        }
    )
    assert list(weights) == ["bias", "weight"]
    assert np.array_equal(weights["weight"].values(), model.weight.detach().numpy())
    reasons = {item.name: item.reason for item in weights.skipped}
    assert set(reasons) == {
        *("epoch", "global_step", "pytorch-lightning_version", "optimizer_states", "lr_schedulers"),
        *("hyper_parameters", "other", "ema"),
    }
    assert reasons["epoch"] == f"beside the state dict {key!r}: int"


def test_entries_of_a_state_dict_that_are_no_tensors(saved: Any) -> None:
    weights = saved(
        OrderedDict(
            w=W,
            number=3,
            nested={"v": W},
            sparse=torch.eye(2).to_sparse(),
            meta=torch.empty(2, device="meta"),
            device=torch.device("cpu"),
            size=W.shape,
        )
    )
    assert list(weights) == ["w"]
    assert {item.name: item.reason for item in weights.skipped} == {
        "number": "not a tensor but int",
        "nested": "not a tensor but dict",
        "sparse": "sparse tensor",
        "meta": "meta tensor: it has no data",
        "device": "not a tensor but torch.device",
        "size": "not a tensor but torch.Size",
    }


def test_a_tensor_and_a_list_of_tensors(saved: Any) -> None:
    assert {name: handle.shape for name, handle in saved(W).items()} == {"tensor": (2, 3)}
    assert list(saved(torch.nn.Parameter(W))) == ["tensor"]
    weights = saved([W, 3, W + 1])
    assert list(weights) == ["0", "2"]
    assert [item.name for item in weights.skipped] == ["1"]
    assert weights["2"].values()[0, 0] == 1


def test_an_empty_state_dict_is_one(saved: Any) -> None:
    assert len(saved({})) == 0
    assert len(saved({"state_dict": {}, "epoch": 1})) == 0


def test_shared_tensors_count_once(saved: Any) -> None:
    flat = torch.arange(12.0)
    weights = saved(
        {
            "head": flat[:6].reshape(2, 3),
            "embedding": flat[:6].reshape(2, 3),
            "same_words_elsewhere": flat[:6].reshape(2, 3).clone(),
            "transposed": flat[:6].reshape(2, 3).t(),
            "rest": flat[6:],
        }
    )
    assert {name: handle.aliases for name, handle in weights.items()} == {
        "embedding": ("head",),
        "rest": (),
        "same_words_elsewhere": (),
        "transposed": (),
    }
    assert weights["transposed"].words().view(np.float32).tolist() == [0, 3, 1, 4, 2, 5]
    assert weights["rest"].values().tolist() == list(range(6, 12))


def test_views_are_read_as_they_were(saved: Any) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    state = {
        "conjugate": values.conj(),
        "negative": values.clone().conj().imag,
        "expanded": torch.tensor([1.5]).expand(4),
        "strided": torch.arange(20)[3::4],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }
    weights = saved(state)
    assert set(weights) == set(state)
    for name, handle in weights.items():
        assert handle.words().tobytes() == words_of(state[name]).tobytes(), name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), legacy=st.booleans())
def test_any_view_of_any_storage(tmp_path: Path, data: st.DataObject, legacy: bool) -> None:
    storage = torch.arange(200, dtype=data.draw(st.sampled_from([torch.uint8, torch.int16, torch.float32])))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = data.draw(st.lists(st.integers(0, 12), min_size=len(shape), max_size=len(shape)))
    tensor = storage.as_strided(shape, strides, data.draw(st.integers(0, 20)))
    torch.save({"w": tensor, "v": tensor}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with open_weights(tmp_path / "x.pt") as weights:
        assert weights["v"].shape == tuple(shape)
        assert weights["v"].words().tobytes() == words_of(tensor).tobytes()
        assert weights["v"].aliases == (("w",) if tensor.numel() else ())


def test_big_endian_files(tmp_path: Path, hostile_module: ModuleType) -> None:
    for kind, dtype in ((torch.FloatStorage, ">f4"), (torch.ComplexFloatStorage, ">c8"), (torch.ByteStorage, "u1")):
        numbers = np.arange(1, 5).astype(dtype)
        value = {"w": hostile_module.View(hostile_module.Storage("0", 4, kind))}
        records = {
            "data.pkl": hostile_module.pickled(value),
            "byteorder": b"big",
            "data/0": numbers.tobytes(),
        }
        (tmp_path / "x.pt").write_bytes(hostile_module.archive(None, records))
        with open_weights(tmp_path / "x.pt") as weights:
            assert weights["w"].read().tolist() == [1, 2, 3, 4]


def test_the_pickles_of_python_2(tmp_path: Path, hostile_module: ModuleType) -> None:
    class Items:
        def __reduce__(self) -> Any:
            return OrderedDict, ([["w", hostile_module.View(hostile_module.Storage())]],)

    (tmp_path / "x.pt").write_bytes(hostile_module.legacy(Items()))
    with open_weights(tmp_path / "x.pt") as weights:
        assert weights["w"].read().tolist() == [1, 2, 3, 4]


def test_files_without_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": W}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with open_weights(tmp_path / "x.pt") as weights:
        assert torch.equal(weights["w"].read(), W)


def test_opening_reads_no_tensor(tmp_path: Path, saved: Any) -> None:
    weights = saved({"a": torch.zeros(1000), "b": torch.ones(1000)})
    path = tmp_path / "x.ckpt"
    data = bytearray(path.read_bytes())
    place = data.index(torch.ones(1000).numpy().tobytes())
    data[place : place + 4] = b"\0\0\0\0"
    weights.close()
    path.write_bytes(data)
    with open_weights(path) as damaged:
        assert damaged["a"].values().sum() == 0
        if data.startswith(b"PK"):
            with pytest.raises(FormatError, match=r"x\.ckpt: tensor 'b': corrupted: .* checksum"):
                damaged["b"].read()


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ({"state_dict": {"w": W}, "hyper_parameters": argparse.Namespace(a=1)}, "argparse.Namespace"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        ({"w": W, "loss": np.float64(3)}, "numpy"),
    ],
)
def test_what_isnt_plain_weights_is_refused_with_its_name(saved: Any, value: Any, asked: str) -> None:
    with pytest.raises(FormatError, match="isn't plain weights") as caught:
        saved(value)
    assert asked in str(caught.value)
    assert "weights_only=True" in str(caught.value)
    assert "safetensors" in str(caught.value)


def test_a_checkpoint_without_a_known_state_dict_says_what_is_there(saved: Any) -> None:
    with pytest.raises(FormatError, match=r"no state dict .* model_state_dict, .*'net' \(dict\), 'epoch' \(int\)"):
        saved({"net": {"w": W}, "epoch": 1})


def test_torchscript_is_refused(tmp_path: Path, hostile_module: ModuleType) -> None:
    records = {"data.pkl": hostile_module.pickled({}), "constants.pkl": hostile_module.pickled(())}
    (tmp_path / "x.pt").write_bytes(hostile_module.archive(None, records))
    with pytest.raises(FormatError, match="TorchScript"):
        open_weights(tmp_path / "x.pt")
