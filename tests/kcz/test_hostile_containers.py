"""What a forged or damaged ``.kcz`` file may not do: take memory, or be decoded to a file that nothing opens."""

from __future__ import annotations

import json
import os
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import kcomplex as kc
from kcomplex.errors import KComplexError, RefusedStreamError, StreamError, VerificationError, WeightsError
from kcomplex.estimators.structure import MAGIC, TensorEntry, decode_structure, encode_structure, varint
from kcomplex.kcz.container import Container, decode, encode, verify
from kcomplex.kcz.index import HEAD, _trailer, digest_of
from kcomplex.weights import words_of

SPEC = b"raw"


def write(path: Path, structure: bytes, streams: int = 0, notes: bytes = b"{}") -> None:
    """Write a file without shared side information, of empty streams, with an index whose digests fit."""
    index = structure + varint(0) + digest_of(b"") * (1 + streams) + zlib.compress(notes, 9)
    path.write_bytes(HEAD + index + _trailer(HEAD, index))


def packed(body: bytes) -> bytes:
    packed = zlib.compress(bytes([len(SPEC)]) + SPEC + body, 9)
    return MAGIC + varint(len(body) + len(SPEC) + 1) + varint(len(packed)) + packed


def tensors_without_names(count: int) -> bytes:
    return packed(varint(0) * 2 + varint(count) + b"\1" * count + b"\0" * count + b"\6" * count + b"\1" * count)


def names_of_one_tensor(count: int) -> bytes:
    return packed(varint(0) * 2 + varint(1) + varint(count) + varint(0) * count + b"\6\1\0\0")


def pieces_of_one_tensor(count: int) -> bytes:
    return packed(varint(0) + varint(1) + b"\1\1\1a\6\1\1" + varint(count) + b"\0" * count)


def dimensions_of_tensors(count: int) -> bytes:
    names = b"".join(b"\4%04x" % place for place in range(count))
    body = varint(0) * 2 + varint(count) + b"\1" * count + names + b"\6" * count
    return packed(body + b"\xff\x7f" * count + b"\1" * (16383 * count))


def bytes_of_a_name(count: int) -> bytes:
    return packed(varint(0) * 2 + b"\1\1" + varint(count) + b"a" * count + b"\6\0\0")


@pytest.mark.parametrize(
    ("bomb", "count"),
    [
        (tensors_without_names, 1_000_000),
        (names_of_one_tensor, 9_000_000),
        (pieces_of_one_tensor, 9_000_000),
        (dimensions_of_tensors, 600),
        (bytes_of_a_name, 50_000_000),
    ],
)
def test_an_index_takes_no_more_memory_than_its_bytes_can_tell(tmp_path: Path, bomb: Any, count: int) -> None:
    path = tmp_path / "bomb.kcz"
    write(path, bomb(count), 1)
    refused_in(path, 20e6)


def test_notes_take_no_more_memory_than_their_bytes_can_tell(tmp_path: Path) -> None:
    path = tmp_path / "bomb.kcz"
    write(path, packed(varint(0) * 2 + b"\1\1\1a\6\1\0\0"), 1, b'{"x":[' + b"[]," * 20_000_000 + b"0]}")
    refused_in(path, 20e6)


def refused_in(path: Path, memory: float) -> None:
    assert path.stat().st_size < 80_000
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match=r"bomb\.kcz"):
            Container(path)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1, 200, 3_000])
def test_names_are_told_however_alike_they_are(count: int) -> None:
    for name in ("%d", "model." * 300 + "layers.%d.weight"):
        entries = [TensorEntry((name % place,), torch.float32, (0,)) for place in range(count)]
        assert decode_structure(encode_structure("raw", 0, entries)).tensors == tuple(entries)


