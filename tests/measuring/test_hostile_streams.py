"""What a stranger's file may not do: run code, crash a reader, or come back as other weights."""

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import kcomplex as kc
from kcomplex.compressors.context.context import Context
from kcomplex.compressors.mix.binary_coder import require_read
from kcomplex.compressors.mix.matrix import RowDecoder
from kcomplex.compressors.quantisers.grid import Grid
from kcomplex.errors import KComplexError, RefusedStreamError, SpecError, StreamError
from kcomplex.estimators.coder import Quantised
from kcomplex.estimators.given import given_of
from kcomplex.estimators.pipeline import build_decoder
from kcomplex.estimators.structure import TensorEntry, encode_structure, varint
from kcomplex.estimators.symbols import PIECE_SYMBOLS
from kcomplex.kcz.container import Container, decode, encode, verify
from kcomplex.kcz.index import HEAD, _read_notes, _trailer, digest_of
from kcomplex.machine import limits as memory
from kcomplex.quantising.quantisation import quantise
from kcomplex.weights import TensorHandle


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
        given_of("seed:factory=package:function,x=a|b")
    with pytest.raises(SpecError, match="isn't of the form"):
        given_of("seed:factory=package:function,seed=" + "9" * 5000)


def test_weights_that_changed_are_given_under_a_digest_of_their_own():
    given = {"a": torch.zeros(30, 30)}
    code = kc.build_estimator("zstd", given)
    first = kc.encode_checkpoint({"a": torch.ones(30, 30)}, code)
    given["a"] += 0.5
    with pytest.raises(SpecError, match="changed since they were given"):
        kc.encode_checkpoint({"a": torch.ones(30, 30)}, code)
    second = kc.encode_checkpoint({"a": torch.ones(30, 30)}, "zstd", given=given)
    assert torch.equal(kc.decode_checkpoint(second, given=given)["a"], torch.ones(30, 30))
    assert torch.equal(kc.decode_checkpoint(first, given={"a": torch.zeros(30, 30)})["a"], torch.ones(30, 30))
    with pytest.raises(StreamError, match="other weights"):
        kc.decode_checkpoint(first, given=given)


def test_a_damaged_tensor_does_not_spoil_those_before_it(tmp_path):
    tensors, path = weights(), tmp_path / "w.kcz"
    encode(tensors, path, "mix")
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
    encode(tensors, path, "mix")
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
    stream = b"".join(part.data for part in code.encode_symbols(symbols, code.memory(b"")))
    # The middle, 0, is the byte after the first.
    beyond = stream[:1] + b"\x80" * 9 + b"\x7e" + stream[2:]
    with pytest.raises(StreamError, match="counted from"):
        code.decode_symbols(beyond, (50, 80), symbols.dtype, code.memory(b""))


@pytest.mark.parametrize("spec", ["mix", "lin"])
@pytest.mark.parametrize(
    ("dtype", "shape", "known"),
    [
        (torch.complex64, (6, 4), torch.ones(6, 4)),
        (torch.float32, (6, 4), torch.ones(6, 4, dtype=torch.complex64)),
        (torch.float8_e8m0fnu, (6, 4), torch.ones(6, 4)),
        (torch.bool, (6, 4), torch.ones(6, 4)),
        (torch.float32, (0, 4), torch.ones(0, 4)),
        (torch.int64, (3, 0), torch.ones(3, 0)),
    ],
)
def test_differences_from_what_has_none_are_refused(spec, dtype, shape, known):
    code = kc.build_estimator(spec)
    ramp = torch.arange(24.0).reshape(6, 4)
    data = code.encode(TensorHandle.of("w", ramp * 1.01), code.memory(b""), ramp).to_bytes()
    assert data[0] == 1
    with pytest.raises(StreamError):
        code.decode(TensorEntry(("w",), dtype, shape), data, code.memory(b""), known)


@pytest.mark.parametrize("spec", ["mix", "lin"])
def test_a_number_is_of_no_use_for_a_vector(spec):
    weights, given = {"w": torch.arange(9.0), "x": torch.tensor(2.0)}, {"w": torch.tensor(3.0), "x": torch.arange(9.0)}
    stream = kc.encode_checkpoint({**weights, "y": torch.ones(2)}, spec, given={**given, "y": torch.ones(2)})
    assert torch.equal(kc.decode_checkpoint(stream, given={**given, "y": torch.ones(2)})["w"], weights["w"])


