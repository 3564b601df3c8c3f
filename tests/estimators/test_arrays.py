"""The arrays that stages made, as streams tell them: what comes back, and what is refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.errors import StreamError, WeightsError
from kcomplex.estimators.arrays import FORMS, read_arrays, tell_arrays
from kcomplex.estimators.code import SymbolCode
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.structure import Reader, TensorEntry, join_lengths, varint

DTYPES = [np.dtype(f"{kind}{size}") for kind in "ui" for size in (1, 2, 4, 8)]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    before=shapes,
    dtype=st.sampled_from(DTYPES),
    arrays=st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=9),
    alike=st.booleans(),
)
def test_shapes_and_dtypes_come_back(before, dtype, arrays, alike):
    made = [np.zeros(shape, own) for shape, own in (arrays[:1] * 8 if alike else arrays)]
    number, told = tell_arrays(made, before, dtype)
    reader = Reader(told)
    assert number < FORMS
    assert read_arrays(number, reader, before, dtype) == [(array.shape, array.dtype) for array in made]
    assert not reader.left


@pytest.mark.parametrize(
    "arrays",
    [[], [np.zeros(2)], [np.zeros(2, ">i4")], [np.zeros(1, np.int8)] * 65, [np.zeros(1 << 20, np.int64)]],
    ids=["none", "floats", "another byte order", "too many", "too large"],
)
def test_what_could_not_be_read_is_refused_when_it_is_told(arrays):
    with pytest.raises(WeightsError, match="a stage made"):
        tell_arrays(arrays, (3, 4), np.dtype(np.int32))


FORGED = [
    (0, 1 << 63),
    (1 << 40, 1 << 40, 0),
    (1 << 30,),
    (1 << 62, 4),
    (0,) * 70,
]


@pytest.mark.parametrize("shape", FORGED, ids=str)
@pytest.mark.parametrize("spec", ["planes|zstd", "palette|entropy", "palette|mix", "planes|raw", "planes|lzma"])
def test_forged_arrays_are_refused_in_little_memory(spec, shape):
    code = build_estimator(spec)
    assert isinstance(code, SymbolCode)
    for count in (1, 64):
        told = varint(count) + bytes([3 + 16]) + join_lengths([len(shape), *shape])
        data = varint(FORMS - 1) + told + bytes(200)
        tracemalloc.start()
        try:
            with pytest.raises(StreamError):
                code.decode_symbols(data, (300, 200), np.dtype(np.uint32), code.memory(b""))
            assert tracemalloc.get_traced_memory()[1] < 1 << 22
        finally:
            tracemalloc.stop()


@given(data=st.binary(max_size=40))
@settings(max_examples=200)
@pytest.mark.parametrize("spec", ["uniform:bits=4|entropy", "mosaic|entropy", "sign|raw", "lloyd:k=4|zstd"])
def test_what_is_no_stream_of_a_quantiser_is_refused_or_has_the_shape(spec, data):
    code = kc.build_estimator(spec)
    entry = TensorEntry(("w",), torch.float32, (4, 3), (len(data),))
    try:
        tensor = code.decode(entry, data, code.memory(b""))  # type: ignore[attr-defined]
    except StreamError:
        return
    assert tensor.shape == (4, 3)
