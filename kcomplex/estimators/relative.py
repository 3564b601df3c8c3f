"""Relative descriptions, K(w | w0): weights given other weights, a checkpoint or an initialisation and its seed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.code import Code, EncodedTensor, Memory, Outcome
from kcomplex.estimators.description import GivenMatch
from kcomplex.estimators.duplicates import Distinct
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import STAGE, Given, GivenSource, StatedGiven, given_of
from kcomplex.estimators.matching import GivenTensors, Naming, match
from kcomplex.estimators.structure import Reader, TensorEntry
from kcomplex.weights import TensorHandle, Weights, dtype_name, words_of


class GivenMemory(Memory):
    """The memory of a relative code: that of the code behind it, and the given weights.

    Attributes
    ----------
    digest
        Of the given weights.
    """

    def __init__(
        self, behind: Memory, weights: Weights, digest: str, naming: Naming, match: GivenMatch | None = None
    ) -> None:
        super().__init__(naming.to_bytes() + behind.shared)
        self.behind = behind
        self.digest = digest
        self.given = match
        self.tensors = GivenTensors(weights, naming)
        self._weights = weights

    def close(self) -> None:
        """Close the files of the given weights."""
        self._weights.close()


@dataclass(frozen=True)
class GivenCode(Code):
    """A code for weights given others; its specification is that of the code after ``given:...|``.

    A tensor that is equal to the given one of its name takes no byte; one that isn't given (see `matching`) is coded
    plainly.

    Parameters
    ----------
    stated
        What a stream says that it was made with; None for an encoder.

    Raises
    ------
    SpecError
        The code has no use for other weights.
    """

    given: Given
    code: Code
    stated: StatedGiven | None = None
    name: ClassVar[str] = "given"

    def __post_init__(self) -> None:
        if not self.code.takes_known:
            raise SpecError(f"{self.code.spec!r} has no use for given weights: take lin, mix, or a coder such as zstd")

    @property
    def spec(self) -> str:
        """Specification string; where the weights are in memory, their digest stands in it."""
        return f"{STAGE}{self.given.text}|{self.code.spec}"

    @property
    def full_spec(self) -> str:
        """Specification string with every option of the code."""
        return f"{STAGE}{self.given.text}|{self.code.full_spec}"

    @property
    def sequential(self) -> bool:
        """Whether the code behind is."""
        return self.code.sequential

    def quantises(self, handle: TensorHandle) -> bool:
        """Return whether the code behind does."""
        return self.code.quantises(handle)

    def prepare(self, weights: Weights) -> bytes:
        """Return how given tensors are called, and the side information of the code behind."""
        with self.begin(weights, Distinct(weights, {})) as memory:
            return memory.shared

    def begin(self, weights: Weights, distinct: Distinct) -> GivenMemory:
        """Return the memory of a new stream, with the given weights opened.

        Raises
        ------
        WeightsError
            None of the tensors is given.
        KComplexError
            The given weights can't be opened.
        """
        with ExitStack() as stack:
            given, digest = self.given.open()
            stack.push(given)
            naming, matched = match(weights, distinct, given)
            memory = GivenMemory(self.code.begin(weights, distinct), given, digest, naming, matched)
            stack.pop_all()
        return memory

    def memory(self, shared: bytes) -> GivenMemory:
        """Return the memory of a stream that is decoded, with the given weights opened.

        Raises
        ------
        StreamError
            A stream was encoded with other weights, or nobody gave them.
        KComplexError
            They can't be opened.
        """
        with ExitStack() as stack:
            given, digest = self.given.open()
            stack.push(given)
            if self.stated is not None:
                self.stated.require(digest)
            reader = Reader(shared)
            naming = Naming.read(reader)
            memory = GivenMemory(self.code.memory(reader.rest()), given, digest, naming)
            stack.pop_all()
        return memory

    def stream_spec(self, memory: Memory) -> str:
        """Return the specification with every option of the code, the recipe and the digest."""
        assert isinstance(memory, GivenMemory)
        return f"{STAGE}{self.given.stream_text(memory.digest)}|{self.code.stream_spec(memory.behind)}"

    def rivals(self, outcome: Outcome) -> tuple[Code, ...]:
        """Return the rivals of the code behind, given the same."""
        return tuple(replace(self, code=rival) for rival in self.code.rivals(outcome))

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return one tensor's stream; see `Code.encode`."""
        assert isinstance(memory, GivenMemory)
        known = memory.tensors.known((handle.name, *handle.aliases), handle)
        if known is None:
            return self.code.encode(handle, memory.behind)
        if known.dtype == handle.dtype and np.array_equal(words_of(known), words_of(handle.read())):
            return EncodedTensor([])
        return self.code.encode(handle, memory.behind, known)

    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tensor; see `Code.decode`."""
        assert isinstance(memory, GivenMemory)
        known = memory.tensors.known(entry.names, entry)
        if known is None or data:
            return self.code.decode(entry, data, memory.behind, known)
        if known.dtype != entry.dtype:
            raise StreamError(f"it is said to be as given, where it is given as {dtype_name(known.dtype)}")
        return known.clone()


def relative(estimator: Estimator, given: GivenSource) -> Estimator:
    """Return the code of weights given others; of a code that names what is given, the same with that in hand.

    Raises
    ------
    SpecError
        The estimator is no code, or has no use for other weights, or names some of its own.
    """
    found = given_of(given)
    if isinstance(estimator, GivenCode):
        if isinstance(estimator.given, StatedGiven):
            return replace(estimator, given=found, stated=estimator.given)
        if found != estimator.given:
            raise SpecError(f"{estimator.spec!r} already names what is given: leave one of the two out")
        return estimator
    if not isinstance(estimator, Code):
        raise SpecError(f"{estimator.spec!r} is of kind {estimator.kind} and has no use for given weights: take a code")
    return GivenCode(found, estimator)
