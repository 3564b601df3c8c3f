"""Sparsity and L2 norm: two of the proxies that compression papers report beside code lengths."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kcomplex.estimators.description import Description, Kind, TensorDescription
from kcomplex.estimators.estimator import Estimator, Progress, assemble, for_each_tensor
from kcomplex.weights import SkippedTensor, TensorHandle, Weights, dtype_name

from .segments import value_segments


@dataclass(frozen=True)
class Sparsity(Estimator):
    """Share of weights that are exactly zero, of either sign, over all weights; a proxy.

    Integers and booleans count like floats; a complex weight is zero if both its parts are. Without weights it is 0.
    """

    name: ClassVar[str] = "sparsity"

    @property
    def kind(self) -> Kind:
        """``proxy``."""
        return "proxy"

    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description; its unit is ``share``, for the whole and for each tensor."""
        start = time.perf_counter()
        tensors = for_each_tensor(_share_of_zeros, weights, jobs, progress)
        zeros = sum(round(tensor.value * tensor.weights) for tensor in tensors)
        return assemble(self, weights, tensors, {}, start, "share", zeros / max(weights.elements, 1))


@dataclass(frozen=True)
class L2(Estimator):
    """Euclidean norm of all floating-point and complex weights in float64; a proxy.

    Integer and boolean tensors, which count steps and mark positions rather than weigh anything, are listed as
    skipped. A NaN or an infinity among the weights shows in the norm.
    """

    name: ClassVar[str] = "l2"

    @property
    def kind(self) -> Kind:
        """``proxy``."""
        return "proxy"

    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description; its unit is ``norm``, for the whole and for each tensor."""
        start = time.perf_counter()
        floats: list[TensorHandle] = []
        integers: list[SkippedTensor] = []
        for handle in weights.values():
            if handle.dtype.is_floating_point or handle.dtype.is_complex:
                floats.append(handle)
            else:
                integers.append(SkippedTensor.of(handle, "integers have no norm", handle.role))
        measured = weights.with_tensors(floats, (*weights.skipped, *integers))
        tensors = for_each_tensor(_norm, measured, jobs, progress)
        norm = math.hypot(*(tensor.value for tensor in tensors))
        return assemble(self, measured, tensors, {}, start, "norm", norm)


def _share_of_zeros(handle: TensorHandle) -> TensorDescription:
    zeros = 0
    for values in value_segments(handle):
        nonzero = values.any(axis=1) if values.ndim == 2 else values
        zeros += values.shape[0] - int(np.count_nonzero(nonzero))
    return _row(handle, zeros / max(handle.elements, 1))


def _norm(handle: TensorHandle) -> TensorDescription:
    norm = 0.0
    for values in value_segments(handle):
        wide = values.astype(np.float64, copy=False).reshape(-1)
        # Scaled, so that squares neither overflow nor vanish.
        largest = float(np.abs(wide).max())
        if largest == 0 or not math.isfinite(largest):
            norm = math.hypot(norm, largest)
        else:
            norm = math.hypot(norm, largest * math.sqrt(float(np.square(wide / largest).sum())))
    return _row(handle, norm)


def _row(handle: TensorHandle, value: float) -> TensorDescription:
    return TensorDescription(
        handle.name, handle.shape, dtype_name(handle.dtype), handle.elements, 8 * handle.nbytes, value
    )
