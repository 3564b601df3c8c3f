"""What every estimator is, and how descriptions are put together from what tensors take."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

from kcomplex.estimators.description import STRUCTURE, Description, Kind, TensorDescription, Unit
from kcomplex.estimators.duplicates import Original
from kcomplex.estimators.spec import full_spec_of, spec_of
from kcomplex.estimators.structure import encode_structure, entries_of
from kcomplex.machine.parallel import in_order
from kcomplex.version import VERSION
from kcomplex.weights import TensorHandle, Weights, dtype_name

Progress: TypeAlias = Callable[[TensorHandle], None]
Measured = TypeVar("Measured")


class Estimator(ABC):
    """Turns weights into a description.

    An estimator is a frozen dataclass; its fields are its configuration and its ``name`` is what specifications call
    it. Whatever is measured with it, it stays equal, hashable and shareable between threads.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """``code``, ``ideal`` or ``proxy``."""

    @property
    def spec(self) -> str:
        """Specification string that builds this estimator again."""
        return spec_of(self)

    @property
    def full_spec(self) -> str:
        """Specification string with every option, defaults included."""
        return full_spec_of(self)

    @abstractmethod
    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description of weights.

        Parameters
        ----------
        weights
            What to measure.
        jobs
            Threads to measure tensors with; the result doesn't depend on it.
        progress
            Called after each tensor.
        """


@dataclass(frozen=True)
class TensorLength:
    """One tensor's length in bits by part, and what its decoder (a thought one, for a length) gives back.

    Attributes
    ----------
    choice
        See `kcomplex.estimators.code.EncodedTensor`.
    """

    parts: dict[str, float]
    squared_error: float = 0.0
    exact: bool = True
    choice: int = 0

    @property
    def bits(self) -> float:
        """Sum of the parts."""
        return math.fsum(self.parts.values())


def describe_tensors(
    estimator: Estimator,
    weights: Weights,
    originals: Mapping[str, Original],
    measure: Callable[[TensorHandle], TensorLength],
    *,
    stream_spec: Callable[[], str] = str,
    shared: bytes = b"",
    jobs: int = 1,
    progress: Progress | None = None,
) -> Description:
    """Return the description of weights that are measured in bits, tensor by tensor.

    Parameters
    ----------
    originals
        Of the tensors that are the same as an earlier one, by name; see `distinct_weights`.
    measure
        Returns the length of any other tensor.
    stream_spec
        Returns what a stream would name its decoder by, once all is measured: codes and ideal lengths pay for the
        structure that tells it.
    shared
        Side information that all tensors share.
    """
    start = time.perf_counter()

    def measured(handle: TensorHandle) -> TensorLength | None:
        return None if handle.name in originals else measure(handle)

    lengths = dict(zip(weights, for_each_tensor(measured, weights, jobs, progress), strict=True))
    tensors = [_described(handle, lengths, originals) for handle in weights.values()]
    parts: dict[str, float] = {}
    if estimator.kind != "proxy":
        streams = {
            name: [(int(length.bits) // 8, length.choice)] for name, length in lengths.items() if length is not None
        }
        entries = entries_of(weights, originals, streams)
        parts[STRUCTURE] = 8.0 * len(encode_structure(stream_spec(), len(shared), entries))
    if shared:
        parts["tables"] = 8.0 * len(shared)
    return assemble(estimator, weights, tensors, parts, start)


def _described(
    handle: TensorHandle, lengths: dict[str, TensorLength | None], originals: Mapping[str, Original]
) -> TensorDescription:
    own, original = lengths[handle.name], originals.get(handle.name)
    source = own if original is None else lengths[original.name]
    assert source is not None
    return TensorDescription(
        handle.name,
        handle.shape,
        dtype_name(handle.dtype),
        handle.elements,
        8 * handle.nbytes,
        own.bits if own is not None else 0.0,
        own.parts if own is not None else {},
        source.squared_error,
        source.exact,
        *("", False) if original is None else original,
    )


def for_each_tensor(
    measure: Callable[[TensorHandle], Measured], weights: Weights, jobs: int, progress: Progress | None
) -> list[Measured]:
    """Return `measure` of every tensor, in order, in parallel threads where ``jobs`` isn't 1."""
    handles = list(weights.values())
    measured = []
    for handle, tensor in zip(handles, in_order(measure, handles, jobs), strict=True):
        measured.append(tensor)
        if progress is not None:
            progress(handle)
    return measured


def assemble(
    estimator: Estimator,
    weights: Weights,
    tensors: Sequence[TensorDescription],
    parts: dict[str, float],
    start: float,
    unit: Unit = "bits",
    value: float | None = None,
) -> Description:
    """Return the description of the whole from its tensors' and its own parts.

    Parameters
    ----------
    parts
        What belongs to no single tensor; the tensors' parts are added.
    start
        `time.perf_counter` at the beginning of the measurement.
    value
        For proxies that aren't a sum over tensors; None sums the parts.
    """
    total = sum_parts([*parts.items(), *(part for tensor in tensors for part in tensor.parts.items())])
    if value is None:
        value = math.fsum(total.values())
    error = sum(tensor.squared_error for tensor in tensors)
    proxy = estimator.kind == "proxy"
    elements = weights.elements
    return Description(
        estimator=estimator.spec,
        kind=estimator.kind,
        unit=unit,
        value=value,
        parts=total,
        tensors=tuple(tensors),
        weights=elements,
        raw_bits=8 * weights.nbytes,
        lossless=None if proxy else all(tensor.exact for tensor in tensors),
        distortion=None if proxy else error / max(elements, 1),
        seconds=time.perf_counter() - start,
        version=VERSION,
        skipped=weights.skipped,
    )


def sum_parts(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the sum of lengths for each part's name."""
    total: dict[str, float] = {}
    for name, bits in parts:
        total[name] = total.get(name, 0.0) + bits
    return total
