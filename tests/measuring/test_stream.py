"""The stream behind every code: complete, self-delimiting, and refused when it was changed."""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.errors import KComplexError, StreamError, VerificationError, WeightsError
from kcomplex.estimators.structure import (
    _DTYPE_NAMES,
    MAGIC,
    Reader,
    decode_structure,
    encode_structure,
    entries_of,
    varint,
)
from kcomplex.measuring.stream import prove
from kcomplex.sources.state_dicts import state_dict_weights
from kcomplex.weights import DTYPES, words_of


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tied = torch.randn(6, 5, generator=generator)
    return {
        "layer.weight": torch.randn(20, 30, generator=generator).round(decimals=1),
        "layer.bias": torch.randn(20, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "mask": torch.rand(11, generator=generator) > 0.5,
        "empty": torch.zeros(0, 3),
        "embedding": tied,
        "head": tied,
    }


@given(st.integers(0, 2**64 - 1))
def test_varints_come_back(value: int) -> None:
    reader = Reader(varint(value))
    assert reader.varint() == value
    assert reader.left == 0


def test_structure_holds_names_aliases_dtypes_and_shapes() -> None:
    weights = state_dict_weights(checkpoint())
    streams = {name: [(place, place % 3)] for place, name in enumerate(weights)}
    entries = entries_of(weights, {}, streams)
    structure = decode_structure(encode_structure("zstd", 3, entries))
    assert structure.tensors == tuple(entries)
    assert structure.spec == "zstd"
    assert structure.shared == 3
    assert [entry.names for entry in structure.tensors] == [(h.name, *h.aliases) for h in weights.values()]
    assert [(entry.dtype, entry.shape) for entry in structure.tensors] == [(h.dtype, h.shape) for h in weights.values()]


@pytest.mark.parametrize("spec", ["raw", "zstd", "palette|entropy", "planes|zstd", "mosaic:s=2|entropy"])
def test_lossless_streams_give_every_bit_back(spec: str) -> None:
    tensors = checkpoint()
    data = kc.encode_checkpoint(tensors, spec)
    (description,) = kc.describe(tensors, spec)
    assert 8 * len(data) == description.bits
    prove(tensors, description)
    decoded = kc.decode_checkpoint(data)
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert decoded[name].dtype == tensor.dtype
        assert decoded[name].shape == tensor.shape
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes()
    assert decoded["embedding"] is decoded["head"]


@pytest.mark.parametrize("spec", ["uniform:bits=4|entropy", "deadzone|entropy", "sign|zstd", "mosaic:s=2,k=8|entropy"])
def test_lossy_streams_give_back_what_their_distortion_says(spec: str) -> None:
    tensors = checkpoint()
    description = kc.describe(tensors, spec)[0]
    decoded = kc.decode_checkpoint(kc.encode_checkpoint(tensors, spec))
    error = sum(
        float((decoded[name].double() - tensor.double()).square().sum())
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and name != "head"
    )
    assert description.lossless is False
    assert description.distortion == pytest.approx(error / description.weights)
    assert torch.equal(decoded["mask"], tensors["mask"])
    prove(tensors, description)
    with pytest.raises(VerificationError, match="decoding changed"):
        prove(tensors, replace(description, tensors=tuple(replace(t, exact=True) for t in description.tensors)))


def test_proxies_have_no_stream() -> None:
    with pytest.raises(WeightsError, match="kind proxy"):
        kc.encode_checkpoint(checkpoint(), "bdm")


def test_a_quantiser_refuses_what_is_not_finite() -> None:
    with pytest.raises(WeightsError, match=r"'w' .* holds NaN or infinity"):
        kc.describe({"w": torch.tensor([1.0, float("nan")])}, "uniform|zstd")


def test_not_a_stream() -> None:
    with pytest.raises(StreamError, match="isn't a kcomplex stream"):
        kc.decode_checkpoint(b"PK\x03\x04")


# palette|entropy of a tied 12x4 float32 and a 0-d int64, as kcomplex 0.1.0 wrote it.
GOLDEN = (
    "6b637831313978da932e48cc492d2949ad49cd2b29ca2fa8b44ace4f492db22d4acc4b4f65606264cce367e0626229c94c4d"
    "612c6763e261910300a7830e0e010007000000000000000f01030000003f1881fffffffffffffc0200212121212121212121"
    "212121"
)
SPECS = ("zstd", "palette|entropy", "mosaic:s=2|entropy")


@cache
def stream_of(spec: str) -> bytes:
    return kc.encode_checkpoint(checkpoint(), spec)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.data())
def test_truncated_streams_are_refused(spec: str, data: st.DataObject) -> None:
    stream = stream_of(spec)
    length = data.draw(st.integers(0, len(stream) - 1))
    with pytest.raises(KComplexError):
        kc.decode_checkpoint(stream[:length])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SPECS), st.data())
def test_mutated_streams_never_crash(spec: str, data: st.DataObject) -> None:
    stream = bytearray(stream_of(spec))
    for position in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=3)):
        stream[position] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(KComplexError):
        kc.decode_checkpoint(bytes(stream))


def test_long_tensors_are_coded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcomplex.estimators.symbols.PIECE_SYMBOLS", 100)
    tensors = {"w": torch.arange(1234).reshape(2, 617) % 7, "z": torch.randn(10, 10)}
    for spec in ("zstd", "palette|entropy", "uniform:bits=3|entropy"):
        data = kc.encode_checkpoint(tensors, spec)
        assert 8 * len(data) == kc.describe(tensors, spec)[0].bits
        assert torch.equal(kc.decode_checkpoint(data)["w"], tensors["w"])


def test_dtype_codes_of_streams_never_change() -> None:
    """Streams of earlier versions must stay readable: new dtypes are appended."""
    assert _DTYPE_NAMES[:3] == ("bfloat16", "bool", "complex128")
    assert _DTYPE_NAMES.index("float32") == 6
    assert _DTYPE_NAMES.index("uint8") == 20
    assert set(_DTYPE_NAMES) == set(DTYPES)


def test_a_stream_of_the_first_version_is_refused() -> None:
    with pytest.raises(StreamError, match="version 1, which this kcomplex no longer reads"):
        kc.decode_checkpoint(bytes.fromhex(GOLDEN))


def test_streams_name_every_option_of_their_decoder() -> None:
    stream = kc.encode_checkpoint({"w": torch.ones(3)}, "planes|zstd")
    assert decode_structure(stream).spec == "planes:unit=byte|zstd:level=3,long=False"


@pytest.mark.parametrize("shape", [(1,) * 70, (0, 2**63)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    body = b"\x03raw\x00\x00\x01\x01\x01w\x06" + varint(len(shape)) + b"".join(varint(side) for side in shape) + b"\x00"
    packed = zlib.compress(body, 9)
    with pytest.raises(StreamError, match=r"impossible shape|70 dimensions"):
        kc.decode_checkpoint(MAGIC + varint(len(body)) + varint(len(packed)) + packed)
