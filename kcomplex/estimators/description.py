"""Description: what measuring weights with one estimator gave, itemised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kcomplex.errors import WeightsError
from kcomplex.weights import Coverage, SkippedTensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Kind: TypeAlias = Literal["code", "ideal", "proxy"]
Unit: TypeAlias = Literal["bits", "share", "norm", "ratio"]

STRUCTURE = "structure"
# What tables of tensors call the parts that belong to none of them.
SHARED = "(shared by all)"


@dataclass(frozen=True)
class TensorDescription:
    """One tensor's share of a description.

    Attributes
    ----------
    name, shape, dtype, weights, raw_bits
        The tensor, its number of weights and its raw size in bits.
    value
        In the description's unit; bits where that is ``bits``.
    parts
        What the value is made of; sums to it where the unit is bits.
    squared_error
        Sum of squared differences to what the decoder gives back; 0 for a lossless estimator.
    exact
        Whether the decoder gives back every bit.
    same_as, transposed
        Name of the earlier tensor that this one is the same as, and costs nothing beside; empty for most. Whether it is
        that one's transpose.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    raw_bits: int
    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    squared_error: float = 0.0
    exact: bool = True
    same_as: str = ""
    transposed: bool = False

    @property
    def distortion(self) -> float:
        """Mean squared error a weight."""
        return self.squared_error / max(self.weights, 1)


@dataclass(frozen=True)
class GivenMatch:
    """How many of a description's tensors are given, and how they were found.

    Attributes
    ----------
    tensors, raw_bytes
        Of all that was described.
    matched, matched_bytes
        Of what is given: tensors of the same name, and of the same shape but for a few rows.
    renamed, naming
        How many of them were found by a changed name, and what was left out of it or put before it.
    resized
        How many have more or fewer rows than the given ones.
    unmatched
        Names of the tensors that aren't given; with both shapes where only these differ.
    """

    tensors: int
    matched: int
    raw_bytes: int
    matched_bytes: int
    renamed: int = 0
    naming: str = ""
    resized: int = 0
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.matched_bytes / max(self.raw_bytes, 1)
        told = [f"{self.matched} of {self.tensors} tensors ({share:.1%} of the bytes)"]
        if self.renamed:
            told.append(f"{self.renamed} by {self.naming}")
        if self.resized:
            told.append(f"{self.resized} by common rows")
        if self.unmatched:
            told.append(f"not {some(self.unmatched)}")
        return ", ".join(told)