@pytest.mark.parametrize("spec", ["mix", "lin"])
def test_integers_have_no_differences_from_complex_numbers(spec):
    code = kc.build_estimator(f"uniform|{spec}")
    ramp = torch.arange(24.0).reshape(6, 4)
    data = code.encode(TensorHandle.of("w", ramp), code.memory(b""), ramp).to_bytes()
    entry = TensorEntry(("w",), torch.float32, (6, 4))
    assert code.decode(entry, data, code.memory(b""), ramp).shape == (6, 4)
    with pytest.raises(StreamError, match="given numbers"):
        code.decode(entry, data, code.memory(b""), ramp.to(torch.complex64))


@pytest.mark.parametrize("width", [np.int8, np.int16])
def test_the_lowest_code_of_a_grid_is_refused(width):
    side = np.float32(0.5).tobytes() + bytes([np.dtype(width).itemsize // 2, 0, 0])
    codes = np.array([np.iinfo(width).max, 1, 0], width)
    grid = Grid(trellis=False)
    assert grid.reconstruct(Quantised(codes, side), (3,), np.dtype(np.float32), b"").tolist()[1:] == [0.5, 0.0]
    with pytest.raises(StreamError, match="beyond"):
        grid.reconstruct(Quantised(-codes - width(1), side), (3,), np.dtype(np.float32), b"")


@pytest.mark.parametrize("spec", ["mix", "lin"])
def test_a_stream_that_is_used_up_is_not_read_on(spec, monkeypatch):
    code = kc.build_estimator(spec)
    data = code.encode(TensorHandle.of("w", weights()["a"]), code.memory(b"")).to_bytes()
    calls = []
    monkeypatch.setattr(RowDecoder, "advance", lambda self: calls.append(require_read(self.state, self.data)))
    with pytest.raises(StreamError, match="where its bytes end"):
        code.decode(TensorEntry(("w",), torch.int8, (1 << 13, 1 << 9)), data, code.memory(b""))
    assert len(calls) <= 1


@pytest.mark.parametrize("first", ["", "uniform:bits=8|"])
def test_stages_in_a_row_make_no_more_than_one_may(first):
    """Each stage says that it made eight times the bytes of what it was given."""
    stages = 5
    code = build_decoder(first + "planes|" * stages + "entropy")
    data = b"\0\1"
    for depth in range(stages, 0, -1):
        # Told: one array, of 64-bit integers, and its length.
        data = varint(3) + varint(1) + bytes([3]) + varint(1) + varint(10_000 * 8 ** (depth - 1)) + data
    if first:
        data = varint(4 * 4) + np.float32(1).tobytes() + data
    entry = TensorEntry(("w",), torch.float32 if first else torch.uint8, (10_000,))
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match="made of 10000 bytes"):
            code.decode(entry, data, code.memory(b""))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def write_constant(path: Path, spec: str, elements: int) -> None:
    """Write a file of one constant tensor of int8 in one piece: a few bytes for every 16 million weights."""
    code = kc.build_estimator(spec)
    handle = TensorHandle.of("w", torch.ones(1000, dtype=torch.int8))
    one = code.encode(handle, code.memory(b""))
    pieces = elements // PIECE_SYMBOLS
    data = bytes([one.size]) * (pieces - 1) + one.to_bytes() * pieces
    index = encode_structure(code.full_spec, 0, [TensorEntry(("w",), torch.int8, (elements,), (len(data),))])
    index += varint(0) + digest_of(b"") + digest_of(data) + zlib.compress(b"{}")
    path.write_bytes(HEAD + data + index + _trailer(HEAD, index))


def test_a_constant_tensor_claims_no_more_than_is_allowed(tmp_path):
    path, output = tmp_path / "w.kcz", tmp_path / "back.safetensors"
    spec = "uniform:bits=4|context"
    write_constant(path, spec, 2 * PIECE_SYMBOLS)
    with Container(path) as container:
        assert torch.equal(container.tensor("w"), torch.ones(2 * PIECE_SYMBOLS, dtype=torch.int8))
    with pytest.raises(StreamError, match="--limit 33554432"):
        Container(path, limit=2 * PIECE_SYMBOLS - 1)
    write_constant(path, spec, 1 << 45)
    for read in (Container, verify, lambda path: decode(path, output)):
        with pytest.raises(RefusedStreamError, match=r"claim to hold 35,184,372,088,832 bytes .*limit=35184372088832"):
            read(path)
    with Container(path, limit=1 << 45) as container:
        with pytest.raises(RefusedStreamError, match=r"'w' can't be decoded: it claims 70368.7 GB of memory"):
            container.tensor("w")
        with pytest.raises(RefusedStreamError, match="claims"):
            next(container.pieces())
    assert not output.exists()


@pytest.mark.parametrize("spec", ["context", "entropy", "palette|context"])
def test_a_code_that_takes_pieces_is_given_no_longer_ones(spec, tmp_path):
    write_constant(tmp_path / "w.kcz", spec, 2 * PIECE_SYMBOLS)
    with pytest.raises(StreamError, match="a piece of more than 4194304 weights"):
        Container(tmp_path / "w.kcz")


def test_a_hundred_million_zeros_in_a_few_bytes_are_decoded_unasked(tmp_path):
    zeros = torch.zeros(100_000_000)
    assert encode({"w": zeros}, tmp_path / "w.kcz", "entropy") < 600
    assert verify(tmp_path / "w.kcz") == 0


def test_a_stream_claims_no_more_than_is_allowed():
    stream = kc.encode_checkpoint({"w": torch.zeros(1000)}, "entropy")
    assert kc.decode_checkpoint(stream, limit=4000)["w"].shape == (1000,)
    with pytest.raises(RefusedStreamError, match=r"4,000 bytes of weights where 3,999 are allowed.*limit=4000"):
        kc.decode_checkpoint(stream, limit=3999)
    with pytest.raises(SpecError, match="number of bytes"):
        kc.decode_checkpoint(stream, limit="1 GB")
    # What is as it was given is paid for by whoever gave it.
    given = {"w": torch.ones(1000)}
    stream = kc.encode_checkpoint(given, "zstd", given=given)
    assert torch.equal(kc.decode_checkpoint(stream, given=given, limit=0)["w"], given["w"])


def test_tensors_together_claim_no_more_memory_than_there_is(monkeypatch):
    tensors = {name: torch.full((PIECE_SYMBOLS,), place, dtype=torch.int8) for place, name in enumerate("abcdef")}
    stream = kc.encode_checkpoint(tensors, "context")
    assert len(kc.decode_checkpoint(stream)) == 6
    monkeypatch.setattr(memory, "free_memory", lambda: 6 * PIECE_SYMBOLS)
    with pytest.raises(StreamError, match=r"claims .* of memory where"):
        kc.decode_checkpoint(stream)
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    assert len(kc.decode_checkpoint(stream)) == 6


def test_free_memory_is_what_the_system_tells(monkeypatch, tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 9 kB\nMemAvailable:  5 kB\n")
    monkeypatch.setattr(memory, "_KERNEL", told)
    groups = [group._replace(folder=tmp_path / str(place)) for place, group in enumerate(memory._GROUPS)]
    for group in groups:
        monkeypatch.setattr(memory, "_GROUPS", [group])
        assert memory.free_memory() == 5 * 1024
        group.folder.mkdir()
        # Of what is used, files can go, but for those that are nowhere else.
        (group.folder / "memory.stat").write_text(f"anon 400\n{group.files} 500\n{group.shared} 200\n")
        (group.folder / group.used).write_text("900\n")
        for text, free in (("max", 5 * 1024), (str((1 << 63) - 4096), 5 * 1024), ("3000\n", 2400), ("500", 0)):
            (group.folder / group.limit).write_text(text)
            assert memory.free_memory() == free
    monkeypatch.setattr(memory, "_KERNEL", tmp_path / "absent")
    (groups[0].folder / "memory.max").write_text("3000")
    monkeypatch.setattr(memory, "_GROUPS", groups[:1])
    assert memory.free_memory() == 2400
    monkeypatch.setattr(memory, "_GROUPS", [])
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 7, "SC_PAGE_SIZE": 100}.__getitem__)
    assert memory.free_memory() == 700
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory.free_memory() is None


