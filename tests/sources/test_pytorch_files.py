"""Files of torch.save: what is found in a checkpoint, views and aliases, and what is refused."""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter, OrderedDict, defaultdict
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path, PurePosixPath
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


def dynamic() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.LayerNorm(8))
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def unlucky() -> torch.nn.Module:
    """Quantised layers of every kind, several of each, some called like the state of training."""
    quantised = torch.ao.nn.quantized
    names = ("upsampler", "metric_head", "scheduler", "sampler", "score", "conv")
    layers: dict[str, torch.nn.Module] = {name: quantised.Linear(8, 8) for name in names}
    layers |= {f"{name}_conv": quantised.Conv2d(2, 2, 3) for name in names}
    layers |= {f"{name}_dynamic": quantised.dynamic.Linear(8, 8) for name in names}
    return torch.nn.ModuleDict({**layers, "embedding": quantised.Embedding(9, 4), "norm": torch.nn.LayerNorm(4)})


def static() -> torch.nn.Module:
    model = torch.nn.Sequential(
        torch.ao.quantization.QuantStub(), torch.nn.Conv2d(4, 8, 3), torch.ao.quantization.DeQuantStub()
    ).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(model, inplace=True)
    model(torch.randn(2, 4, 8, 8))
    return torch.ao.quantization.convert(model)


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
        *("epoch", "global_step", "pytorch-lightning_version", "lr_schedulers", "hyper_parameters", "other.w", "ema"),
        *(
            f"optimizer_states.0.state.{number}.{name}"
            for number in (0, 1)
            for name in ("step", "exp_avg", "exp_avg_sq")
        ),
    }
    assert reasons["epoch"] == "beside the network: int"
    roles = {item.name: item.role for item in weights.skipped}
    assert roles["optimizer_states.0.state.0.exp_avg"] == "optimiser"
    assert roles["epoch"] == "other"
    # What may be of the network counts as not read.
    assert roles["other.w"] == roles["ema"] == ""


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
    assert {name: handle.aliases for name, handle in weights.items()} == {"nested.v": ("w",)}
    assert {item.name: item.reason for item in weights.skipped} == {
        "number": "not a tensor but int",
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


def test_an_empty_state_dict_is_one_where_nothing_else_is(saved: Any) -> None:
    assert len(saved({})) == 0
    with pytest.raises(FormatError, match=r"no tensor is in it that could be of a network.*'state_dict' \(dict\)"):
        saved({"state_dict": {}, "epoch": 1})


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


class Settings:
    """An object of the user's, with state of its own."""

    def __init__(self) -> None:
        self.width, self.parent = 3, self


@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=1),
        np.float64(1),
        PurePosixPath("a/b"),
        defaultdict(list, {"a": [1]}),
        Counter("aab"),
        Settings(),
        {Settings: 1, ("a", 2): {Settings}},
        Fraction(1, 3),
        datetime(2020, 1, 1, tzinfo=UTC),
        re.compile("a"),
        logging.INFO,
        Settings.__init__,
        bytearray(b"ab"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_beside_objects_are_read_and_nothing_is_imported(saved: Any, beside: object) -> None:
    weights = saved({"state_dict": {"w": W, "extra": beside}, "hyper_parameters": beside})
    assert torch.equal(weights["w"].read(), W)
    assert {item.name: item.role for item in weights.skipped} == {"extra": "other", "hyper_parameters": "other"}


def test_arrays_in_a_pickle_are_not_passed_over(saved: Any) -> None:
    state = {"w": W, "array": np.ones((3, 4), np.float32)}
    for weights in (saved(state), open_weights(state)):
        assert list(weights) == ["w"]
        ((name, reason, shape, role),) = [(item.name, item.reason, item.shape, item.role) for item in weights.skipped]
        assert (name, shape, role) == ("array", (3, 4), "")
        assert reason.startswith("array of NumPy")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_module_is_read_as_its_state_dict(tmp_path: Path, protocol: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2, bias=False))
    model[1].register_buffer("passing", torch.ones(2), persistent=False)
    torch.save({"model": model, "ema": None, "epoch": 3}, tmp_path / "x.pt", pickle_protocol=protocol)
    with open_weights(tmp_path / "x.pt") as weights:
        assert {name: handle.words().tobytes() for name, handle in weights.items()} == {
            name: words_of(tensor).tobytes() for name, tensor in model.state_dict().items()
        }


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_torchscript_is_read_as_plain_data(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    script = torch.jit.script(model)
    script.save(tmp_path / "x.pt")
    with open_weights(tmp_path / "x.pt") as weights:
        assert {name: handle.words().tobytes() for name, handle in weights.items()} == {
            name: words_of(tensor).tobytes() for name, tensor in model.state_dict().items()
        }
    # Freezing makes constants of the weights.
    torch.jit.freeze(script).save(tmp_path / "frozen.pt")
    with open_weights(tmp_path / "frozen.pt") as weights:
        assert {handle.elements for handle in weights.values()} >= {6, 2}


class Script(torch.Tensor):
    """A tensor that keeps its weights in tensors of its own, as those of quantising libraries do."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor) -> Script:
        return torch.Tensor._make_wrapper_subclass(cls, (4, 2 * len(packed)), dtype=torch.bfloat16)

    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        raise NotImplementedError(function)


def test_tensors_that_pack_their_weights_are_listed(saved: Any) -> None:
    packed = Script(torch.zeros(8, dtype=torch.uint8))
    for weights in (saved({"w": W, "packed": packed}), open_weights({"w": W, "packed": packed})):
        assert list(weights) == ["w"]
        assert [(item.name, item.role, item.shape) for item in weights.skipped] == [("packed", "packed", (4, 16))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("convert", [dynamic, static, unlucky])
def test_quantised_modules_are_read_as_their_integers(saved: Any, convert: Any) -> None:
    model = convert()
    live, states = open_weights(model), open_weights(model.state_dict())
    assert live.elements > 8 * 16
    assert {name: (handle.dtype, handle.words().tobytes()) for name, handle in live.items()} == {
        name: (handle.dtype, handle.words().tobytes()) for name, handle in states.items()
    }
    weights = saved(model.state_dict())
    assert {name: (handle.dtype, handle.words().tobytes()) for name, handle in weights.items()} == {
        name: (handle.dtype, handle.words().tobytes()) for name, handle in states.items()
    }
    assert {item.name for item in live.skipped} <= {item.name for item in weights.skipped}
    assert {item.role for item in live.skipped} <= {"other"}
    assert torch.int8 in {handle.dtype for handle in weights.values()}


@pytest.mark.filterwarnings("ignore")
def test_packed_recurrent_weights_are_listed(saved: Any) -> None:
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4), torch.nn.LayerNorm(4))
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}, dtype=torch.qint8, inplace=True)
    for weights in (open_weights(model), open_weights(model.state_dict()), saved(model.state_dict())):
        assert list(weights) == ["1.bias", "1.weight"]
        assert [(item.name, item.role) for item in weights.skipped] == [("0._all_weight_values.0.param", "packed")]


def test_several_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    for legacy in (False, True):
        with (tmp_path / "x.pt").open("wb") as file:
            torch.save({"a": torch.ones(1000)}, file, _use_new_zipfile_serialization=not legacy)
            torch.save({"b": W}, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(FormatError, match="save each to a file of its own"):
            open_weights(tmp_path / "x.pt")
    with (tmp_path / "x.pt").open("wb") as file:
        torch.save({"a": W}, file)
        torch.save({"b": W}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="follows its table of contents"):
        open_weights(tmp_path / "x.pt")
