"""The zero-order code: how close it comes to the entropy, and what its tables cost."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcomplex.compressors.entropy.counts import decode_counts, encode_counts
from kcomplex.compressors.entropy.entropy import Entropy, PluginEntropy
from kcomplex.compressors.entropy.packing import bits_needed, pack, packed_size, unpack
from kcomplex.compressors.tables.alphabet import alphabet, decode_alphabet, encode_alphabet, positions
from kcomplex.compressors.tables.universal import decode_integers, encode_integers
from kcomplex.errors import SpecError, StreamError

CODERS = [Entropy("range"), Entropy("ans")]
DTYPES = [np.dtype(f"{kind}{width}") for kind in "iu" for width in (1, 2, 4, 8)]


def entropy_bits(symbols: np.ndarray) -> float:
    counts = [np.count_nonzero(symbols == word) for word in np.unique(symbols)]
    return sum(count * math.log2(symbols.size / count) for count in counts)


def gaussian_codes(size: int, scale: float, top: int) -> np.ndarray:
    return np.clip(np.rint(np.random.default_rng(5).normal(0, scale, size)), -top, top).astype(np.int8)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(("scale", "top"), [(30, 127), (2, 7), (0.4, 3)])
def test_is_within_half_a_percent_of_the_entropy_with_its_tables(coder, scale, top):
    symbols = gaussian_codes(300_000, scale, top)
    bits = 8 * len(coder.encode(symbols))
    assert entropy_bits(symbols) < bits < 1.005 * entropy_bits(symbols)


@pytest.mark.parametrize("coder", CODERS)
def test_a_table_of_255_symbols_costs_less_than_ten_bits_a_symbol(coder):
    parts = {part.name: part.data for part in coder.encode_parts(gaussian_codes(300_000, 30, 127))}
    assert 8 * len(parts["tables"]) < 10 * 255


@settings(max_examples=60, deadline=None)
@given(symbols=st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(1, 100))))
@pytest.mark.parametrize("coder", CODERS)
def test_never_costs_more_than_the_plain_words(coder, symbols):
    assert len(coder.encode(symbols)) <= symbols.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_costs_its_value(dtype):
    symbols = np.full(100_000, 77, dtype)
    assert len(Entropy().encode(symbols)) <= 1 + dtype.itemsize


def test_uniform_symbols_are_packed():
    symbols = np.random.default_rng(0).integers(100, 116, 1000, dtype=np.uint32)
    assert len(Entropy().encode(symbols)) <= 5 + 500


@pytest.mark.parametrize("coder", CODERS)
def test_codes_an_alphabet_of_all_words_of_two_bytes(coder):
    random = np.random.default_rng(0)
    symbols = np.concatenate([np.arange(1 << 16), np.abs(random.normal(0, 2000, 500_000)).astype(int) % (1 << 16)])
    symbols = symbols.astype(np.uint16)
    data = coder.encode(symbols)
    assert len(data) < symbols.nbytes
    assert (coder.decode(data, symbols.shape, symbols.dtype) == symbols).all()


@pytest.mark.parametrize("coder", CODERS)
def test_a_payload_that_is_cut_or_grows_is_refused(coder):
    symbols = gaussian_codes(10_000, 30, 127)
    data = coder.encode(symbols)
    for damaged in (data[:-1], data[:10], data[:1], data + bytes(8), data + b"\x01" * 4):
        with pytest.raises(StreamError):
            coder.decode(damaged, symbols.shape, symbols.dtype)


def test_streams_of_today_stay_readable():
    symbols = np.array([0, 0, 0, 5, 5, -2, 0, 0, 9, 0] * 12, np.int32)
    streams = {
        "range": "ff0804feffffff01ad80040003f64f3978816f0d0588e0106ad3fe3af88da14dce22eb885a1f5a",
        "ans": "ff0804feffffff01ad80040003f64f4ee3db243872c7b4d1c9c217e6b2e1eb816fe7246aa955820a440700",
    }
    for name, stream in streams.items():
        decoded = Entropy(name).decode(bytes.fromhex(stream), symbols.shape, symbols.dtype)
        assert decoded.tolist() == symbols.tolist()


def test_an_unknown_coder_is_refused():
    with pytest.raises(SpecError):
        Entropy("huffman")


@settings(max_examples=60, deadline=None)
@given(
    symbols=st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 200))),
    seed=st.integers(0, 99),
)
def test_plugin_entropy_is_the_entropy_and_blind_to_order_and_names(symbols, seed):
    measure = PluginEntropy()
    value = measure.length(symbols)
    assert value == pytest.approx(entropy_bits(symbols), abs=1e-9)
    assert measure.length(np.random.default_rng(seed).permutation(symbols)) == value
    assert measure.length(~symbols) == value


@settings(max_examples=100, deadline=None)
@given(
    values=hnp.arrays(np.uint64, st.integers(0, 60), elements=st.integers(0, 2**64 - 2)),
    drop=st.integers(0, 63),
)
def test_the_universal_code_gives_back_integers_of_any_size(values, drop):
    values >>= np.uint64(drop)
    assert (decode_integers(encode_integers(values), values.size) == values).all()


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40), count=st.one_of(st.integers(0, 50), st.just(1 << 60)))
def test_the_universal_code_refuses_or_reads_any_bytes(data, count):
    with contextlib.suppress(StreamError):
        assert decode_integers(data, count).size == count


@settings(max_examples=100, deadline=None)
@given(symbols=st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(1, 300))))
def test_alphabet_positions_and_table_agree_with_a_plain_count(symbols):
    words, counts = alphabet(symbols, symbols.size)
    expected, expected_counts = np.unique(symbols, return_counts=True)
    assert words.tolist() == expected.tolist()
    assert counts.tolist() == expected_counts.tolist()
    assert (words[positions(symbols, words, np.int32)] == symbols).all()
    table = encode_alphabet(words)
    assert len(table) <= 4 + words.nbytes
    decoded = decode_alphabet(table, symbols.dtype, words.size)
    assert decoded.dtype == words.dtype
    assert decoded.tolist() == words.tolist()


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_positions_are_exact_where_hashes_collide(dtype):
    words = np.unique(np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 300_000, dtype=dtype))
    symbols = np.random.default_rng(1).permutation(np.repeat(words, 2))
    assert (words[positions(symbols, words, np.uint32)] == symbols).all()


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.int64])
def test_an_alphabet_is_refused_exactly_beyond_its_limit(dtype):
    symbols = np.random.default_rng(0).permutation(np.repeat(np.arange(1000, dtype=dtype), 20))
    assert alphabet(symbols, 1000) is not None
    assert alphabet(symbols, 999) is None


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), dtype=st.sampled_from(DTYPES), limit=st.sampled_from([1, 5, 1000]))
def test_an_alphabet_of_any_bytes_is_refused_or_ascending(data, dtype, limit):
    try:
        words = decode_alphabet(data, dtype, limit)
    except StreamError:
        return
    assert 1 <= words.size <= limit
    assert words.dtype == dtype
    assert (words[1:] > words[:-1]).all()


@settings(max_examples=60, deadline=None)
@example(counts=np.array([377_988_049, 1]))
@given(counts=hnp.arrays(np.int64, st.integers(1, 80), elements=st.integers(1, 1 << 30)))
def test_frequencies_are_what_the_decoder_reads_and_cost_what_is_said(counts):
    table, frequencies, bits = encode_counts(counts)
    assert decode_counts(table, counts.size).tolist() == frequencies.tolist()
    total = int(frequencies.sum())
    exact = math.fsum(
        -count * math.log1p((frequency - total) / total) / math.log(2)
        for count, frequency in zip(counts.tolist(), frequencies.tolist(), strict=True)
    )
    assert bits == pytest.approx(exact, rel=1e-9, abs=1e-6)
    size = int(counts.sum())
    entropy = math.fsum(-count * math.log1p((count - size) / size) / math.log(2) for count in counts.tolist())
    assert bits >= entropy * (1 - 1e-9)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), size=st.integers(1, 40))
def test_a_table_of_counts_of_any_bytes_is_refused_or_positive(data, size):
    try:
        frequencies = decode_counts(data, size)
    except StreamError:
        return
    assert frequencies.size == size
    assert frequencies.min() >= 1


@settings(max_examples=100, deadline=None)
@given(
    symbols=st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(1, 200))),
    drop=st.integers(0, 63),
)
def test_packed_symbols_come_back(symbols, drop):
    symbols = symbols >> symbols.dtype.type(min(drop, 8 * symbols.dtype.itemsize - 1))
    bits = bits_needed(symbols)
    data = pack(symbols, bits)
    assert len(data) == packed_size(symbols.size, bits, symbols.dtype)
    assert unpack(data, bits, symbols.shape, symbols.dtype).tolist() == symbols.tolist()


def test_packed_symbols_come_back_across_blocks():
    symbols = np.random.default_rng(0).integers(-500, 500, 200_003, dtype=np.int16)
    assert (unpack(pack(symbols, 10), 10, symbols.shape, symbols.dtype) == symbols).all()
