"""`mix` and `lin` given other weights: every bit comes back, and what is given is made use of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.compressors.mix.difference_rows import nearest_places, numbers_of
from kcomplex.compressors.mix.float_rows import Fields
from kcomplex.compressors.mix.floats import FORMATS, octave_and_powers
from kcomplex.compressors.mix.line import Line, read_line
from kcomplex.errors import KComplexError, SpecError, StreamError
from kcomplex.estimators.structure import Reader
from kcomplex.sources.open import open_weights
from kcomplex.weights import DTYPES, tensor_from_words, word_dtype, words_an_element, words_of
from tests.compressors.streams import Stream

SPECS = ["mix", "lin", "palette|lin", "uniform:bits=5|lin", "uniform:bits=4,per_row=True|mix", "mosaic:s=2|lin"]
GOLDEN = {
    "mix": (
        "014014fe1f16f10204051e2e9aed1a03d6b132acca03759595661f9bb039b1db85f22a6dfe9a6dbafe2cbf3ea144fba3d52a2947c90bdeada"
        "eb5329242321e368dcabced75a9c76476d72e486da2cd8ee60675357ff6496035fc203259bc26"
    ),
    "lin": (
        "014414fe1f16f102040700051e2e9aed1a03d6b132acca03759595661f9bb039b1db85f22a6dfe9a6dbafe2cbf3ea144fba3dc4203d4"
        "5a44e9c8a261b839c26a6773c271d2c8d7a8a19ce6045f426a83f0dbde1f39222e8cedd2ea1852faa6c32f344a"
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def bits(tensor: torch.Tensor, spec: str, known: torch.Tensor | None = None) -> float:
    """Bits of one tensor's own stream, proved by decoding it."""
    (description,) = kc.describe({"w": tensor}, spec, given=None if known is None else {"w": known})
    if known is not None:
        stream = kc.encode_checkpoint({"w": tensor}, spec, given={"w": known})
        decoded = kc.decode_checkpoint(stream, given={"w": known})["w"]
        assert 8 * len(stream) == description.bits
        if description.lossless:
            assert words_of(decoded).tobytes() == words_of(tensor).tobytes()
    return description.tensors[0].value


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(rows: int, columns: int, rank: int, scale: float) -> torch.Tensor:
    """An update as training makes it: few directions, and a little of all others."""
    few = gaussian(rows, rank, seed=1) @ gaussian(rank, columns, seed=2) / math.sqrt(rank)
    return scale * (few + 0.05 * gaussian(rows, columns, seed=3))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_bits_come_back_given_any_others(data: st.DataObject) -> None:
    names = sorted(DTYPES)
    dtype, other = (DTYPES[data.draw(st.sampled_from(names))] for _ in range(2))
    if data.draw(st.booleans()):
        other = dtype
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=3)))
    spec = data.draw(st.sampled_from(["mix", "lin", "palette|lin"]))

    def tensor(of: torch.dtype) -> torch.Tensor:
        length = math.prod(shape) * words_an_element(of) * word_dtype(of).itemsize
        raw = np.frombuffer(data.draw(st.binary(min_size=length, max_size=length)), np.uint8)
        return tensor_from_words((raw & 1 if of is torch.bool else raw).view(word_dtype(of)), of, shape)

    one, two, base = tensor(dtype), tensor(dtype), tensor(other)
    # The second tensor is coded by what the first has taught; the third is nearly what is given.
    near = tensor_from_words(words_of(base) ^ np.array(0, word_dtype(other)), other, shape)
    if near.numel():
        flat = words_of(near)
        flat[0] ^= 1
    tensors = {"a": one, "b": two, "c": near}
    given_ = {"a": base, "b": base, "c": base}
    decoded = kc.decode_checkpoint(kc.encode_checkpoint(tensors, spec, given=given_), given=given_)
    for name, value in tensors.items():
        assert decoded[name].dtype == value.dtype
        assert words_of(decoded[name]).tobytes() == words_of(value).tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eighths", [-90, 0, 37])