def test_notes_are_told_however_well_they_are_deflated(tmp_path: Path) -> None:
    original = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3)}, original, metadata={"made of": "x" * 5_000_000})
    encode(original, tmp_path / "a.kcz", "raw")
    decode(tmp_path / "a.kcz", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == original.read_bytes()


def test_what_no_safetensors_file_can_hold_is_decoded_to_a_pytorch_file(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "__metadata__": torch.ones(3),
        "double": torch.randn(4, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)),
        "bytes": torch.arange(8, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "": tied,
        "tied": tied,
        "turned": tied.t().contiguous(),
    }
    path, output = tmp_path / "w.kcz", tmp_path / "w.pt"
    encode(tensors, path, "planes|zstd", count="all")
    for left_out, told in ((("double",), "__metadata__"), (("__metadata__",), "complex128")):
        kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        encode(kept, tmp_path / "kept.kcz", "zstd", count="all")
        with pytest.raises(WeightsError, match=rf"safetensors files can't hold .*{told}.*: write a .pt file"):
            decode(tmp_path / "kept.kcz", tmp_path / "w.safetensors")
    decode(path, output)
    found = torch.load(output)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert words_of(found[name]).tobytes() == words_of(tensor).tobytes()
    assert found["tied"].data_ptr() == found[""].data_ptr()
    assert verify(path, output, count="all") == 0
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    names = (
        "",
        " ",
        "a/b",
        "../c",
        "\x1b[31m",
        "a\0b",
        "\N{SNOWMAN}",
        "\U0001f600",
        "x" * 5000,
        "a.b",
        "a",
        "A",
        "\xe9",
        "e\u0301",
    )
    tensors = {name: torch.full((place + 1, 3), float(place)) for place, name in enumerate(names)}
    encode(tensors, tmp_path / "w.kcz", "palette|entropy", count="all")
    decode(tmp_path / "w.kcz", tmp_path / f"w{suffix}")
    read = torch.load if suffix == ".pt" else safetensors.torch.load_file
    found = read(tmp_path / f"w{suffix}")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_long_tensor_is_decoded_to_a_pytorch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 100)
    tensors = {"long": torch.arange(1000).reshape(50, 20), "wide": torch.arange(500.0)}
    encode(tensors, tmp_path / "w.kcz", "mix")
    decode(tmp_path / "w.kcz", tmp_path / "w.pt", jobs=2)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in torch.load(tmp_path / "w.pt").items())


@pytest.mark.parametrize("name", ["w.npz", "w.kcz", "w", "w.safetensors.bak"])
def test_decode_writes_no_other_format_than_the_name_says(tmp_path: Path, name: str) -> None:
    encode({"a": torch.ones(3)}, tmp_path / "a.kcz", "raw")
    with pytest.raises(KComplexError, match=r"writes \.safetensors and \.pt files"):
        decode(tmp_path / "a.kcz", tmp_path / name)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.kcz"]


@pytest.mark.parametrize(
    "notes",
    [
        r'{"metadata":{"a":"\ud800"}}',
        r'{"metadata":{"\udfff":"a"}}',
        '{"inexact":{"a":1' + "0" * 400 + "}}",
        '{"inexact":{"a":NaN}}',
        '{"inexact":{"a":-1.0}}',
        '{"order":["\\ud800"]}',
    ],
)
def test_notes_that_no_file_can_hold_are_refused(tmp_path: Path, notes: str) -> None:
    json.loads(notes)
    structure = encode_structure("raw", 0, [TensorEntry(("a",), torch.float32, (0,))])
    write(tmp_path / "w.kcz", structure, 1)
    Container(tmp_path / "w.kcz").close()
    write(tmp_path / "w.kcz", structure, 1, notes.encode())
    with pytest.raises(StreamError, match="notes"):
        Container(tmp_path / "w.kcz")


def test_two_tensors_have_no_common_name(tmp_path: Path) -> None:
    for names in ((("a",), ("a",)), (("a", "a"),), (("a", "b"), ("c", "a"))):
        entries = [TensorEntry(own, torch.float32, (0,)) for own in names]
        write(tmp_path / "w.kcz", encode_structure("raw", 0, entries), len(entries))
        with pytest.raises(StreamError, match="one name to two tensors"):
            decode(tmp_path / "w.kcz", tmp_path / "w.safetensors")
        assert not (tmp_path / "w.safetensors").exists()


