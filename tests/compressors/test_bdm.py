"""BDM against a slow, straightforward computation from the golden table."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex import describe
from kcomplex.compressors.proxies.bdm import complexity_table, count_strings
from kcomplex.errors import WeightsError
from tests.golden import VENDORED


def slow_bdm(values: list[float]) -> float:
    bits = ["1" if value > 0 else "0" for value in values]
    strings = Counter("".join(bits[start : start + 12]) for start in range(0, len(bits) - 11, 12))
    return math.fsum(complexity_table()[int(string, 2)] + math.log2(count) for string, count in strings.items())


def bdm(tensors):
    return describe(tensors, "bdm")[0]


def test_the_table_is_the_golden_one():
    with np.load(VENDORED / "bdm_ctm_b2_d12.npz") as golden:
        assert (complexity_table() == golden["ctm"]).all()


def test_the_table_is_symmetric():
    table = complexity_table()
    assert table.shape == (4096,)
    assert table == pytest.approx(table[::-1])
    assert table.argmin() in (0, 4095)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_tensors_are_cut_into_strings_across_their_borders(sizes, seed, share):
    random = np.random.default_rng(seed)
    tensors = {f"t{index}": torch.from_numpy((random.random(size) < share) - 0.5) for index, size in enumerate(sizes)}
    values = torch.cat(list(tensors.values())).tolist()
    if len(values) < 12:
        with pytest.raises(WeightsError, match="12 weights"):
            bdm(tensors)
        return
    description = bdm(tensors)
    assert description.value == pytest.approx(slow_bdm(values), rel=1e-12)
    assert math.fsum(description.parts.values()) == description.value
    rows = {tensor.name: tensor.value for tensor in description.tensors}
    assert rows == pytest.approx({name: slow_bdm(tensor.tolist()) for name, tensor in tensors.items()}, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.uint16])
def test_signs_are_read_from_every_dtype(dtype):
    values = (torch.arange(1000) * 7919 % 13).to(torch.float32) - (0 if dtype is torch.uint16 else 6)
    assert bdm({"w": values.to(dtype)}).value == pytest.approx(slow_bdm(values.tolist()))


def test_zeros_nan_and_minus_zero_are_zero_bits():
    zeros = torch.tensor([0.0, -0.0, math.nan, -1.0] * 6)
    assert bdm({"w": zeros}).value == pytest.approx(slow_bdm([0.0] * 24))


def test_a_complex_weight_gives_two_bits():
    weights = torch.complex(torch.randn(30), torch.randn(30))
    assert bdm({"w": weights}).value == pytest.approx(slow_bdm(torch.view_as_real(weights).reshape(-1).tolist()))


def test_the_order_of_tensors_is_that_of_their_names():
    torch.manual_seed(1)
    left, right = torch.randn(500), torch.randn(300)
    assert bdm({"b": right, "a": left}).value == bdm({"a": left, "b": right}).value
    assert bdm({"a": left, "b": right}).value == pytest.approx(slow_bdm([*left.tolist(), *right.tolist()]))


def test_pieces_of_any_length_give_the_same(monkeypatch):
    torch.manual_seed(2)
    tensors = {"a": torch.randn(1001), "b": torch.randn(77)}
    whole = bdm(tensors)
    for block in (1, 5, 12, 100):
        monkeypatch.setattr("kcomplex.compressors.proxies.segments.SEGMENT", block)
        assert bdm(tensors).value == whole.value


def test_saturates_on_long_random_signs():
    torch.manual_seed(0)
    description = bdm({"w": torch.randn(1_000_000)})
    assert description.bits_per_weight < 0.2


def test_counts_strings_of_twelve_bits_with_the_first_bit_highest():
    bits = np.array([0] * 11 + [1] + [1] + [0] * 11 + [0] * 11 + [1] + [1] * 11, np.bool_)
    counts = count_strings(bits)
    assert counts[1] == 2
    assert counts[2048] == 1
    assert counts.sum() == 3