def test_a_tensor_in_pieces_needs_hardly_more_than_itself(monkeypatch, tmp_path):
    tensor = torch.arange(1 << 24, dtype=torch.int32)
    encode({"w": tensor}, tmp_path / "w.kcz", "raw")
    with Container(tmp_path / "w.kcz") as container:
        monkeypatch.setattr(memory, "free_memory", lambda: tensor.nbytes * 3 // 2)
        assert torch.equal(container.tensor("w"), tensor)
        monkeypatch.setattr(memory, "free_memory", lambda: tensor.nbytes)
        with pytest.raises(StreamError, match=r"'w' can't be decoded: it claims 0\.1 GB"):
            container.tensor("w")


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
    encode(plain, packed, "zstd")
    before = plain.read_bytes(), packed.read_bytes()
    (tmp_path / "link").symlink_to(plain)
    for write in (
        lambda: encode(plain, plain, "zstd"),
        lambda: encode(plain, tmp_path / "link", "zstd"),
        lambda: encode({"a": torch.ones(3)}, plain, "zstd", given=plain),
        lambda: decode(packed, plain, given=plain),
        lambda: quantise(plain, plain, mse=1e-3),
    ):
        with pytest.raises(KComplexError, match="another name"):
            write()
    assert (plain.read_bytes(), packed.read_bytes()) == before


def test_nothing_overwrites_a_file_of_a_folder_that_it_is_made_of(tmp_path):
    import safetensors.torch

    folder = tmp_path / "model"
    folder.mkdir()
    plain = folder / "model.safetensors"
    safetensors.torch.save_file(weights(), plain)
    before = plain.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(plain)
    (tmp_path / "hard.safetensors").hardlink_to(plain)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    for target in (plain, tmp_path / "link.safetensors", tmp_path / "hard.safetensors"):
        for write in (
            lambda target=target: encode(folder, target, "uniform:bits=2|zstd"),
            lambda target=target: encode({"a": torch.ones(3)}, target, "zstd", given=folder),
            lambda target=target: quantise(folder, target, mse=1e-3),
        ):
            with pytest.raises(KComplexError, match="would destroy what it is made of"):
                write()
    assert plain.read_bytes() == before
    # A new file beside them, written twice, is nobody's source.
    for _ in range(2):
        encode(folder, folder / "model.kcz", "zstd")


def test_a_given_checkpoint_that_a_code_names_is_not_overwritten(tmp_path):
    import safetensors.torch

    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file(weights(), base)
    before = base.read_bytes()
    for write in (
        lambda: encode(weights(1), base, f"given:{base}|lin"),
        lambda: encode(weights(1), base, "lin", given=given_of(base)),
    ):
        with pytest.raises(KComplexError, match="would destroy what it is made of"):
            write()
    assert base.read_bytes() == before


def test_given_weights_that_are_missing_are_blamed_and_not_the_output(tmp_path):
    with pytest.raises(KComplexError, match=r"^'nowhere.safetensors': no such file"):
        encode(weights(), tmp_path / "w.kcz", "lin", given="nowhere.safetensors")
    encode(weights(), tmp_path / "w.kcz", "lin", given=weights(1))
    with pytest.raises(KComplexError, match=r"^'nowhere.safetensors': no such file"):
        decode(tmp_path / "w.kcz", tmp_path / "w.safetensors", given="nowhere.safetensors")
    with pytest.raises(KComplexError, match="is empty"):
        encode(weights(), "", "zstd")


def test_weights_are_given_once(tmp_path):
    with pytest.raises(SpecError, match="already names what is given"):
        kc.describe(weights(), "given:one.safetensors|lin", given="other.safetensors")


def test_huge_weights_have_a_squared_error_that_is_infinite_not_a_crash(tmp_path):
    huge = {"w": torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e200}
    with np.errstate(over="ignore"), pytest.raises(KComplexError):
        quantise(huge, tmp_path / "w.kcz", mse=1.0)
