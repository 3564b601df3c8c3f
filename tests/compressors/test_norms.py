"""Sparsity and L2 norm of whole networks and of their tensors."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from kcomplex import describe
from kcomplex.compressors.proxies.norms import L2
from kcomplex.sources.open import open_weights
from kcomplex.weights import TensorHandle, Weights


def measure(spec, tensors, **options):
    return describe(tensors, spec, **options)[0]


def test_sparsity_is_the_share_of_zeros_of_either_sign():
    tensors = {
        "a": torch.tensor([[0.0, -0.0, 1.0], [2.0, float("nan"), 1e-45]]),
        "b": torch.tensor([0, 1, 0, 0], dtype=torch.int8),
        "c": torch.tensor([0j, 1j], dtype=torch.complex64),
        "d": torch.tensor([True, False]),
    }
    description = measure("sparsity", tensors)
    assert (description.kind, description.unit) == ("proxy", "share")
    assert description.value == (2 + 3 + 1 + 1) / 14
    assert [tensor.value for tensor in description.tensors] == [2 / 6, 3 / 4, 1 / 2, 1 / 2]
    assert description.lossless is None
    assert math.isnan(description.bits)


def test_sparsity_without_weights_is_zero():
    description = measure("sparsity", {"none": torch.zeros(0, 3)})
    assert description.value == 0
    assert description.tensors[0].value == 0


def test_l2_is_the_norm_of_all_values_in_double_precision():
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(300, 40),
        "b": torch.randn(50).to(torch.bfloat16),
        "c": torch.randn(7, dtype=torch.float64),
        "d": torch.randn(6, dtype=torch.complex64),
    }
    norms = [tensor.to(torch.complex128).abs().square().sum().sqrt().item() for tensor in tensors.values()]
    description = measure("l2", tensors)
    assert (description.kind, description.unit) == ("proxy", "norm")
    assert description.value == pytest.approx(np.linalg.norm(norms), rel=1e-12)
    assert [tensor.value for tensor in description.tensors] == pytest.approx(norms, rel=1e-12)


def test_l2_lists_integers_as_skipped():
    description = measure("l2", {"steps": torch.tensor(1000), "w": torch.tensor([3.0, 4.0])})
    assert description.value == 5
    assert description.weights == 2
    assert [(item.name, item.reason) for item in description.skipped] == [("steps", "integers have no norm")]


def test_l2_looks_at_every_tensor_once():
    tensors = {f"w{index:05}": torch.tensor([float(index % 3)]) for index in range(4000)}
    weights = open_weights(tensors)

    class Uncomparable(TensorHandle):
        def __eq__(self, other):
            raise AssertionError("tensors needn't be compared")

        __hash__ = None

    handles = [
        Uncomparable(**{field.name: getattr(handle, field.name) for field in dataclasses.fields(handle)})
        for handle in weights.values()
    ]
    assert L2().describe(Weights(handles)).value == measure("l2", tensors).value


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_l2_neither_overflows_nor_vanishes(scale):
    values = torch.tensor([3.0, 4.0], dtype=torch.float64) * scale
    assert measure("l2", {"w": values}).value == pytest.approx(5 * scale, rel=1e-14)


def test_l2_shows_what_is_not_finite():
    assert math.isnan(measure("l2", {"w": torch.tensor([1.0, float("nan")])}).value)
    assert measure("l2", {"w": torch.tensor([1.0, -math.inf])}).value == math.inf


def test_l2_of_nothing_is_zero():
    assert measure("l2", {"w": torch.zeros(3), "none": torch.zeros(0)}).value == 0


@pytest.mark.parametrize("spec", ["sparsity", "l2"])
def test_long_tensors_are_measured_in_pieces(spec, monkeypatch):
    tensors = {"w": torch.arange(-50, 50, dtype=torch.float32).reshape(4, 25)}
    whole = measure(spec, tensors)
    monkeypatch.setattr("kcomplex.compressors.proxies.segments.SEGMENT", 7)
    assert measure(spec, tensors).value == pytest.approx(whole.value, rel=1e-14)
