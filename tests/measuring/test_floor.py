"""What a tensor's histogram leaves, against counting by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex.measuring.floor import TensorFloor, arrangement_bits, tensor_floor
from kcomplex.weights import DTYPES, TensorHandle, tensor_from_words, word_dtype, words_an_element

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

TOLERANCE = {"rel": 1e-9, "abs": 1e-6}


def floor_of(tensor: torch.Tensor) -> TensorFloor:
    return tensor_floor(TensorHandle("w", tuple(tensor.shape), tensor.dtype, lambda: tensor))


def orders(counts) -> float:
    """log2 of the number of orders, in exact integers."""
    number = math.factorial(sum(counts))
    for count in counts:
        number //= math.factorial(count)
    return math.log2(number)


def random_words(dtype: torch.dtype, few: bool, size: int = 300, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    count = size * words_an_element(dtype)
    words = random.integers(0, 256, (count, dtype.itemsize), dtype=np.uint8).reshape(-1)[: count * dtype.itemsize]
    words = words[: count * word_dtype(dtype).itemsize].view(word_dtype(dtype))
    if dtype is torch.bool:
        words = words & 1
    if few:
        words = words[random.integers(0, 7, count)]
    return tensor_from_words(words, dtype, (size // 10, 10))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_counts_the_orders_that_symbols_can_stand_in(counts):
    assert arrangement_bits(np.array(counts)) == pytest.approx(orders(counts), **TOLERANCE)


def test_orders_take_fewer_bits_than_the_empirical_entropy():
    counts = np.array([500, 300, 200])
    entropy = -float((counts * np.log2(counts / counts.sum())).sum())
    assert entropy - 20 < arrangement_bits(counts) < entropy


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_the_parts_of_few_values_sum_to_the_orders_of_the_words(name):
    tensor = random_words(DTYPES[name], few=True)
    floor = floor_of(tensor)
    words = TensorHandle("w", tuple(tensor.shape), tensor.dtype, lambda: tensor).words()
    counts = Counter(words.tolist()).values()
    assert set(floor.parts) == {"zero flags", "signs", "magnitudes"}
    assert floor.distinct == len(counts)
    assert floor.bits == floor.arrangement_bits == pytest.approx(orders(counts), **TOLERANCE)


def test_zeros_signs_and_magnitudes_are_told_one_after_the_other():
    floor = floor_of(torch.tensor([0, 0, 0, 5, -5, -5, 9, -9], dtype=torch.int32))
    assert floor.parts == pytest.approx(
        {
            "zero flags": orders([3, 5]),
            "signs": orders([2, 3]),
            "magnitudes": orders([1, 1]) + orders([2, 1]),
        }
    )
    # Negative zeros are zeros, whose sign is told.
    floor = floor_of(torch.tensor([0.0, -0.0, -0.0, 1.0, 1.0, 3.0]).to(torch.float8_e5m2))
    assert floor.parts == pytest.approx(
        {"zero flags": orders([3, 3]), "signs": orders([1, 2]), "magnitudes": orders([2, 1])}
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_many_values_are_counted_field_by_field(dtype):
    real = dtype.to_real() if dtype.is_complex else dtype
    values = torch.randn(40, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[values.abs() < 0.2] = 0.0
    values[3, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-310])
    parts = values.to(real)
    tensor = torch.complex(parts, parts.flip(0)) if dtype.is_complex else parts
    floor = floor_of(tensor)
    assert math.fsum(floor.parts.values()) == floor.bits
    if "exponents" not in floor.parts:
        # Two bytes have so few values that telling them is cheaper.
        assert real.itemsize == 2
        return
    mantissa_bits = {8: 52, 4: 23, 2: 10 if real is torch.float16 else 7}[real.itemsize]
    width = 8 * real.itemsize
    words = TensorHandle("w", tuple(tensor.shape), dtype, lambda: tensor).words().tolist()
    zeros = Counter(word & ((1 << (width - 1)) - 1) == 0 for word in words)
    signs = Counter((word & ((1 << (width - 1)) - 1) == 0, word >> (width - 1)) for word in words)
    numbers = [word & ((1 << (width - 1)) - 1) for word in words if word & ((1 << (width - 1)) - 1)]
    exponents = Counter(number >> mantissa_bits for number in numbers)
    raw = mantissas = 0.0
    for exponent, alive in exponents.items():
        for bit in range(mantissa_bits):
            ones = sum((number >> bit) & 1 for number in numbers if number >> mantissa_bits == exponent)
            modelled = orders([ones, alive - ones]) + math.log2(alive + 1)
            if modelled >= alive:
                raw += alive
            else:
                mantissas += modelled
    assert floor.parts == pytest.approx(
        {
            "zero flags": orders(zeros.values()),
            "signs": sum(orders([signs[zero, 0], signs[zero, 1]]) for zero in (True, False)),
            "exponents": orders(exponents.values()),
            "mantissas": mantissas,
            "raw mantissa bits": raw,
        },
        rel=1e-6,
    )


def test_uniform_mantissas_are_raw():
    values = 1 + torch.rand(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    floor = floor_of(values.float())
    assert floor.parts["raw mantissa bits"] == pytest.approx(23 * 60_000, rel=1e-4)
    assert floor.bits == pytest.approx(23 * 60_000, rel=1e-4)


@pytest.mark.parametrize(("half", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_rows_that_were_half_precision_have_no_low_bits(half, bits):
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    whole = floor_of(values)
    assert "trailing zeros" not in whole.parts
    values[::2] = values[::2].to(half).float()
    mixed = floor_of(values)
    assert mixed.parts["trailing zeros"] <= 200
    saved = whole.bits - mixed.bits
    assert saved == pytest.approx((23 - bits) * 30_000, rel=0.01)


def test_gaussian_weights_have_the_entropy_of_their_distribution():
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    floor = floor_of(values)
    # Of a standard normal in float32: differential entropy, minus the expected log2 of the spacing of its values.
    differential = 0.5 * math.log2(2 * math.pi * math.e)
    spacing = float(torch.log2(torch.nextafter(values.abs(), torch.tensor(math.inf)) - values.abs()).mean())
    assert floor.bits / 1e6 == pytest.approx(differential - spacing, abs=0.05)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_empty_and_single_tensors_need_nothing(name):
    assert floor_of(torch.zeros(0, 4, dtype=torch.uint8).view(torch.uint8).to(DTYPES[name])).bits == 0
    assert floor_of(random_words(DTYPES[name], few=True, size=10)[0, 0]).distinct <= 2


def test_takes_views_that_are_not_contiguous():
    values = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    assert floor_of(values.t()) == floor_of(values.t().contiguous())
