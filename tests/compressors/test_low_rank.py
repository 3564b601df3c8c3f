"""Updates of low rank: factors are told where that pays, and every bit comes back."""

from __future__ import annotations

import hashlib
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.compressors.mix.differences import new_difference_memory
from kcomplex.compressors.mix.low_rank import MOST_RANK, STEP, Directions, LowRank, directions, read_low_rank
from kcomplex.compressors.tables.numbers import zigzag
from kcomplex.errors import StreamError
from kcomplex.estimators.structure import Reader, varint
from kcomplex.weights import tensor_from_words, word_dtype, words_of
from tests.children import run
from tests.compressors.streams import Stream

LOW_RANK = 128
# Of int8 codes given floats that differ by a matrix of rank one, under `lin`.
GOLDEN = (
    "01c409fe3f180202010d3101016523074eabba44c4cb1a2153efd403d15beaad00d0892e17b70865496d675e8700cc87001e5cc5118df514"
    "41d1eedb0700afaf35fb54f42fa11bb7bf2aef555fc76947"
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(rows: int, columns: int, rank: int, seed: int = 7) -> torch.Tensor:
    return gaussian(rows, rank, seed=seed) @ gaussian(rank, columns, seed=seed + 1)


def parts(tensor: torch.Tensor, base: torch.Tensor, spec: str) -> dict[str, float]:
    """Bits of one tensor's own stream by part, proved by decoding it."""
    (description,) = kc.describe({"w": tensor}, spec, given={"w": base})
    stream = kc.encode_checkpoint({"w": tensor}, spec, given={"w": base})
    assert 8 * len(stream) == description.bits
    decoded = kc.decode_checkpoint(stream, given={"w": base})["w"]
    assert words_of(decoded).tobytes() == words_of(tensor).tobytes()
    return dict(description.tensors[0].parts)


def without(monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor, base: torch.Tensor, spec: str) -> float:
    """Bits of the stream of rank 0."""
    with monkeypatch.context() as patched:
        patched.setattr("kcomplex.compressors.mix.differences.directions", lambda matrix, floor: None)
        found = parts(tensor, base, spec)
    assert "low rank" not in found
    return sum(found.values())


@pytest.mark.parametrize("spec", ["mix", "lin"])
def test_a_merged_adapter_costs_about_its_factors(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = 0.05 * gaussian(96, 64)
    merged = base + 1e-3 * product(96, 64, 2)
    bits = sum(parts(merged, base, spec).values())
    # Two factors in float32, and less than a bit an entry because the sum was rounded.
    assert bits < 32 * 2 * (96 + 64) + merged.numel()
    assert bits < 0.2 * without(monkeypatch, merged, base, spec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8])
def test_adapters_are_found_in_any_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base = 0.05 * gaussian(96, 64).double()
    merged = base + 1e-3 * product(96, 64, 2).double()
    if dtype.is_floating_point:
        base = base.to(dtype)
        merged = (base.double() + 1e-3 * product(96, 64, 2).double()).to(dtype)
    else:
        zero = 128 if dtype is torch.uint8 else 0
        merged = (torch.clamp((merged / 0.002).round(), -127, 127) + zero).to(dtype)
    found = parts(merged, base, "mix")
    assert found["low rank"] > 0
    assert sum(found.values()) < 0.7 * without(monkeypatch, merged, base, "mix")


def test_few_valued_floats_have_a_low_rank_part_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base = 0.05 * gaussian(96, 64)
    merged = ((base + 2e-3 * product(96, 64, 2)) / 0.004).round() * 0.004
    assert sum(parts(merged, base, "mix").values()) < 0.8 * without(monkeypatch, merged, base, "mix")


def test_decayed_weights_and_an_adapter_are_told_apart() -> None:
    """The factor that fits all differences best isn't that of the decay."""
    base = gaussian(128, 96)
    adapter = 0.05 * product(128, 96, 2) + 0.05 * torch.outer(base.mean(1), base.mean(0)).sign()
    plain = sum(parts(base + adapter, base, "mix").values())
    decayed = sum(parts(0.75 * base + adapter, base, "mix").values())
    # Rounding 0.75 * base takes what it takes.
    assert decayed < plain + 2.5 * base.numel()


@pytest.mark.parametrize("spec", ["mix", "lin"])
def test_noise_has_no_low_rank_part(spec: str) -> None:
    base = gaussian(128, 64)
    assert "low rank" not in parts(base + 0.01 * gaussian(128, 64, seed=3), base, spec)
    assert directions(gaussian(200, 100).double().numpy(), 1e-9) is None


def test_a_part_that_does_not_pay_is_left_out() -> None:
    """The stream is then that of rank 0, and so are those after it."""
    base = {name: gaussian(24, 16, seed=seed) for seed, name in enumerate("ab")}
    new = {name: tensor + 0.01 * gaussian(24, 16, seed=5) for name, tensor in base.items()}
    plain = kc.encode_checkpoint(new, "lin", given=base)
    with pytest.MonkeyPatch.context() as patched:
        # Noise is tried, and found to cost more.
        patched.setattr("kcomplex.compressors.mix.low_rank._LEAST_GAIN", -9.0)
        patched.setattr("kcomplex.compressors.mix.low_rank._LEAST_BITS", 0.0)
        assert kc.encode_checkpoint(new, "lin", given=base) == plain


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_bits_come_back_around_an_update_of_low_rank(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int16]))
    rows, columns, rank = (data.draw(st.integers(*span)) for span in ((1, 40), (1, 40), (1, 3)))
    base = 20 * gaussian(rows, columns, seed=data.draw(st.integers(0, 9)))
    new = (base + 3 * product(rows, columns, rank)).to(dtype)
    words = words_of(new).copy()
    word = word_dtype(dtype)
    for _ in range(data.draw(st.integers(0, 4))):
        # NaN payloads, infinities, negative zeros, denormals.
        place = data.draw(st.integers(0, words.size - 1))
        words[place] = data.draw(st.integers(0, np.iinfo(word).max) | st.just(1 << (8 * word.itemsize - 1)))
    new = tensor_from_words(words, dtype, (rows, columns))
    if data.draw(st.booleans()):
        base[data.draw(st.integers(0, rows - 1))] = data.draw(st.sampled_from([torch.nan, torch.inf, -0.0, 1e30]))
    if data.draw(st.booleans()):
        new, base = new.T, base.T
    spec = data.draw(st.sampled_from(["mix", "lin"]))
    stream = kc.encode_checkpoint(
        {"a": new, "b": new[::2], "c": new[:0]}, spec, given=(others := {"a": base, "b": base[::2], "c": base[:0]})
    )
    decoded = kc.decode_checkpoint(stream, given=others)
    for name, tensor in (("a", new), ("b", new[::2]), ("c", new[:0])):
        assert words_of(decoded[name]).tobytes() == words_of(tensor.contiguous()).tobytes()


