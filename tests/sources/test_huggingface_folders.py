"""Folders of Hugging Face's libraries: which files count, and what an index may say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kcomplex.errors import FormatError
from kcomplex.sources.open import open_weights

A, B, C = torch.zeros(1), torch.zeros(2), torch.zeros(3)


def write_index(folder: Path, places: Mapping[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict(places)}))


def test_shards_with_an_index(tmp_path: Path) -> None:
    save_file({"a": A, "b": B, "extra": C}, tmp_path / "one.safetensors")
    save_file({"c": C}, tmp_path / "two.safetensors")
    save_file({"d": C}, tmp_path / "stray.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    with open_weights(tmp_path) as weights:
        assert {name: handle.shape for name, handle in weights.items()} == {"a": (1,), "b": (2,), "c": (3,)}
        assert [(item.name, item.reason) for item in weights.skipped] == [
            ("extra", "not listed in model.safetensors.index.json"),
            ("stray.safetensors", "a file that doesn't belong to the model"),
        ]


def test_pickled_shards_keep_their_aliases(tmp_path: Path) -> None:
    torch.save({"a": A, "tied": A, "unlisted": A, "step": 3}, tmp_path / "one.bin")
    torch.save({"c": C}, tmp_path / "two.bin")
    write_index(tmp_path, {"a": "one.bin", "tied": "one.bin", "c": "two.bin"}, "pytorch_model.bin.index.json")
    with open_weights(tmp_path) as weights:
        assert {name: handle.aliases for name, handle in weights.items()} == {"a": ("tied",), "c": ()}
        assert {item.name: item.reason for item in weights.skipped} == {
            "unlisted": "not listed in pytorch_model.bin.index.json",
            "step": "not a tensor but int",
        }


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
def test_a_single_file(tmp_path: Path, name: str) -> None:
    (save_file if name.endswith("s") else torch.save)({"a": A}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["a"]


def test_what_counts_first(tmp_path: Path) -> None:
    torch.save({"pickled": A}, tmp_path / "pytorch_model.bin")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["pickled"]
    save_file({"single": A}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["single"]
    save_file({"shard": A}, tmp_path / "shard.safetensors")
    write_index(tmp_path, {"shard": "shard.safetensors"})
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["shard"]
        assert [item.name for item in weights.skipped] == ["model.safetensors", "pytorch_model.bin"]
        assert {item.role for item in weights.skipped} == {"other"}


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x-1.safetensors")
    save_file({"b": B}, tmp_path / "x-2.safetensors")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["a", "b"]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_numbered_shards_without_an_index(tmp_path: Path, first: int, variant: str) -> None:
    for number, tensors in enumerate(({"a": A}, {"b": B}, {"c": C}), start=first):
        save_file(tensors, tmp_path / f"model-{number:05}-of-00003{variant}.safetensors")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model-00001-of-00003", "model-00003-of-00003"], r"of the 3 shards .* only these are there: 1, 3"),
        (["model-00001-of-00002", "other-00002-of-00002"], r"of the 2 shards 'model-\*.* only these are there: 1"),
        (["model-00001-of-00002", "model-00002-of-00003"], r"disagree about how many they are: \[2, 3\]"),
    ],
)
def test_numbered_shards_that_are_not_the_whole_model(tmp_path: Path, names: list[str], said: str) -> None:
    for tensor, name in zip("ab", names, strict=True):
        save_file({tensor: A}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=said):
        open_weights(tmp_path)


def test_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": A}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    with open_weights(tmp_path / "snapshot") as weights:
        assert list(weights) == ["a"]


def test_shards_in_a_folder_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save_file({"a": A}, tmp_path / "parts" / "one.safetensors")
    write_index(tmp_path, {"a": "parts/one.safetensors"})
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["a"]


def test_a_tensor_that_the_reader_skips_isnt_missing(tmp_path: Path) -> None:
    torch.save({"a": A, "s": torch.eye(2).to_sparse()}, tmp_path / "one.bin")
    write_index(tmp_path, {"a": "one.bin", "s": "one.bin"}, "pytorch_model.bin.index.json")
    with open_weights(tmp_path) as weights:
        assert [item.name for item in weights.skipped] == ["s"]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"a": "../one.safetensors"}, r"'\.\./one\.safetensors', where 'a' should be, isn't a file inside"),
        ({"a": "one.safetensors"}, r"one\.safetensors: the shard is missing"),
    ],
)
def test_an_index_that_leads_elsewhere(tmp_path: Path, places: dict[str, str], said: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": A}, tmp_path / "one.safetensors")
    write_index(folder, places)
    with pytest.raises(FormatError, match=said):
        open_weights(folder)


def test_a_tensor_that_isnt_where_the_index_says(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(FormatError, match=r"index\.json says that one\.safetensors holds 'b', but it doesn't"):
        open_weights(tmp_path)
