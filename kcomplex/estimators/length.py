"""Code lengths: estimators in bits for which no stream is written."""

from __future__ import annotations

import time
from abc import abstractmethod
from functools import partial

from kcomplex.estimators.description import STRUCTURE, Description
from kcomplex.estimators.duplicates import Distinct, distinct_weights
from kcomplex.estimators.estimator import Estimator, Progress, TensorLength, describe_lengths, for_each_tensor
from kcomplex.estimators.structure import encode_structure, entries_of
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
        start = time.perf_counter()
        distinct = Distinct(weights, {}) if self.kind == "proxy" else distinct_weights(weights, self.quantises)
        shared = self.prepare(distinct.weights)
        measured = for_each_tensor(partial(self.tensor_length, shared=shared), distinct.weights, jobs, progress)
        lengths = dict(zip(distinct.weights, measured, strict=True))
        parts = {STRUCTURE: 0.0, "tables": 8.0 * len(shared)}
        if self.kind != "proxy":
            streams = {name: [(int(length.bits) // 8, 0)] for name, length in lengths.items()}
            entries = entries_of(weights, distinct.originals, streams)
            parts[STRUCTURE] = 8.0 * len(encode_structure(self.full_spec, len(shared), entries))
        return describe_lengths(self, weights, distinct.originals, lengths, parts, start)