@dataclass(frozen=True)
class Description:
    """The outcome of measuring weights with one estimator.

    Attributes
    ----------
    estimator
        Specification string; `kcomplex.build_estimator` turns it back into the estimator.
    kind
        ``code`` (a decoder exists), ``ideal`` (complete code length, no stream) or ``proxy`` (bounds nothing).
    unit
        ``bits`` for lengths; proxies may have others.
    value
        The measured number, in `unit`.
    parts
        Itemisation of a length: structure (names, shapes, dtypes), tables, payload ...; sums to `value` exactly.
    tensors
        Each tensor's share, without the parts that belong to the whole.
    weights, raw_bits
        Number of weights measured and their raw size in bits.
    lossless
        Whether the decoder gives every weight back bit for bit; None for proxies.
    distortion
        Mean squared error a weight of what the decoder gives back; None for proxies.
    seconds
        Wall time of the measurement.
    version
        Version of kcomplex that measured.
    skipped
        Tensors that were left out, with reasons.
    selection
        What the caller chose of the source; see `kcomplex.weights.Weights`.
    nonfinite
        How many weights of which tensors are NaN or infinite.
    given
        Which tensors other weights were given for; None where none were.
    """

    estimator: str
    kind: Kind
    unit: Unit
    value: float
    parts: Mapping[str, float]
    tensors: tuple[TensorDescription, ...]
    weights: int
    raw_bits: int
    lossless: bool | None
    distortion: float | None
    seconds: float
    version: str
    skipped: tuple[SkippedTensor, ...] = ()
    selection: str = ""
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    given: GivenMatch | None = None

    def __post_init__(self) -> None:
        if self.unit == "bits" and self.parts and math.fsum(self.parts.values()) != self.value:
            raise WeightsError(
                f"{self.estimator}: the parts sum to {math.fsum(self.parts.values())} bits, not to {self.value}"
            )

    @property
    def bits(self) -> float:
        """Description length in bits; NaN where the unit isn't bits."""
        return self.value if self.unit == "bits" else math.nan

    @property
    def bits_per_weight(self) -> float:
        """Bits divided by the number of weights measured; NaN without weights or where the unit isn't bits."""
        return self.bits / self.weights if self.weights else math.nan

    @property
    def ratio(self) -> float:
        """Raw bits divided by bits (2 means half the raw size)."""
        return self.raw_bits / self.bits if self.bits else math.nan

    @property
    def coverage(self) -> Coverage:
        """How much of the source was measured."""
        return Coverage.of(len(self.tensors), self.raw_bits // 8, self.skipped)

    @property
    def care(self) -> tuple[str, ...]:
        """What to know before the number is believed: NaN, duplicates, what was folded, copies, what was unreadable."""
        told = []
        if self.nonfinite:
            where = some(tuple(self.nonfinite))
            told.append(f"{sum(self.nonfinite.values()):,} weights are NaN or infinite, in {where}")
        same = [tensor.name for tensor in self.tensors if tensor.same_as and tensor.weights > 1]
        if same:
            told.append(f"{some(same)} cost next to nothing: the same as earlier tensors")
        folded = [item.name for item in self.skipped if item.folded]
        if folded:
            told.append(f"{some(folded)}: folded into what the network computes with")
        copies = [item.name for item in self.skipped if item.role == "copy"]
        if copies:
            told.append(f"{some(copies)}: copies of the network")
        unread = [
            item.name for item in self.skipped if item.role == "packed" or (item.shape is not None and not item.role)
        ]
        if unread:
            told.append(f"{some(unread)} can't be measured")
        return tuple(told)

    def __repr__(self) -> str:
        length = (
            f"{self.bits:,.0f} bits, {self.bits_per_weight:.4f} bits per weight, raw/{self.ratio:.2f}"
            if self.unit == "bits"
            else f"{self.unit} {self.value:.6g}"
        )
        skipped = f", {len(self.skipped)} tensors skipped" if self.skipped else ""
        return f"<Description {self.estimator} ({self.kind}): {length}{skipped}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the headline as a flat dictionary of plain numbers and strings, as in one row of a table."""
        return {
            "estimator": self.estimator,
            "kind": self.kind,
            "unit": self.unit,
            "value": self.value,
            "bits": self.bits,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bits / 8,
            "ratio": self.ratio,
            "weights": self.weights,
            "raw_bits": self.raw_bits,
            "counted_tensors": len(self.tensors),
            "all_tensors": self.coverage.of_tensors,
            "coverage": self.coverage.share,
            "nonfinite": sum(self.nonfinite.values()),
            "selection": self.selection,
            "lossless": self.lossless,
            "distortion": self.distortion,
            "given_tensors": self.given and self.given.matched,
            "given_of": self.given and self.given.tensors,
            "seconds": self.seconds,
            "version": self.version,
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row a tensor: shape, dtype, weights, value, bits per weight, error and the parts (``part_...``).

        ``mse`` is the mean squared error a weight of what the decoder gives back, ``exact`` whether that is every bit;
        proxies have neither.
        """
        import pandas as pd

        rows = []
        for tensor in self.tensors:
            in_bits = self.unit == "bits" and tensor.weights > 0
            rows.append(
                {
                    "estimator": self.estimator,
                    "kind": self.kind,
                    "tensor": tensor.name,
                    "shape": shape_text(tensor.shape),
                    "dtype": tensor.dtype,
                    "weights": tensor.weights,
                    "raw_bits": tensor.raw_bits,
                    "unit": self.unit,
                    "value": tensor.value,
                    "bits_per_weight": tensor.value / tensor.weights if in_bits else math.nan,
                    "mse": math.nan if self.lossless is None else tensor.distortion,
                    "exact": None if self.lossless is None else tensor.exact,
                    **{f"part_{part}": bits for part, bits in tensor.parts.items()},
                }
            )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Return axes with one bar a tensor, in bits per weight (or the proxy's unit), the kind in the label."""
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.subplots(figsize=(7, 1 + 0.25 * len(self.tensors)))[1]
        in_bits = self.unit == "bits"
        frame = self.to_frame()
        ax.barh(frame["tensor"], frame["bits_per_weight" if in_bits else "value"], color="0.6", edgecolor="black")
        ax.invert_yaxis()
        ax.set_xlabel(f"{self.estimator} ({self.kind}), {'bits per weight' if in_bits else self.unit}")
        return ax


def shape_text(shape: tuple[int, ...] | list[int]) -> str:
    """Return a shape as tables show it: ``64x3x7x7``."""
    return "x".join(map(str, shape)) or "scalar"


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first of several names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