def test_every_place_is_the_nearest_to_its_number(dtype: torch.dtype, eighths: int) -> None:
    layout = FORMATS[dtype]
    octave, powers = octave_and_powers(layout, eighths)
    fields = Fields(layout.exponent_bits, layout.mantissa_bits, 0, 0, octave, powers)
    infinite = ((1 << layout.exponent_bits) - 1) << layout.mantissa_bits
    places = np.arange(-infinite, infinite)
    numbers = numbers_of(places[None, :], fields)[0]
    # Both zeros are the same number.
    assert (np.diff(numbers) >= 0).all()
    assert np.array_equal(nearest_places(numbers[None, :], fields)[0], np.where(places == -1, 0, places))
    unit = math.ldexp(1.0, -octave - layout.bias)
    words = torch.arange(infinite, dtype=torch.int32).to(torch.int16).view(dtype).double().numpy()
    assert np.array_equal(numbers[infinite:] * unit, words)


@pytest.mark.parametrize("eighths", [-7200, -900, -80, 0, 80, 900, 7200])
def test_places_of_doubles_are_in_order_however_small_or_large(eighths: int) -> None:
    """Those too small or too large for float64 in units are worth the same."""
    layout = FORMATS[torch.float64]
    octave, powers = octave_and_powers(layout, eighths)
    fields = Fields(layout.exponent_bits, layout.mantissa_bits, 0, 0, octave, powers)
    near = np.array([-(1 << 40), -2, -1, 0, 1, 2, 1 << 40])
    patterns = np.unique(((np.arange(1, 2047) << 52)[:, None] + near).reshape(-1))
    places = np.concatenate([-patterns[::-1] - 1, [-1, 0], patterns])
    numbers = numbers_of(places[None, :], fields)
    assert np.isfinite(numbers).all()
    assert (np.diff(numbers) >= 0).all()
    found = nearest_places(numbers, fields)
    assert (np.diff(found) >= 0).all()
    assert np.array_equal(numbers_of(found, fields), numbers)


