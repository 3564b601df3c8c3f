"""Every lossless coder, alone and behind the lossless transforms, on integers of any dtype and shape."""

import math
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcomplex.compressors.general.brotli import Brotli
from kcomplex.compressors.general.lempel_ziv_markov import Lzma
from kcomplex.compressors.general.standard import Bz2, Zlib
from kcomplex.compressors.general.zstandard import Zstd
from kcomplex.compressors.transforms.palette import Palette
from kcomplex.compressors.transforms.planes import Planes
from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.code import CoderCode, SymbolCode
from kcomplex.estimators.coder import Coder, Part
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.symbols import Shape, Symbols

CODERS = [
    "raw",
    "zlib",
    "zlib:level=1",
    "bz2",
    "bz2:level=1",
    "lzma",
    "lzma:preset=0,extreme=False,aligned=False",
    "zstd",
    "zstd:level=19,long=True",
    "brotli",
    "brotli:quality=0",
    "entropy",
    "entropy:coder=ans",
    "planes|zstd",
    "planes:unit=bit|zlib",
    "palette|entropy",
    "palette|planes|entropy",
    "planes|palette|bz2",
]
BYTE_CODERS = ["zlib", "bz2", "lzma", "zstd", "brotli"]
DTYPES = [np.dtype(f"{kind}{width}") for kind in "iu" for width in (1, 2, 4, 8)]