@given(st.integers(1, 4), st.integers(4, 9), st.integers(4, 9), st.integers(0, 99))
@settings(deadline=None)
def test_parts_come_back_and_products_are_those_of_the_factors(rank: int, rows: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    part = LowRank(
        random.integers(-(1 << 40), 1 << 40, (rank, rows)),
        random.integers(-(1 << 8), 1 << 8, (rank, columns)),
        tuple(random.integers(-900, 900, rank).tolist()),
    )
    one, other = new_difference_memory(), new_difference_memory()
    data = part.part(one.factors).data
    back = read_low_rank(Reader(data), other.factors, (rows, columns))
    assert back.exponents == part.exponents
    assert np.array_equal(back.left, part.left)
    assert np.array_equal(back.right, part.right)
    expected = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            for k in range(rank):
                expected[i, j] += float(part.left[k, i]) * 2.0 ** part.exponents[k] * float(part.right[k, j])
    assert back.product().tobytes() == expected.tobytes()


def test_products_beyond_all_numbers_are_zero() -> None:
    huge = LowRank(np.full((2, 4), 1 << 40), np.array([[1 << 40] * 4, [-(1 << 40)] * 4]), (990, 990))
    assert not huge.product().any()


def test_rounded_factors_are_as_good_as_what_is_left_over() -> None:
    matrix = product(60, 50, 3).double().numpy() + 0.01 * gaussian(60, 50, seed=3).double().numpy()
    found = Directions.of(matrix, 6, 1e-9)
    assert found.best_rank() == 3
    assert np.sqrt(np.square(found.rounded(3, STEP).product() - matrix).mean()) < 0.012
    assert np.abs(found.rounded(3, 1e-6).product() - found.product(3)).max() < 1e-6


def test_higher_ranks_are_found() -> None:
    matrix = product(150, 120, 40).double().numpy() + 0.01 * gaussian(150, 120, seed=3).double().numpy()
    found = directions(matrix, 1e-9)
    assert found is not None
    assert found.best_rank() == 40


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([0], "rank 0"),
        ([9], "rank 9"),
        ([1 << 40], "rank 1099511627776"),
        ([1, zigzag(1 << 50), 0], "exponent"),
        ([2, 0, zigzag(-2000), 0], "exponent"),
        ([1, 0, 1 << 50], "end"),
        ([1, 0, 0], "end"),
        ([1, 0, 1, 77], "begin"),
    ],
)
def test_parts_that_make_no_sense_are_refused(told: list[int], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        read_low_rank(Reader(b"".join(map(varint, told))), new_difference_memory().factors, (8, 12))


def test_what_a_part_claims_bounds_the_memory_it_takes() -> None:
    height, width = 40, 3000
    # As many factors as there may be, all zero, in next to no bytes.
    zeros = LowRank(np.zeros((height, height), np.int64), np.zeros((height, width), np.int64), (0,) * height)
    most = zeros.part(new_difference_memory().factors).data
    assert len(most) < 1000
    memory = new_difference_memory().factors
    tracemalloc.start()
    try:
        assert not read_low_rank(Reader(most), memory, (height, width)).product().any()
        for rank in (height + 1, MOST_RANK + 1, 1 << 60):
            with pytest.raises(StreamError, match="rank"):
                read_low_rank(Reader(b"".join(map(varint, [rank, *[0] * 300]))), memory, (height, width))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A few times what the matrix itself takes as float64.
    assert peak < 5 * 8 * height * width
    with pytest.raises(StreamError, match="rank"):
        read_low_rank(Reader(varint(MOST_RANK + 1) + bytes(300)), memory, (1000, 1000))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_part_is_refused_or_decodes_to_others(data: st.DataObject) -> None:
    codes, base = golden_tensors()
    stream = bytearray.fromhex(GOLDEN)
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
    else:
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    fresh = Stream("lin")
    try:
        assert fresh.decode_tensor(bytes(stream), torch.int8, tuple(codes.shape), base).shape == codes.shape
    except StreamError:
        return


def golden_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and floats that they are expected from but for integers of rank one."""
    rows, columns = torch.arange(40)[:, None], torch.arange(12)[None, :]
    base = torch.remainder(torch.arange(480).reshape(40, 12) * 37, 101).float() - 50
    first, second = torch.remainder(rows * 7, 11) - 5, torch.remainder(columns * 5, 9) - 4
    return torch.clamp(base + first * second + torch.remainder(rows + columns, 2), -127, 127).to(torch.int8), base


def test_streams_of_this_version_stay_readable() -> None:
    codes, base = golden_tensors()
    assert bytes.fromhex(GOLDEN)[1] & LOW_RANK
    fresh = Stream("lin")
    assert torch.equal(fresh.decode_tensor(bytes.fromhex(GOLDEN), torch.int8, (40, 12), base), codes)
    # How factors are found may differ in the last bits from machine to machine.
    coder = Stream("lin")
    data = coder.encode_tensor(codes, base)
    assert data[1] & LOW_RANK
    assert abs(len(data) - len(GOLDEN) // 2) < 10


def test_another_process_decodes_the_same() -> None:
    program = (
        "import hashlib, sys, torch, kcomplex as kc\n"
        "base = torch.remainder(torch.arange(480).reshape(40, 12) * 37, 101).float() - 50\n"
        "from kcomplex.estimators.structure import TensorEntry\n"
        "code, entry = kc.build_estimator('lin'), TensorEntry(('w',), torch.int8, (40, 12))\n"
        "codes = code.decode(entry, bytes.fromhex(sys.argv[1]), code.memory(b''), base)\n"
        "print(hashlib.sha256(codes.numpy().tobytes()).hexdigest())\n"
    )
    done = run([sys.executable, "-c", program, GOLDEN])
    assert done.stdout.strip() == hashlib.sha256(golden_tensors()[0].numpy().tobytes()).hexdigest()
