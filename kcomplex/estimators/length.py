"""Code lengths: estimators in bits for which no stream is written."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

from kcomplex.estimators.description import Description
from kcomplex.estimators.duplicates import Distinct, distinct_weights
from kcomplex.estimators.estimator import Estimator, Progress, TensorLength, describe_tensors
from kcomplex.estimators.symbols import Symbols, symbols_of
from kcomplex.weights import TensorHandle, Weights


class CodeLength(Estimator):
    """A length in bits of integers: ``ideal`` or ``proxy``."""

    @abstractmethod
    def length(self, symbols: Symbols) -> float:
        """Return the length of integers in bits."""

    def prepare(self, weights: Weights) -> bytes:
        """Return the side information that all tensors share; none by default."""
        return b""

    def tensor_length(self, handle: TensorHandle, shared: bytes) -> TensorLength:
        """Return the length of the tensor's words; ``shared`` is what `prepare` returned."""
        return TensorLength({"payload": self.length(symbols_of(handle.read()))})

    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description; see `Estimator.describe`. Ideal lengths pay for the structure."""
        distinct = Distinct(weights, {}) if self.kind == "proxy" else distinct_weights(weights)
        shared = self.prepare(distinct.weights)
        measure = partial(self.tensor_length, shared=shared)
        return describe_tensors(
            self,
            weights,
            distinct.originals,
            measure,
            stream_spec=lambda: self.full_spec,
            shared=shared,
            jobs=jobs,
            progress=progress,
        )
