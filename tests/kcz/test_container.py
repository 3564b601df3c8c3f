"""The ``.kcz`` file: every bit comes back, in order and with metadata, and no changed byte goes unnoticed."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import tracemalloc
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.errors import (
    KComplexError,
    SourceNotFoundError,
    StreamError,
    VerificationError,
    WeightsError,
)
from kcomplex.estimators.code import Code
from kcomplex.estimators.coder import Coder
from kcomplex.estimators.pieces import piece_count, pieces_of
from kcomplex.kcz import index as container_index
from kcomplex.kcz.container import Container, decode, encode, verify
from kcomplex.kcz.index import HEAD, MAGIC
from kcomplex.registry import registry
from kcomplex.weights import words_of


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tied = torch.randint(-7, 8, (6, 5), generator=generator, dtype=torch.int8)
    return {
        "layer.weight": torch.randn(20, 30, generator=generator).round(decimals=1),
        "layer.bias": torch.randn(20, generator=generator).to(torch.bfloat16),
        "counts": torch.randint(-20, 20, (40, 50), generator=generator, dtype=torch.int8),
        "steps": torch.tensor(7),
        "mask": torch.rand(11, generator=generator) > 0.5,
        "empty": torch.zeros(0, 3),
        "nan": torch.tensor([0x7FC01234, -0x80000000], dtype=torch.int32).view(torch.float32),
        "embedding": tied,
        "head": tied,
    }


def noise_checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(35, 36, generator=generator) for name in ("first", "second")}


@cache
def ten_kilobytes() -> bytes:
    return container_of(noise_checkpoint(), "planes|zstd")


def container_of(tensors: dict[str, torch.Tensor], spec: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.kcz"
        size = encode(tensors, path, spec)
        data = path.read_bytes()
    assert len(data) == size
    return data


def read_whole(path: Path) -> None:
    """Read all that a container holds."""
    verify(path)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("spec", ["raw", "planes|zstd", "palette|entropy", "mosaic:s=2|entropy", "lin", "mix"])
def test_every_bit_comes_back(tmp_path: Path, spec: str, jobs: int) -> None:
    tensors = checkpoint()
    if spec.startswith("mosaic"):
        del tensors["nan"]
    path, output = tmp_path / "model.kcz", tmp_path / "model.safetensors"
    encode(tensors, path, spec, jobs=jobs)
    decode(path, output, jobs=jobs)
    decoded = safetensors.torch.load_file(output)
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (decoded[name].dtype, decoded[name].shape) == (tensor.dtype, tensor.shape)
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes()
    assert verify(path, tensors, jobs=jobs) == 0


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("spec", ["planes|zstd", "palette|entropy", "mosaic|entropy", "uniform|zstd", "best", "lin"])
def test_long_tensors_come_and_go_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, jobs: int
) -> None:
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 100)
    tensors = checkpoint() | {"wide": torch.arange(1000.0).reshape(2, 500), "line": torch.arange(1000)}
    tensors["waves"] = torch.randn(30, 7, dtype=torch.complex64)
    if spec.startswith("uniform"):
        del tensors["nan"]
    path, output = tmp_path / "model.kcz", tmp_path / "model.safetensors"
    pieces: list[int] = []
    encode(tensors, path, spec, jobs=jobs, progress=lambda piece: pieces.append(piece.elements))
    decode(path, output, jobs=jobs)
    decoded = safetensors.torch.load_file(output)
    lossy = {"layer.weight", "layer.bias", "wide"} if spec.startswith("uniform") else set()
    with Container(path) as container:
        if not lossy and not spec.startswith("mosaic"):
            assert max(pieces) <= 100
        for name in ("line", "waves", "wide", "counts", "line"):
            assert torch.equal(container.tensor(name), decoded[name])
    for name in tensors.keys() - lossy:
        assert words_of(decoded[name]).tobytes() == words_of(tensors[name]).tobytes()
    verify(path, tensors, jobs=jobs)
    tensors["line"][999] += 1
    with pytest.raises(VerificationError, match="'line'"):
        verify(path, tensors, jobs=jobs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 70), max_size=3), st.integers(300, 5000))
def test_pieces_cover_a_tensor_and_keep_to_the_limit(sides: list[int], limit: int) -> None:
    shape = tuple(sides)
    found = list(pieces_of(shape, limit))
    assert len(found) == piece_count(shape, limit)
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]
    assert found[-1].stop == math.prod(shape)
    for piece in found:
        assert math.prod(piece.shape) == piece.stop - piece.start
        assert len(found) == 1 or piece.stop - piece.start <= limit


@pytest.mark.parametrize("jobs", [1, 2])
def test_memory_is_that_of_the_pieces_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    """Of torch's memory, which the tracer doesn't see, a piece is a view of the file; NumPy's and Python's are seen."""
    original, path, output = (tmp_path / name for name in ("a.safetensors", "a.kcz", "b.safetensors"))
    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"w": values.reshape(1 << 11, 1 << 11)}, original)
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 1 << 16)
    for step in (
        lambda: encode(original, path, "planes|zstd", jobs=jobs),
        lambda: decode(path, output, jobs=jobs),
        lambda: verify(path, original, jobs=jobs),
    ):
        tracemalloc.start()
        try:
            step()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < (4 << 20) * jobs
    assert output.read_bytes() == original.read_bytes()


def test_the_file_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    for jobs in (1, 3):
        encode(checkpoint(), tmp_path / f"{jobs}.kcz", "planes|zstd", jobs=jobs)
    assert (tmp_path / "1.kcz").read_bytes() == (tmp_path / "3.kcz").read_bytes()


def test_a_safetensors_file_comes_back_with_metadata_and_order(tmp_path: Path) -> None:
    original, path, output = (tmp_path / name for name in ("a.safetensors", "a.kcz", "b.safetensors"))
    tensors = noise_checkpoint() | {"bias": torch.zeros(7, dtype=torch.float16), "scalar": torch.tensor(2.5)}
    safetensors.torch.save_file(tensors, original, metadata={"format": "pt"})
    encode(original, path, "planes|zstd")
    decode(path, output)
    assert output.read_bytes() == original.read_bytes()
    assert verify(path, original) == 0


def test_an_unusual_order_of_data_comes_back(tmp_path: Path) -> None:
    original, path, output = (tmp_path / name for name in ("a.safetensors", "a.kcz", "b.safetensors"))
    header = json.dumps(
        {
            "__metadata__": {"author": "nobody", "epoch": "3"},
            "b": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    original.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(16)))
    encode(original, path, "raw")
    decode(path, output)
    assert output.read_bytes() == original.read_bytes()


def test_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    tensors = checkpoint()
    for spec in ("planes|zstd", "lin"):
        encode(tensors, tmp_path / "model.kcz", spec)
        with Container(tmp_path / "model.kcz") as container:
            assert container.estimator.split("|")[0].split(":")[0] in ("planes", "lin")
            for name in ("head", "counts", "embedding", "layer.bias", "counts"):
                assert torch.equal(container.tensor(name), tensors[name])
            with pytest.raises(WeightsError, match="no tensor 'nothing'"):
                container.tensor("nothing")


def test_other_tensors_are_readable_when_one_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.kcz"
    data = bytearray(container_of(noise_checkpoint(), "planes|zstd"))
    data[100] ^= 1
    path.write_bytes(data)
    with Container(path) as container:
        assert torch.equal(container.tensor("second"), noise_checkpoint()["second"])
        with pytest.raises(StreamError, match=r"model\.kcz.*'first' can't be decoded.*changed"):
            container.tensor("first")


def test_a_lossy_code_tells_its_error(tmp_path: Path) -> None:
    tensors = checkpoint()
    del tensors["nan"]
    path = tmp_path / "model.kcz"
    encode(tensors, path, "uniform:bits=4|entropy")
    (description,) = kc.describe(tensors, "uniform:bits=4|entropy")
    assert description.distortion
    assert verify(path) == pytest.approx(description.distortion)
    assert verify(path, tensors) == pytest.approx(description.distortion)
    tensors["layer.weight"][3, 4] += 1
    with pytest.raises(VerificationError, match=r"'layer\.weight' isn't what was encoded"):
        verify(path, tensors)


def test_verify_tells_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "model.kcz"
    encode(checkpoint(), path, "zstd")
    changed = checkpoint()
    changed["counts"][39, 49] += 1
    with pytest.raises(VerificationError, match="'counts' isn't what was encoded"):
        verify(path, changed)
    fewer = checkpoint()
    del fewer["mask"]
    with pytest.raises(VerificationError, match="other tensors"):
        verify(path, fewer)
    safetensors.torch.save_file(noise_checkpoint(), tmp_path / "a.safetensors", metadata={"epoch": "1"})
    encode(tmp_path / "a.safetensors", path, "zstd")
    safetensors.torch.save_file(noise_checkpoint(), tmp_path / "a.safetensors", metadata={"epoch": "2"})
    with pytest.raises(VerificationError, match="other metadata"):
        verify(path, tmp_path / "a.safetensors")


def test_the_container_adds_little_to_the_code(tmp_path: Path) -> None:
    tensors = checkpoint()
    size = encode(tensors, tmp_path / "model.kcz", "palette|entropy")
    (description,) = kc.describe(tensors, "palette|entropy")
    overhead = size - description.bits / 8
    assert 0 < overhead <= 50 + 8 * (len(tensors) + 1)


def test_a_proxy_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="kind proxy"):
        encode(checkpoint(), tmp_path / "model.kcz", "l2")
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.kcz"
    with pytest.raises(WeightsError, match="NaN"):
        encode({"a": torch.ones(3), "b": torch.tensor([float("nan")])}, path, "uniform|zstd")
    data = bytearray(ten_kilobytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(StreamError):
        decode(path, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == [path]


FIXTURES = Path(__file__).parent.parent / "fixtures" / "containers"


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.kcz")), ids=lambda path: path.stem)
def test_files_written_earlier_are_read(tmp_path: Path, path: Path) -> None:
    expected = path.with_suffix(".safetensors")
    decode(path, tmp_path / "back.safetensors", jobs=2)
    original = expected if expected.exists() else FIXTURES / "original.safetensors"
    assert (tmp_path / "back.safetensors").read_bytes() == original.read_bytes()


def test_every_coder_has_a_file_written_earlier() -> None:
    codes = ""
    for path in FIXTURES.glob("*.kcz"):
        with Container(path) as container:
            codes += f" {container.estimator}"
    names = registry("kcomplex.estimators")
    coders = {name for name in names.names() if issubclass(names.load(name), (Code, Coder))}
    assert {name for name in coders if not re.search(rf"(^|\W){name}(\W|$)", codes)} == set()


def test_what_is_not_a_container(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file"):
        Container(tmp_path / "nothing.kcz")
    path = tmp_path / "model.kcz"
    for data, told in (
        (b"", "isn't a .kcz file"),
        (b"PK\x03\x04 and more", "isn't a .kcz file"),
        (MAGIC + b"\x07" + bytes(100), "version 07"),
        (HEAD, "truncated"),
    ):
        path.write_bytes(data)
        with pytest.raises(StreamError, match=told):
            Container(path)


# 12 int8 weights with metadata under palette|entropy, as version 1 was written: whole tensors, no pieces.
FIRST_VERSION = (
    "894b435a0d0a1a0a0103010201010053106b637831262e78da932e48cc492d2949ad49cd2b29ca2fa8b44ace4f492db22d4a"
    "cc4b4f656064642c17606262e3000013af0bc5e4a6a0577479b2b462ae3d6044c2171d78daab56ca4d2d494c492c4954b252"
    "a8564a2dc84fce00b2948c956a6b01893008f46600000000000000c56d670478d6fe48e085756daa9ee9ba"
)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_are_refused(tmp_path: Path, version: int) -> None:
    path, output = tmp_path / "model.kcz", tmp_path / "model.safetensors"
    data = bytearray.fromhex(FIRST_VERSION)
    data[len(MAGIC)] = version
    path.write_bytes(data)
    with pytest.raises(StreamError, match=f"of version {version}, which this kcomplex .* no longer reads"):
        decode(path, output)
    assert not output.exists()


def unnoticed(data: bytes, path: Path, positions: Iterable[int]) -> list[int]:
    """Return the positions at which a changed byte isn't noticed."""
    generator = random.Random(0)
    found = []
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= generator.randrange(1, 256)
        path.write_bytes(changed)
        try:
            read_whole(path)
        except (StreamError, VerificationError):
            continue
        found.append(position)
    return found


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    data = ten_kilobytes()
    assert 8_000 < len(data) < 12_000
    assert unnoticed(data, tmp_path / "model.kcz", [*range(20), *range(20, len(data), 17), *range(-150, 0)]) == []


