"""Files that change while they are read, are many, or are made to take for ever: one clear error, and bounded work."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kcomplex.errors import FormatError, KComplexError
from kcomplex.sources.formats import plain_pickle
from kcomplex.sources.open import open_weights

W = torch.arange(200_000.0)


def save_as(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".npy":
        np.save(path, tensors["w"].numpy())
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=path.suffix == ".pt")
    return path


FILES = ["x.safetensors", "x.pt", "x.ckpt", "x.npy", "x.npz"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_shortened_while_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    path = save_as(tmp_path / name, {"w": W})
    with open_weights(path) as weights:
        (handle,) = weights.values()
        os.truncate(path, 1000)
        with pytest.raises(FormatError, match=rf"{name}: tensor '\w+': .*(changed while|truncated|can't be read)"):
            handle.read()


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    path = save_as(tmp_path / name, {"w": W})
    with open_weights(path) as weights:
        (handle,) = weights.values()
        save_as(tmp_path / f"new{path.suffix}", {"w": W + 1}).replace(path)
        with pytest.raises(FormatError, match="it was changed while it was read: open it again"):
            handle.read()
        path.unlink()
        with pytest.raises(FormatError, match=r"can't be read: No such file"):
            handle.read()


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_part_of_a_tensor_is_read_by_itself(tmp_path: Path, name: str) -> None:
    with open_weights(save_as(tmp_path / name, {"w": W.reshape(400, 500)})) as weights:
        (handle,) = weights.values()
        assert handle.load_range is not None
        assert torch.equal(handle.load_range(1000, 150_000), W[1000:150_000])
        assert handle.load_range(7, 7).shape == (0,)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files the way Linux tells them")
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards_stay_closed_until_they_are_read(tmp_path: Path, suffix: str) -> None:
    for number in range(1, 41):
        save_as(tmp_path / f"model-{number:05}-of-00040{suffix}", {str(number): torch.ones(2)})
    before = open_files()
    with open_weights(tmp_path) as weights:
        assert len(weights) == 40
        assert open_files() == before
        assert all(handle.values().sum() == 2 for handle in weights.values())
    assert open_files() == before


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files the way Linux tells them")
def test_refused_files_are_closed(hostile_folder: Path) -> None:
    before = open_files()
    for path in hostile_folder.iterdir():
        with suppress(KComplexError), open_weights(path) as weights:
            for handle in weights.values():
                handle.read()
    assert open_files() == before


def nested_pairs(depth: int) -> bytes:
    """Return a pickle's instructions for pairs of the same pair: walking all of them takes 2**depth steps."""
    pair = b"]\x85"
    for _ in range(depth):
        pair += b"q\x64h\x64\x86"
    return pair


def test_keys_of_storages_are_not_compared_with_each_other(tmp_path: Path) -> None:
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    keys = b"\x80\x02](" + nested_pairs(60) + nested_pairs(60) + b"e."
    (tmp_path / "x.pt").write_bytes(b"".join([*parts, keys]))
    with pytest.raises(FormatError, match="the storages that it uses aren't the ones that are there"):
        open_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("place", ["key", "value", "magic", "argument", "storage", "shape"])
def test_what_is_nested_many_times_is_walked_once(tmp_path: Path, hostile_module: ModuleType, place: str) -> None:
    pair, rebuild = nested_pairs(60), b"ctorch._utils\n_rebuild_tensor_v2\n"
    programs = {
        "key": b"}" + pair + b"K\x01s" + pair + b"K\x01s",
        "value": b"}X\x01\x00\x00\x00w" + pair + b"s",
        "magic": pair,
        "argument": b"}X\x01\x00\x00\x00w" + rebuild + pair + b"Rs",
        "storage": b"}X\x01\x00\x00\x00w" + pair + b"Qs",
        "shape": b"}X\x01\x00\x00\x00w" + rebuild + b"(" + pair + b"K\x00" + pair + pair + b"\x89}tRs",
    }
    program = b"\x80\x02" + programs[place] + b"."
    for data in (hostile_module.archive(program), program):
        (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(FormatError) as caught:
            open_weights(tmp_path / "x.pt")
        assert len(str(caught.value)) < 1000


def test_keys_that_hash_alike_are_not_compared(tmp_path: Path, hostile_module: ModuleType) -> None:
    # Multiples of the modulus of Python's hashes; a dictionary of them takes the square of their number in steps.
    keys = {(2**61 - 1) * number: 0 for number in range(1, 4)}
    assert len({hash(key) for key in keys}) == 1
    (tmp_path / "x.pt").write_bytes(hostile_module.archive({"state_dict": hostile_module.GOOD, "beside": keys}))
    with open_weights(tmp_path / "x.pt") as weights:
        assert list(weights) == ["w"]
    value = plain_pickle.read_plain_pickle(hostile_module.BytesIO(pickle.dumps(keys, 2)), lambda identity: None)
    assert all(isinstance(key, plain_pickle.Key) for key in value)


def test_a_pickle_has_no_more_instructions_than_weights_need(
    tmp_path: Path, hostile_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_pickle, "_MAX_INSTRUCTIONS", 1000)
    (tmp_path / "x.pt").write_bytes(hostile_module.archive(b"\x80\x02" + b"N0" * 1000 + b"N."))
    with pytest.raises(FormatError, match="more than 1,000 instructions"):
        open_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("root", ["", "z" * 9999])
@pytest.mark.parametrize("value", [{"w" * 9999: 3}, {"a" * 9999: {"w": torch.ones(2)}, "b" * 9999: {"w": W}}])
def test_messages_are_short_whatever_the_names(tmp_path: Path, value: Any, root: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(FormatError) as caught:
        open_weights(tmp_path / "x.pt", root=root)
    assert len(str(caught.value)) < 1000


def test_what_a_file_says_is_told_printably(tmp_path: Path, hostile_module: ModuleType) -> None:
    escape = b"c\x1b]0;owned\x07\nx\n"
    program = b"\x80\x02}X\x01\x00\x00\x00w" + escape + b"s."
    (tmp_path / "x.pt").write_bytes(hostile_module.archive(program))
    with pytest.raises(FormatError) as caught:
        open_weights(tmp_path / "x.pt")
    assert str(caught.value).isprintable()
    (tmp_path / "a\x1b[31m.ckpt").write_bytes(b"x")
    with pytest.raises(FormatError, match="a folder that holds some") as caught:
        open_weights(tmp_path)
    assert str(caught.value).isprintable()


def test_describing_is_refused_where_a_shard_vanishes(tmp_path: Path) -> None:
    for number in (1, 2):
        save_as(tmp_path / f"model-0000{number}-of-00002.safetensors", {str(number): W})
    with open_weights(tmp_path) as weights:
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        assert weights["1"].elements == len(W)
        with pytest.raises(FormatError, match=r"00002-of-00002\.safetensors: tensor '2': can't be read: No such file"):
            weights["2"].read()