def test_verify_tells_damage_from_what_it_cannot_check(tmp_path: Path) -> None:
    path = tmp_path / "w.kcz"
    given = {"a": torch.arange(40.0)}
    encode({"a": torch.arange(40.0) + 1}, path, "zstd", given=given)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:50], data[:20] + b"x" + data[21:], data[:-30] + b"x" + data[-29:]):
        path.write_bytes(damaged)
        with pytest.raises(VerificationError, match=r"w\.kcz"):
            verify(path, given=given)
        with pytest.raises(StreamError, match=r"w\.kcz"):
            decode(path, tmp_path / "w.pt", given=given)
    for other in (b"PK\3\4", data[:8] + b"\2" + data[9:], data[:8] + b"\x09" + data[9:]):
        path.write_bytes(other)
        with pytest.raises(RefusedStreamError):
            verify(path)
    path.write_bytes(data)
    for wrong in (None, {"a": torch.zeros(40)}):
        with pytest.raises(RefusedStreamError, match="given other weights"):
            verify(path, given=wrong)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.kcz")
    (tmp_path / "folder.kcz").mkdir()
    for name in ("pipe.kcz", "folder.kcz"):
        with pytest.raises(RefusedStreamError, match="no regular file"):
            verify(tmp_path / name)


@pytest.mark.parametrize("spec", ["nothing", "raw:level=3", "raw|", "zstd:level=99", "l2", "given:w.pt|zstd"])
def test_a_code_that_there_is_not_is_refused_with_the_name_of_the_file(tmp_path: Path, spec: str) -> None:
    write(tmp_path / "w.kcz", encode_structure(spec, 0, [TensorEntry(("a",), torch.float32, (0,))]), 1)
    with pytest.raises(KComplexError, match=r"w\.kcz"):
        Container(tmp_path / "w.kcz")


def test_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    for empty in ({}, kc.Weights([])):
        with pytest.raises(WeightsError, match="no tensor"):
            encode(empty, tmp_path / "w.kcz", "raw", partial=True)
        with pytest.raises(WeightsError, match="no tensor"):
            kc.encode_checkpoint(empty, "raw", partial=True)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "w.kcz", encode_structure("raw", 0, []))
    with pytest.raises(VerificationError, match="no tensor"):
        verify(tmp_path / "w.kcz")


def test_arguments_of_other_types_are_errors_of_kcomplex(tmp_path: Path) -> None:
    tensors, path = {"a": torch.ones(3)}, tmp_path / "w.kcz"
    encode(tensors, path, "raw")
    wrong: Any
    for wrong in (5, None, b"w.kcz", "w\0.kcz"):
        for call in (
            lambda wrong=wrong: encode(tensors, wrong, "raw"),
            lambda wrong=wrong: decode(wrong, tmp_path / "w.pt"),
            lambda wrong=wrong: decode(path, wrong),
            lambda wrong=wrong: verify(wrong),
            lambda wrong=wrong: Container(wrong),
        ):
            with pytest.raises(KComplexError, match="no path"):
                call()
    for wrong in ("w.kcz", path, 5, None, tensors):
        with pytest.raises(KComplexError, match="a stream is bytes"):
            kc.decode_checkpoint(wrong)
    for wrong in (5, None, [1], b"raw", object()):
        for call in (
            lambda wrong=wrong: kc.encode_checkpoint(wrong, "raw"),
            lambda wrong=wrong: kc.encode_checkpoint(tensors, wrong),
            lambda wrong=wrong: encode(wrong, tmp_path / "x.kcz", "raw"),
            lambda wrong=wrong: encode(tensors, tmp_path / "x.kcz", wrong),
            lambda wrong=wrong: encode(tensors, tmp_path / "x.kcz", "raw", jobs=wrong and "1"),
            lambda wrong=wrong: verify(path, wrong if wrong is not None else 5),
            lambda wrong=wrong: decode(path, tmp_path / "x.pt", limit=wrong if wrong not in (5, None) else "5"),
        ):
            with pytest.raises(KComplexError):
                call()
    assert list(tmp_path.iterdir()) == [path]
