"""Files and folders that aren't checkpoints: named by their first bytes, with what to give instead."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kcomplex.errors import FormatError
from kcomplex.kcz.container import encode
from kcomplex.sources.files import open_path
from kcomplex.sources.open import open_weights

W = torch.ones(8)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


FOREIGN = {
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "GGUF"),
    "ggml": (b"lmgg" + bytes(40), "GGML"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "page with space": (b"\n\n  <HTML><body>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page or XML"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.1.0:" + bytes(20), "ONNX"),
    "saved model": (b"\x08\x01\x12\xb8\x9f\x01\n\x84" + bytes(20), "TensorFlow"),
    "lite": (b"\x1c\0\0\0TFL3" + bytes(20), "TensorFlow Lite"),
    "checkpoint": (b'model_checkpoint_path: "model.ckpt-3"\n', "TensorFlow checkpoints"),
    "gzip": (gzip.compress(b"abc"), "unpack it"),
    "seven": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "unpack it"),
    "tar": (tar(), "unpack it"),
    "json": (json.dumps({"weight_map": {}}).encode(), "JSON text"),
    "msgpack": (b"\x82\xa6params\x81\xa5Dense\x80", "Flax"),
    "large msgpack": (b"\xde\x00\x10\xa6params\x81\xa5Dense\x80", "Flax"),
    "word2vec": (b"3000000 300\n</s> " + bytes(20), "word2vec"),
    "database": (b"SQLite format 3\0" + bytes(20), "SQLite"),
    "pickle": (pickle.dumps({"w": [1.0]}, 4), "a pickle, but not one of torch.save"),
    "zip": (zipped("out/model.safetensors", "readme.txt"), "a zip file of other files ('out/model.safetensors')"),
    "keras": (zipped("config.json", "metadata.json", "model.weights.h5"), "Keras"),
    "export": (zipped("x/archive_format", "x/byteorder"), "torch.export"),
}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors", ".npz", ""])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named_by_its_first_bytes(tmp_path: Path, name: str, suffix: str) -> None:
    data, said = FOREIGN[name]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        open_weights(path)
    assert said in str(caught.value)
    assert "truncated" not in str(caught.value)


def test_a_kcz_file_is_to_be_decoded_first(tmp_path: Path) -> None:
    encode({"w": W}, tmp_path / "model.kcz", "raw")
    (tmp_path / "model.kcz").rename(tmp_path / "model.pt")
    with pytest.raises(FormatError, match="kcomplex decode FILE"):
        open_weights(tmp_path / "model.pt")


def test_what_begins_like_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(bytes(range(3, 100)))
    with pytest.raises(FormatError, match=r"begins with 03 04 05 06 07 08 09 0a, as no file of torch\.save does"):
        open_weights(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["model-00001-of-00005.safetensors", "pytorch_model-00002-of-00002.bin"])
def test_a_shard_is_not_the_whole(tmp_path: Path, name: str) -> None:
    (save_file if name.endswith("s") else torch.save)({"w": W}, tmp_path / name)
    with pytest.raises(FormatError, match=r"one of [52] shards of a model: give the folder"):
        open_weights(tmp_path / name)
    (tmp_path / name).rename(tmp_path / f"one{Path(name).suffix}")
    assert list(open_weights(tmp_path / f"one{Path(name).suffix}")) == ["w"]


def test_the_only_shard_is_the_whole(tmp_path: Path) -> None:
    save_file({"w": W}, tmp_path / "model-00001-of-00001.safetensors")
    assert list(open_weights(tmp_path / "model-00001-of-00001.safetensors")) == ["w"]


@pytest.mark.parametrize("pattern", ["consolidated.0{}.pth", "mp_rank_0{}_model_states.pt", "model_world_rank_{}.pt"])
def test_a_part_that_every_tensor_is_cut_over_is_not_the_whole(tmp_path: Path, pattern: str) -> None:
    torch.save({"w": W}, tmp_path / pattern.format(0))
    assert list(open_weights(tmp_path / pattern.format(0))) == ["w"]
    torch.save({"w": W}, tmp_path / pattern.format(1))
    with pytest.raises(FormatError, match="one of 2 parts"):
        open_weights(tmp_path / pattern.format(0))


# Folders.


def place(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)({"w": W}, path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"], ["/unet", "/vae"]),
        (["snapshots/abc/model.safetensors"], ["/snapshots/abc"]),
        (["models--o--n/snapshots/abc/model-00001-of-00002.safetensors"], ["/models--o--n/snapshots/abc"]),
        (["checkpoint-500/pytorch_model.bin", "runs/a.npz"], ["/checkpoint-500", "/runs/a.npz"]),
        (["epoch=3.ckpt", "last.ckpt"], ["/epoch=3.ckpt", "/last.ckpt"]),
    ],
)
def test_a_folder_that_holds_checkpoints_says_where(tmp_path: Path, files: list[str], said: list[str]) -> None:
    for name in files:
        place(tmp_path / name)
    with pytest.raises(FormatError, match="not one checkpoint but a folder that holds some") as caught:
        open_weights(tmp_path)
    for where in said:
        assert f"{tmp_path}{where}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".metadata", r"torch\.distributed\.checkpoint\.format_utils dcp_to_torch FOLDER"),
        ("zero_to_fp32.py", "DeepSpeed"),
        ("saved_model.pb", "TensorFlow SavedModel"),
        ("manifest.ocdbt", "Orbax"),
    ],
)
def test_folders_of_other_libraries_are_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("x")
    (tmp_path / "__0_0.distcp").write_text("x")
    with pytest.raises(FormatError, match=said):
        open_weights(tmp_path)


def test_numbered_pickles_need_no_index(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({str(number): W * number}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["1", "2"]
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FormatError, match="only these are there: 1"):
        open_weights(tmp_path)


def test_an_adapter_and_what_a_trainer_leaves_beside_it(tmp_path: Path) -> None:
    others = ("global_step1/x.pt", "optimizer.pt", "rng_state.pth", "training_args.bin")
    for name in ("adapter_model.bin", *others):
        place(tmp_path / name)
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["w"]
        assert [(item.name, item.role) for item in weights.skipped] == [(name, "other") for name in others]


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    save_file({"w": W}, tmp_path / "first.safetensors")
    (tmp_path / ".second.4711.partial.safetensors").write_bytes(b"half")
    (tmp_path / ".model.safetensors.index.json").write_bytes(b"half")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["w"]
        assert weights.skipped == ()


def test_a_folder_hands_the_root_to_its_only_file(tmp_path: Path) -> None:
    torch.save({"G": {"w": W}, "D": {"v": W}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="--root"):
        open_weights(tmp_path)
    with open_path(str(tmp_path), "G") as weights:
        assert list(weights) == ["w"]