@pytest.mark.slow
def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    assert unnoticed(ten_kilobytes(), tmp_path / "model.kcz", range(len(ten_kilobytes()))) == []


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Return data truncated, lengthened, or with bytes changed, moved or repeated."""
    cut, other = sorted((generator.randrange(len(data)), generator.randrange(len(data))))
    piece = data[cut:other]
    return generator.choice(
        (
            data[:cut],
            data[cut:],
            data + generator.randbytes(generator.randrange(1, 50)),
            data[:cut] + generator.randbytes(other - cut) + data[other:],
            data[:cut] + data[other:],
            data[:other] + piece + data[other:],
            data[:cut] + bytes(other - cut) + data[other:],
        )
    )


def refuse(data: bytes, path: Path, count: int, seed: int) -> None:
    generator = random.Random(seed)
    tracemalloc.start()
    try:
        for _ in range(count):
            changed = mutated(data, generator)
            if changed == data:
                continue
            path.write_bytes(changed)
            with pytest.raises((StreamError, VerificationError), match=r"model\.kcz"):
                read_whole(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6


def test_mutated_files_are_refused(tmp_path: Path) -> None:
    refuse(ten_kilobytes(), tmp_path / "model.kcz", 500, 0)


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_refused(tmp_path: Path) -> None:
    refuse(ten_kilobytes(), tmp_path / "model.kcz", 9_500, 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_forged_digests_crash_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whoever changes a stream may make its digests fit: the decoders behind must refuse it, or decode something."""
    tensors = {"w": torch.arange(300, dtype=torch.int8).reshape(20, 15)}
    original = container_of(tensors, data.draw(st.sampled_from(["mix", "palette|entropy", "planes|zstd", "lzma"])))
    length = int.from_bytes(original[-24:-16], "little")
    index = bytearray(original[-24 - length : -24])
    body = bytearray(original[len(HEAD) : -24 - length])
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    old = container_index.digest_of(original[len(HEAD) : -24 - length])
    assert index.count(old) == 1
    forged = bytes(index).replace(old, container_index.digest_of(bytes(body)))
    path = tmp_path_factory.mktemp("forged") / "model.kcz"
    path.write_bytes(HEAD + body + forged + container_index._trailer(HEAD, forged))
    with contextlib.suppress(KComplexError):
        read_whole(path)
