"""The figures of the MoMos paper, by the conventions of its official code."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
import torch

from kcomplex import describe
from kcomplex.compressors.proxies.published import Published, relative_algorithmic_compression
from kcomplex.errors import SpecError
from tests.golden import VENDORED

COMPRESS = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9),
}


def network():
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(70, 500).round(decimals=1),
        "a.weight": torch.randn(64, dtype=torch.float64),
        "c.steps": torch.tensor(7),
        "d.half": torch.randn(31).to(torch.bfloat16),
    }


@pytest.mark.parametrize("metric", ["gzip", "bz2", "lzma"])
@pytest.mark.parametrize("binarised", [False, True])
@pytest.mark.parametrize("block", [100, 1 << 20])
def test_is_raw_over_compressed_bytes_of_the_concatenation(metric, binarised, block, monkeypatch):
    monkeypatch.setattr("kcomplex.compressors.proxies.segments.SEGMENT", block)
    tensors = network()
    vectors = [tensors[name].reshape(-1).to(torch.float32).numpy() for name in sorted(tensors)]

    def ratio(vector):
        raw = (vector > 0).astype(np.uint8).tobytes() if binarised else vector.astype("<f4").tobytes()
        return len(raw) / len(COMPRESS[metric](raw))

    description = describe(tensors, f"published:metric={metric},binarised={binarised}")[0]
    assert (description.kind, description.unit) == ("proxy", "ratio")
    assert description.value == ratio(np.concatenate(vectors))
    assert [tensor.value for tensor in description.tensors] == [ratio(vector) for vector in vectors]


@pytest.mark.parametrize("metric", ["gzip", "bz2", "lzma"])
def test_nothing_has_ratio_zero(metric):
    assert describe({"none": torch.zeros(0)}, f"published:metric={metric}")[0].value == 0


def test_doubles_beyond_float32_become_infinite():
    huge = describe({"w": torch.full((50,), 1e300, dtype=torch.float64)}, "published")[0]
    infinite = describe({"w": torch.full((50,), torch.inf)}, "published")[0]
    assert huge.value == infinite.value


def test_an_unknown_metric_is_refused():
    with pytest.raises(SpecError, match="gzip, bz2, lzma"):
        Published("zip")


def test_relative_algorithmic_compression_is_the_published_one():
    with np.load(VENDORED / "rac_cases.npz") as golden:
        cases = {key: golden[key].tolist() for key in golden.files}
    ratios = [
        relative_algorithmic_compression(weights=n, blocks=m, block_size=s, motifs=k, bits=q)
        for n, m, s, k, q in zip(cases["n"], cases["m"], cases["s"], cases["k"], cases["q"], strict=True)
    ]
    assert ratios == pytest.approx(cases["rac"], rel=1e-12)
    assert [round(ratio, 2) for ratio in ratios[:3]] == [3.52, 3.95, 3.02]


def test_a_single_motif_needs_no_indices():
    assert relative_algorithmic_compression(weights=100, blocks=50, block_size=2, motifs=1, bits=32) == 50


def test_numbers_that_are_not_positive_are_refused():
    with pytest.raises(SpecError):
        relative_algorithmic_compression(weights=100, blocks=50, block_size=2, motifs=0, bits=32)
