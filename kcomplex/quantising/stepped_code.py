"""A quantised code whose tensors have steps of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kcomplex.estimators.estimator import Code, EncodedTensor, Shape
from kcomplex.estimators.pipeline import QuantisedCode
from kcomplex.quantising.step_search import Steps
from kcomplex.weights import TensorHandle, Weights


@dataclass(frozen=True)
class SteppedCode(Code):
    """A quantised code with a step of its own for every tensor; what it writes is decoded by the plain code."""

    code: QuantisedCode
    steps: Steps
    name: ClassVar[str] = "stepped"

    @property
    def spec(self) -> str:
        """The plain code's."""
        return self.code.spec

    @property
    def full_spec(self) -> str:
        """The plain code's."""
        return self.code.full_spec

    @property
    def sequential(self) -> bool:
        """See `TensorwiseEstimator.sequential`."""
        return self.code.sequential

    def fresh(self) -> SteppedCode:
        """Return the same with a fresh coder; see `TensorwiseEstimator.fresh`."""
        return replace(self, code=self.code.fresh())

    def prepare(self, weights: Weights) -> bytes:
        """Return the plain code's shared side information."""
        return self.code.prepare(weights)

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the stream of a tensor quantised with its step."""
        step = self.steps.get(handle.name)
        code = self.code if step is None else with_step(self.code, step)
        return code.encode_tensor(handle, shared)

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor; see `Code.decode_tensor`."""
        return self.code.decode_tensor(data, dtype, shape, shared)


def with_step(code: QuantisedCode, step: float) -> QuantisedCode:
    """Return a code whose quantiser has another step."""
    quantiser: Any = code.quantiser
    return replace(code, quantiser=replace(quantiser, step=step))