def symbols(dtypes=DTYPES):
    """Integers from the whole range of a dtype or from a few values, in any shape, also empty and 0-d."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)

    def of(dtype):
        bounds = np.iinfo(dtype)
        few = st.integers(max(bounds.min, -3), 3)
        return st.one_of(hnp.arrays(dtype, shapes), hnp.arrays(dtype, shapes, elements=few))

    return st.sampled_from(dtypes).flatmap(of)


class Alone:
    """A code of integers that never learned anything, with the methods of a coder."""

    def __init__(self, code: SymbolCode) -> None:
        self.code = code

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        return self.code.encode_symbols(symbols, self.code.memory(b""))

    def encode(self, symbols: Symbols) -> bytes:
        return b"".join(part.data for part in self.encode_parts(symbols))

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        return self.code.decode_symbols(data, shape, dtype, self.code.memory(b""))


def coder(spec: str) -> Coder | Alone:
    """Return the coder of a specification; what stands behind a transform or learns, as if it were one."""
    built = build_estimator(spec)
    assert isinstance(built, SymbolCode)
    return built.coder if isinstance(built, CoderCode) else Alone(built)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("spec", CODERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_gives_back_integers_of_every_dtype_and_shape(spec, data):
    built, words = coder(spec), data.draw(symbols())
    assert same(built.decode(built.encode(words), words.shape, words.dtype), words)


@pytest.mark.parametrize("spec", CODERS)
def test_gives_back_long_structured_integers(spec):
    built = coder(spec)
    random = np.random.default_rng(3)
    for words in (
        np.rint(random.normal(0, 20, (40, 500))).astype(np.int8),
        random.integers(0, 2**32, 5000, dtype=np.uint32),
        random.normal(size=(100, 200)).astype(np.float16).view(np.uint16),
        np.repeat(random.integers(-(2**62), 2**62, 50), 200),
        np.full(9000, -1, np.int64),
        np.arange(20_000, dtype=np.int32),
    ):
        assert same(built.decode(built.encode(words), words.shape, words.dtype), words)


@pytest.mark.parametrize("spec", CODERS)
def test_parts_are_the_stream(spec):
    built = coder(spec)
    words = np.arange(1000, dtype=np.uint32) % 7
    assert b"".join(part.data for part in built.encode_parts(words)) == built.encode(words)


@pytest.mark.parametrize("spec", CODERS)
def test_reads_integers_that_are_not_contiguous(spec):
    built = coder(spec)
    words = np.arange(600, dtype=np.int32).reshape(20, 30)[::2, ::-3].T
    assert same(built.decode(built.encode(words), words.shape, words.dtype), words)


@pytest.mark.parametrize("spec", [*BYTE_CODERS, "raw", "entropy", "entropy:coder=ans"])
def test_no_symbols_cost_nothing(spec):
    assert coder(spec).encode(np.zeros((3, 0), np.int16)) == b""


@pytest.mark.parametrize("spec", CODERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_stream_is_refused_or_gives_integers_of_the_announced_layout(spec, data):
    built, words = coder(spec), data.draw(symbols())
    stream = bytearray(built.encode(words))
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["change", "cut", "grow"]))
        if kind == "change" and stream:
            stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
        elif kind == "cut" and stream:
            del stream[data.draw(st.integers(0, len(stream) - 1)) :]
        else:
            stream += data.draw(st.binary(min_size=1, max_size=4))
    try:
        decoded = built.decode(bytes(stream), words.shape, words.dtype)
    except StreamError:
        return
    assert decoded.shape == words.shape
    assert decoded.dtype == words.dtype


@pytest.mark.parametrize("spec", CODERS)
@settings(max_examples=60, deadline=None)
@given(stream=st.binary(max_size=200), dtype=st.sampled_from(DTYPES), size=st.sampled_from([0, 1, 7, 1000]))
def test_any_bytes_are_refused_or_give_integers_of_the_announced_layout(spec, stream, dtype, size):
    try:
        decoded = coder(spec).decode(stream, (size,), dtype)
    except StreamError:
        return
    assert decoded.shape == (size,)
    assert decoded.dtype == dtype


@pytest.mark.parametrize("spec", [*BYTE_CODERS, "raw"])
def test_refuses_what_is_shorter_or_longer_than_announced(spec):
    built = coder(spec)
    words = np.random.default_rng(0).integers(0, 50, 3000, dtype=np.uint16)
    stream = built.encode(words)
    for shape in ((2999,), (3001,), (0,), (3000, 2)):
        with pytest.raises(StreamError):
            built.decode(stream, shape, words.dtype)
    for damaged in (stream[:-1], stream[: len(stream) // 2], b"", stream + b"\0", stream + stream):
        with pytest.raises(StreamError):
            built.decode(damaged, words.shape, words.dtype)


@pytest.mark.parametrize("spec", BYTE_CODERS)
def test_a_stream_that_unpacks_to_more_than_announced_takes_no_memory(spec):
    built = coder(spec)
    stream = built.encode(np.zeros(1 << 24, np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(StreamError):
            built.decode(stream, (100,), np.dtype(np.uint8))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("spec", CODERS)
def test_a_shape_that_the_stream_cannot_hold_takes_no_memory(spec):
    built = coder(spec)
    words = np.random.default_rng(0).integers(0, 50, 100, dtype=np.uint16)
    stream = built.encode(words)
    tracemalloc.start()
    try:
        with pytest.raises(StreamError):
            built.decode(stream[: len(stream) // 2], (1 << 22,), words.dtype)
        # The modelled stream is the only one whose symbols may take less than a byte in 2**16.
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("level", range(1, 23))
@pytest.mark.parametrize("long", [False, True])
def test_zstd_reads_the_windows_of_every_level(level, long):
    words = np.random.default_rng(level).integers(0, 4, 300_000, dtype=np.uint8)
    built = Zstd(level, long)
    assert same(built.decode(built.encode(words), words.shape, words.dtype), words)


@pytest.mark.slow
@pytest.mark.parametrize("built", [Zstd(22), Zstd(19, long=True), Zstd(3, long=True)])
def test_zstd_reads_frames_with_the_largest_window(built):
    block = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    words = np.tile(block, 130)
    assert same(built.decode(built.encode(words), words.shape, words.dtype), words)


def test_zlib_streams_have_no_header():
    words = np.arange(100, dtype=np.uint8)
    assert zlib.decompress(Zlib().encode(words), wbits=-15) == words.tobytes()


def test_lzma_tuned_to_the_words_is_shorter_on_floats():
    words = np.random.default_rng(1).normal(size=20_000).astype(np.float32).view(np.uint32)
    assert len(Lzma().encode(words)) < 0.93 * len(Lzma(aligned=False).encode(words))


def test_byte_planes_stand_with_the_most_significant_first():
    side, planes = Planes().split(np.array([[0x01020304], [0x0A0B0C0D]], np.uint32))
    assert side == b""
    assert [plane.tolist() for plane in planes] == [[[1], [10]], [[2], [11]], [[3], [12]], [[4], [13]]]


def test_byte_planes_of_bytes_are_the_bytes():
    words = np.array([-3, 0, 7], np.int8)
    assert same(Planes().split(words)[1][0], words)


def test_bit_planes_are_packed_with_the_most_significant_first():
    planes = Planes("bit").split(np.array([0x80, 0x01, 0x81], np.uint8))[1]
    assert [plane.tolist() for plane in planes] == [[0b10100000], *[[0]] * 6, [0b01100000]]


def test_palette_of_few_floats_indexes_them_in_ascending_order():
    words = np.array([2.5, -1.0, 2.5, 0.25] * 100, np.float32).view(np.uint32).reshape(20, 20)
    _, [indices] = Palette().split(words)
    assert indices.dtype == np.uint8
    assert indices.shape == (20, 20)
    assert indices.reshape(-1)[:4].tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_palette_indices_of_a_quantised_tensor_follow_its_values(dtype):
    values = np.round(np.random.default_rng(0).standard_normal((40, 30)) * 5).astype(dtype) / 8 + 0
    side, [indices] = Palette().split(words := values.view(f"u{values.itemsize}"))
    order = np.argsort(values, axis=None)
    assert (np.diff(indices.reshape(-1)[order].astype(int)) >= 0).all()
    assert same(Palette().join(side, [indices], words.shape, words.dtype), words)


@pytest.mark.parametrize(
    ("dtype", "distinct"),
    [(np.uint16, 2), (np.uint16, 257), (np.uint32, 256), (np.uint32, 70_000), (np.int64, 3000), (np.int64, 70_000)],
)
def test_palette_indices_have_the_smallest_dtype(dtype, distinct):
    random = np.random.default_rng(0)
    values = random.choice(np.iinfo(dtype).max, distinct, replace=False).astype(dtype)
    words = np.concatenate([values, random.choice(values, 900_000)])
    side, [indices] = Palette().split(words)
    assert indices.dtype == np.min_scalar_type(distinct - 1)
    assert same(Palette().join(side, [indices], words.shape, words.dtype), words)


@settings(max_examples=100, deadline=None)
@given(words=symbols([np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.uint32), np.dtype(np.int64)]))
def test_palette_passes_words_through_exactly_where_it_would_not_pay(words):
    _, [stream] = Palette().split(words)
    distinct, width = len(np.unique(words)), 8 * words.dtype.itemsize
    bits = math.ceil(math.log2(distinct)) if distinct else 0
    pays = distinct * width + words.size * bits < words.size * width
    assert (stream is not words) == pays


def test_palette_passes_random_words_through_for_a_byte():
    words = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    side, [stream] = Palette().split(words)
    assert len(side) == 1
    assert stream is words


@pytest.mark.parametrize(
    "make",
    [
        lambda: Zlib(0),
        lambda: Zlib(10),
        lambda: Bz2(0),
        lambda: Bz2(10),
        lambda: Lzma(-1),
        lambda: Lzma(10),
        lambda: Zstd(0),
        lambda: Zstd(23),
        lambda: Brotli(-1),
        lambda: Brotli(12),
        lambda: Planes("nibble"),
        lambda: build_estimator("zlib:level=fast"),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(SpecError):
        make()
