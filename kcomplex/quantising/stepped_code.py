"""A quantised code whose tensors have steps of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kcomplex.estimators.code import Code, EncodedTensor, Memory, OtherEncoder
from kcomplex.estimators.quantised import QuantisedCode
from kcomplex.quantising.step_search import Steps
from kcomplex.weights import TensorHandle


@dataclass(frozen=True)
class SteppedCode(OtherEncoder):
    """A quantised code with a step of its own for every tensor; what it writes is decoded by the plain code.

    Parameters
    ----------
    steps
        Name and step of each tensor that has one of its own.
    """

    code: QuantisedCode
    steps: tuple[tuple[str, float], ...]
    name: ClassVar[str] = "stepped"

    @classmethod
    def of(cls, code: QuantisedCode, steps: Steps) -> SteppedCode:
        """Return the code with steps by name."""
        return cls(code, tuple(steps.items()))

    @property
    def decoder(self) -> Code:
        """The plain code."""
        return self.code

    def for_pieces(self, handle: TensorHandle) -> Code:
        """Return the plain code with the tensor's step, for its pieces."""
        return self._code_of(handle).for_pieces(handle)

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return the stream of a tensor quantised with its step."""
        return self._code_of(handle).encode(handle, memory, known)

    def _code_of(self, handle: TensorHandle) -> QuantisedCode:
        step = dict(self.steps).get(handle.name)
        return self.code if step is None else with_step(self.code, step)


def with_step(code: QuantisedCode, step: float) -> QuantisedCode:
    """Return a code whose quantiser has another step."""
    quantiser: Any = code.quantiser
    return replace(code, quantiser=replace(quantiser, step=step))