@pytest.mark.parametrize("spec", ["mix", "lin"])
def test_doubles_next_to_nothing_come_back(spec: str) -> None:
    base = (0.1 * gaussian(100, 40)).double()
    tiny = torch.rand(100, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    old = torch.where(tiny, torch.full((), 2.0**-1015, dtype=torch.float64), base)
    new = old + torch.where(tiny, 0.0, 1e-3 * gaussian(100, 40, seed=2)).double()
    assert bits(new, spec, old) < 48 * new.numel()
    assert bits(1e200 * old, spec, old) < 64 * new.numel() + 1000


@pytest.mark.parametrize("largest", [2.0, 1e100, -1e100])
def test_one_large_double_leaves_the_others_what_is_given(largest: float) -> None:
    old = 0.3 * gaussian(200, 100).double().clamp(-6, 6)
    new = old + 1e-6 * gaussian(200, 100, seed=1).double()
    old[0, 0] = new[0, 0] = 1.99
    usual = bits(new, "lin", old)
    old[0, 0] = new[0, 0] = largest
    assert bits(new, "lin", old) < usual + 500


def test_doubles_of_every_size_come_back() -> None:
    """Those that are too many sizes apart for their places to be counted are coded alone."""
    old = gaussian(40, 20).double()
    for extreme in (torch.inf, torch.nan, 1e-300, 1e300, -1e-300, 5e-324):
        new = old + 1e-6
        new[3, 4] = extreme
        assert bits(new, "lin", old) < 64 * new.numel() + 1000
        assert bits(0.01 * new, "lin", old) < 64 * new.numel() + 1000


@given(st.integers(-(1 << 59), 1 << 59), st.integers(-900, 900), st.integers(-9, 9), st.integers(-9, 9))
def test_lines_come_back(factor: int, bits_: int, offset: int, offset_bits: int) -> None:
    line = Line(factor, bits_, offset, offset_bits if offset else 0)
    assert read_line(Reader(line.to_bytes()), bool(offset)) == line


def test_a_line_out_of_range_is_refused() -> None:
    with pytest.raises(StreamError, match="out of range"):
        read_line(Reader(Line(1, 2000).to_bytes()), False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_eight_bits_are_given_too(dtype: torch.dtype) -> None:
    old = gaussian(200, 60)
    assert bits((old + 0.01 * gaussian(200, 60, seed=5)).to(dtype), "mix", old) < 1.0 * old.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_small_update_costs_what_it_is_worth(dtype: torch.dtype) -> None:
    """An update a thousandth of the weights: of each, only the bits below are new."""
    old = (0.1 * gaussian(200, 60)).to(dtype)
    new = (old.double() + 1e-4 * gaussian(200, 60, seed=5).double()).to(dtype)
    saved = bits(new, "mix") - bits(new, "mix", old)
    # Ten octaves below the weights, for those that have so many bits.
    assert saved > {torch.bfloat16: 6.5, torch.float16: 8.5}.get(dtype, 9.5) * new.numel()


def test_shrunk_weights_are_found() -> None:
    """Weight decay: one factor for a tensor."""
    old = gaussian(100, 50)
    new = 0.9 * old + 1e-3 * gaussian(100, 50, seed=1)
    # Smaller weights are stored so much more finely.
    finer = math.log2(1 / 0.9) * new.numel()
    assert bits(new, "mix", old) < bits(old + 1e-3 * gaussian(100, 50, seed=1), "mix", old) + finer + 100


def test_entries_that_did_not_move_cost_next_to_nothing() -> None:
    old = gaussian(400, 64)
    new = old.clone()
    new[:20] += 0.1 * gaussian(20, 64, seed=1)
    assert bits(new, "mix", old) < bits(new[:20], "mix", old[:20]) + 0.02 * old.numel() + 200
    scattered = torch.where(torch.rand(400, 64, generator=torch.Generator().manual_seed(0)) < 0.05, old + 0.1, old)
    assert bits(scattered, "mix", old) < 0.05 * old.numel() * 26 + 0.35 * old.numel()


def test_pruned_entries_are_told_by_a_flag() -> None:
    old = gaussian(300, 64)
    kept = old.abs() > old.abs().median()
    new = torch.where(kept, old + 1e-3 * gaussian(300, 64, seed=1), 0.0)
    negative = torch.where(kept, new, -0.0 * old)
    exact = bits(old + 1e-3 * gaussian(300, 64, seed=1), "mix", old)
    # Half of the entries need no differences; which half is nearly known from the given magnitudes.
    assert bits(new, "mix", old) < 0.5 * exact + 0.5 * old.numel()
    assert bits(negative, "mix", old) < 0.5 * exact + 0.6 * old.numel()


def test_what_updates_share_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the linear prediction alone, without low-rank parts, which find it, too."""
    monkeypatch.setattr("kcomplex.compressors.mix.differences.directions", lambda matrix, floor: None)
    old = gaussian(512, 64, scale=0.05)
    new = old + update(512, 64, 4, 0.01)
    assert bits(new, "lin", old) < bits(new, "mix", old) - 2.0 * new.numel()
    assert bits(new.T.contiguous(), "lin", old.T.contiguous()) < bits(new, "mix", old) - 2.0 * new.numel()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_follow_the_floats_that_they_were_made_of(dtype: torch.dtype) -> None:
    old = gaussian(200, 64, scale=0.1)
    new = old + 0.003 * gaussian(200, 64, seed=1)
    zero_point = 128 if dtype is torch.uint8 else 0
    codes = torch.clamp(torch.round(new / 0.004) + zero_point, 0 if zero_point else -127, 255 if zero_point else 127)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * ((0.003 / 0.004) ** 2 + 1 / 12))
    assert bits(codes.to(dtype), "mix", old) < (entropy + 0.1) * new.numel() + 400
    assert bits(codes.to(dtype), "mix", old) < 0.4 * bits(codes.to(dtype), "mix")
    # Floats of as few values are a table and positions in it.
    floats = (codes - zero_point) * 0.004
    assert bits(floats, "mix", old) < bits(codes.to(dtype), "mix", old) + 40 * 256


@pytest.mark.parametrize("spec", ["uniform:bits=8|lin", "uniform:bits=8,per_row=True|lin", "deadzone:bits=6|mix"])
def test_codes_of_a_quantiser_are_expected_from_what_is_given(spec: str) -> None:
    old = gaussian(200, 64, scale=0.1)
    new = old + 0.003 * gaussian(200, 64, seed=1)
    assert bits(new, spec, old) < 0.65 * bits(new, spec)
    tensors = {"w": new, "steps": torch.tensor(5), "mask": new > 0}
    stream = kc.encode_checkpoint(tensors, spec, given={"w": old, "steps": torch.tensor(4), "mask": old > 0})
    plain = kc.decode_checkpoint(kc.encode_checkpoint(tensors, spec))
    decoded = kc.decode_checkpoint(stream, given={"w": old, "steps": torch.tensor(4), "mask": old > 0})
    assert all(torch.equal(decoded[name], plain[name]) for name in tensors)


@pytest.mark.parametrize("spec", ["mix", "lin"])
def test_nothing_is_lost_by_weights_that_have_nothing_to_do_with_it(spec: str) -> None:
    new, old = gaussian(100, 40, seed=1), gaussian(100, 40, seed=2)
    assert bits(new, spec, old) <= bits(new, spec) + 8
    assert bits(new, spec, old.to(torch.int8)) <= bits(new, spec) + 8
    assert bits((new * 20).to(torch.int8), spec, old) <= bits((new * 20).to(torch.int8), spec) + 8


def test_nothing_is_won_from_noise_around_what_is_given() -> None:
    """Uniform noise of 15 values around given integers takes log2(15) bits an entry."""
    old = torch.randint(-100, 100, (200, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    new = old + torch.randint(-7, 8, (200, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int16)
    for spec in ("mix", "lin"):
        assert math.log2(15) <= bits(new, spec, old) / new.numel() < 1.02 * math.log2(15) + 0.05


def test_wild_values_do_not_spoil_the_rest() -> None:
    old = gaussian(100, 40)
    new = old + 1e-3 * gaussian(100, 40, seed=1)
    wild = new.clone()
    wild[50, :3] = torch.tensor([math.nan, math.inf, -1e30])
    given_wild = old.clone()
    given_wild[20, :3] = torch.tensor([math.inf, math.nan, 1e30])
    assert bits(wild, "mix", given_wild) < bits(new, "mix", old) + 6 * 100 + 0.1 * new.numel()


def test_long_tensors_are_coded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcomplex.estimators.symbols.PIECE_SYMBOLS", 500)
    old = gaussian(50, 40)
    for new in (old + 1e-3 * gaussian(50, 40, seed=1), (old * 4).round() / 4, (old * 20).to(torch.int8)):
        assert bits(new, "lin", old) < 0.9 * bits(new, "lin")


@pytest.mark.parametrize("spec", ["uniform|entropy", "deadzone:bits=3|zstd", "sign|raw"])
def test_coders_behind_a_quantiser_without_a_use_for_given_weights_say_so(spec: str) -> None:
    with pytest.raises(SpecError, match="no use for given weights"):
        kc.build_estimator(spec, given={"w": torch.zeros(3)})


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("spec", ["mix", "lin", "uniform:bits=4|lin"])
def test_a_damaged_stream_is_refused_or_decodes_to_others(spec: str, data: st.DataObject) -> None:
    old = {"w": gaussian(40, 20), "q": gaussian(40, 20), "i": gaussian(30, 9)}
    new = {"w": old["w"] + 0.01 * gaussian(40, 20, seed=1), "q": (old["q"] * 3).round() / 3, "i": (old["i"] * 9).char()}
    stream = bytearray(_STREAMS.setdefault(spec, kc.encode_checkpoint(new, spec, given=old)))
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
    else:
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = kc.decode_checkpoint(bytes(stream), given=old)
    except KComplexError:
        return
    assert decoded.keys()


@pytest.mark.parametrize("spec", sorted(GOLDEN))
def test_streams_of_this_version_stay_readable(spec: str) -> None:
    coder = Stream(spec)
    old = torch.remainder(torch.arange(240).reshape(40, 6) * 37, 101).float()
    rows = torch.arange(40)[:, None]
    codes = (old - 50 + torch.remainder(rows * torch.tensor([1, 2, 5, 1, 7, 3]), 9)).to(torch.int8)
    handle = open_weights({"w": codes})["w"]
    data = coder.encode_tensor(handle.read(), old)
    assert data.hex() == GOLDEN[spec]
    fresh = Stream(spec)
    assert torch.equal(fresh.decode_tensor(bytes.fromhex(GOLDEN[spec]), torch.int8, (40, 6), old), codes)


_STREAMS: dict[str, bytes] = {}
