"""A quantised code whose tensors have steps of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kcomplex.estimators.code import Code, EncodedTensor, Memory
from kcomplex.estimators.quantised import QuantisedCode
from kcomplex.estimators.structure import TensorEntry
from kcomplex.quantising.step_search import Steps
from kcomplex.weights import TensorHandle, Weights


@dataclass(frozen=True)
class SteppedCode(Code):
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
    def spec(self) -> str:
        """The plain code's."""
        return self.code.spec

    @property
    def full_spec(self) -> str:
        """The plain code's."""
        return self.code.full_spec

    @property
    def sequential(self) -> bool:
        """See `Code.sequential`."""
        return self.code.sequential

    def prepare(self, weights: Weights) -> bytes:
        """Return the plain code's shared side information."""
        return self.code.prepare(weights)

    def memory(self, shared: bytes) -> Memory:
        """Return the plain code's memory."""
        return self.code.memory(shared)

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return the stream of a tensor quantised with its step."""
        step = dict(self.steps).get(handle.name)
        code = self.code if step is None else with_step(self.code, step)
        return code.encode(handle, memory, known)

    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tensor; see `Code.decode`."""
        return self.code.decode(entry, data, memory, known)


def with_step(code: QuantisedCode, step: float) -> QuantisedCode:
    """Return a code whose quantiser has another step."""
    quantiser: Any = code.quantiser
    return replace(code, quantiser=replace(quantiser, step=step))
