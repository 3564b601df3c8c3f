"""What every estimator is, and how descriptions are put together from what tensors take."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

from kcomplex.estimators.description import Description, Kind, TensorDescription, Unit
from kcomplex.estimators.duplicates import Original
from kcomplex.estimators.spec import full_spec_of, spec_of
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

    def quantises(self, handle: TensorHandle) -> bool:
        """Return whether the tensor is quantised, where others of the same bits may not be; no by default."""
        return False

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
            Called after each piece: a tensor, or 4 million weights of one. Tensors that are the same as an earlier one
            have none.
        """


@dataclass(frozen=True)
class TensorLength:
    """One tensor's length in bits by part, and what its decoder (a thought one, for a length) gives back."""

    parts: dict[str, float]
    squared_error: float = 0.0
    exact: bool = True

    def __add__(self, other: TensorLength) -> TensorLength:
        """Return the length of both, pieces of one tensor."""
        parts = sum_parts([*self.parts.items(), *other.parts.items()])
        return TensorLength(parts, self.squared_error + other.squared_error, self.exact and other.exact)

    @property
    def bits(self) -> float:
        """Sum of the parts."""
        return math.fsum(self.parts.values())


def describe_lengths(
    estimator: Estimator,
    weights: Weights,
    originals: Mapping[str, Original],
    lengths: Mapping[str, TensorLength],
    parts: Mapping[str, float],
    start: float = 0.0,
) -> Description:
    """Return the description of weights that were measured in bits, tensor by tensor.

    Parameters
    ----------
    originals
        Of the tensors that are the same as an earlier one, by name; see `distinct_weights`.
    lengths
        Of all other tensors, by name.
    parts, start
        See `assemble`; parts of no bits are left out.
    """
    tensors = [_described(handle, lengths, originals) for handle in weights.values()]
    return assemble(estimator, weights, tensors, {name: bits for name, bits in parts.items() if bits}, start)


def _described(
    handle: TensorHandle, lengths: Mapping[str, TensorLength], originals: Mapping[str, Original]
) -> TensorDescription:
    own, original = lengths.get(handle.name), originals.get(handle.name)
    source = lengths[handle.name if original is None else original.name]
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
        selection=weights.selection,
    )


def sum_parts(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the sum of lengths for each part's name."""
    total: dict[str, float] = {}
    for name, bits in parts:
        total[name] = total.get(name, 0.0) + bits
    return total
