"""What a stranger's file may not do: run code, crash a reader, or come back as other weights."""

import json
import zlib

import numpy as np
import pytest
import torch

import kcomplex as kc
from kcomplex.compressors.context import Context
from kcomplex.container import Container, decode_file, encode_file
from kcomplex.container_index import _read_notes
from kcomplex.errors import KComplexError, SpecError, StreamError
from kcomplex.given import Given
from kcomplex.pipeline import build_decoder
from kcomplex.quantisation import quantise_file


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(40, 30, generator=random).mul(8).round().to(torch.int8) for name in "abc"}


@pytest.mark.parametrize("inner", ["seed:factory=os:system,seed=0,command=touch ran", "ran.pt"])
def test_nested_given_weights_are_refused_unopened(inner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="twice"):
        build_decoder(f"given:digest:00|given:{inner}|lin")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SpecError, match="twice"):
        build_decoder("given:digest:0|" * 3000 + "lin")


def test_what_is_given_is_refused_where_a_specification_could_not_name_it():
    with pytest.raises(SpecError, match="ends it"):
        Given.of("seed:factory=package:function,x=a|b")
    with pytest.raises(SpecError, match="isn't of the form"):
        Given.of("seed:factory=package:function,seed=" + "9" * 5000)


def test_weights_that_changed_are_given_under_a_digest_of_their_own():
    given = {"a": torch.zeros(30, 30)}
    code = kc.build_estimator("zstd", given)
    first = kc.encode_checkpoint({"a": torch.ones(30, 30)}, code)
    given["a"] += 0.5
    second = kc.encode_checkpoint({"a": torch.ones(30, 30)}, code)
    assert torch.equal(kc.decode_checkpoint(second, given=given)["a"], torch.ones(30, 30))
    assert torch.equal(kc.decode_checkpoint(first, given={"a": torch.zeros(30, 30)})["a"], torch.ones(30, 30))
    with pytest.raises(StreamError, match="other weights"):
        kc.decode_checkpoint(first, given=given)


def test_a_damaged_tensor_does_not_spoil_those_before_it(tmp_path):
    tensors, path = weights(), tmp_path / "w.kcz"
    encode_file(tensors, path, "mix")
    with Container(path) as container:
        offset = next(stream.offset for stream in container._streams if stream.tensor == 1)
    data = bytearray(path.read_bytes())
    data[offset + 40] ^= 1
    path.write_bytes(data)
    with Container(path) as container:
        with pytest.raises(StreamError, match="'b'"):
            container.tensor("c")
        assert torch.equal(container.tensor("a"), tensors["a"])


def test_tensors_are_read_while_others_are_iterated(tmp_path):
    tensors, path = weights(), tmp_path / "w.kcz"
    encode_file(tensors, path, "mix")
    with Container(path) as container:
        for entry, _, tensor in container.pieces():
            assert torch.equal(container.tensor("a"), tensors["a"])
            assert torch.equal(tensor, tensors[entry.names[0]])


def test_integers_far_from_their_middle_come_back():
    symbols = np.full((64, 64), -(2**48 - 1))
    symbols[0, :5] = 2**48 - 1
    coder = Context()
    assert np.array_equal(coder.decode(coder.encode(symbols), symbols.shape, symbols.dtype), symbols)


@pytest.mark.parametrize("coder", ["context", "mix"])
def test_a_middle_beyond_64_bits_is_refused(coder):
    symbols = np.arange(-20, 20).reshape(5, 8)
    code = kc.build_estimator(coder)
    stream = code.encode(symbols)
    # The middle, 0, is the byte after the first.
    beyond = stream[:1] + b"\x80" * 9 + b"\x7e" + stream[2:]
    with pytest.raises(StreamError, match="counted from"):
        code.decode(beyond, (50, 80), symbols.dtype)


@pytest.mark.parametrize(
    "notes",
    [
        '{"order":5}',
        '{"order":[[]]}',
        '{"order":["other"]}',
        '{"order":["a","a"]}',
        '{"metadata":[1]}',
        '{"metadata":{"a":1}}',
        '{"inexact":[1]}',
        '{"inexact":{"a":"x"}}',
        '{"inexact":{"other":1}}',
        "[" * 100_000,
        "[]",
    ],
)
def test_notes_that_make_no_sense_are_refused(notes):
    with pytest.raises(StreamError, match="notes"):
        _read_notes(zlib.compress(notes.encode()), {"a", "b"})
    told = {"metadata": {"k": "v"}, "order": ["b", "a"], "inexact": {"a": 0.5}}
    assert _read_notes(zlib.compress(json.dumps(told).encode()), {"a", "b"}).order == ("b", "a")


def test_nothing_overwrites_what_it_is_made_of(tmp_path):
    import safetensors.torch

    plain, packed = tmp_path / "w.safetensors", tmp_path / "w.kcz"
    safetensors.torch.save_file(weights(), plain)
    encode_file(plain, packed, "zstd")
    before = plain.read_bytes(), packed.read_bytes()
    (tmp_path / "link").symlink_to(plain)
    for write in (
        lambda: encode_file(plain, plain, "zstd"),
        lambda: encode_file(plain, tmp_path / "link", "zstd"),
        lambda: encode_file({"a": torch.ones(3)}, plain, "zstd", given=plain),
        lambda: decode_file(packed, packed),
        lambda: quantise_file(plain, plain, mse=1e-3),
    ):
        with pytest.raises(KComplexError, match="another name"):
            write()
    assert (plain.read_bytes(), packed.read_bytes()) == before


def test_huge_weights_have_a_squared_error_that_is_infinite_not_a_crash(tmp_path):
    huge = {"w": torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e200}
    with np.errstate(over="ignore"), pytest.raises(KComplexError):
        quantise_file(huge, tmp_path / "w.kcz", mse=1.0)
