import lzma
import math

import numpy as np
import pytest
import torch

import kcomplex
from kcomplex.analyses.studies.lengths import (
    bitmap_bytes,
    compressed_column_bytes,
    compression_rate,
    coordinate_bytes,
    description_bits,
    gaussian_bits,
    loss_at,
    mask_bits,
    prequential_bits,
    values_bytes,
)
from kcomplex.errors import SpecError

TEXT = 6_159_990_784


@pytest.mark.parametrize(
    ("loss", "model", "total"),
    [(0.7769328810536984, 138_952_232, 1_002_026_396), (0.7455149538056408, 936_511_076, 1_764_683_897)],
)
def test_description_lengths_are_the_published_ones(loss, model, total):
    assert description_bits(8 * model, loss, TEXT) / 8 == pytest.approx(total, abs=1)
    assert loss_at(8 * total, 8 * model, TEXT) == pytest.approx(loss, abs=1e-8)


def test_bits_a_byte_ratio_and_isoline_are_the_published_ones():
    assert description_bits(0, 0.7769328810536984, 1) == pytest.approx(1.120877, abs=1e-6)
    assert 8 * TEXT / description_bits(8 * 138_952_232, 0.7769328810536984, TEXT) == pytest.approx(6.1475, abs=1e-4)
    assert loss_at(8e9, 8e8, TEXT) == pytest.approx(0.810173241, abs=1e-9)


def test_a_prequential_length_needs_no_model():
    assert prequential_bits([5.5, 3, 2], 3000) / 8 == pytest.approx(1893.537, abs=1e-3)
    with pytest.raises(SpecError, match="losses"):
        prequential_bits([], 3000)


@pytest.mark.parametrize(("deviation", "bits"), [(0.08, -2.922508669), (0.10, -2.860265682), (0.04, -1.758466108)])
def test_gaussian_bits_are_least_at_the_errors_own_deviation(deviation, bits):
    assert gaussian_bits(0.0064, deviation) == pytest.approx(bits, abs=1e-9)


def test_sparse_formats_need_more_than_their_values():
    assert values_bytes(3000) == 12_000
    assert coordinate_bytes(3000) == 36_000
    assert compressed_column_bytes(3000, 785) == 27_144
    assert bitmap_bytes(3000, 300 * 785) == 41_438
    assert mask_bits(3000, 235_500) / 8 == pytest.approx(2897.15, abs=0.01)
    assert mask_bits(0, 10) == mask_bits(10, 10) == pytest.approx(0, abs=1e-9)


def test_the_compression_rate_is_that_of_a_published_resnet50():
    assert compression_rate(25_557_032, 3_770_639) == pytest.approx(6.7779, abs=1e-4)
    assert compression_rate(1000, 125) == 8
    assert compression_rate(5, 0) == math.inf


@pytest.mark.parametrize(
    ("chunk", "size"),
    [(np.random.default_rng(0).bytes(512), 572), (bytes(512), 72), (b"", 32)],
    ids=["noise", "zeros", "empty"],
)
def test_a_frame_a_chunk_costs_what_was_measured_and_ours_no_more(chunk: bytes, size: int):
    def stream_bytes(values: bytes, estimator: str) -> float:
        return kcomplex.describe({"x": torch.tensor(list(values), dtype=torch.uint8)}, estimator)[0].bits / 8

    assert len(lzma.compress(chunk)) == size
    # Less the name, dtype and shape, which xz knows nothing of.
    assert stream_bytes(chunk, "lzma") - stream_bytes(b"", "raw") <= size
