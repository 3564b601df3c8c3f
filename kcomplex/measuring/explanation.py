"""Where the bits are: a description by tensor and part, beside the floor and the shuffled control."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, Unpack

from kcomplex.errors import SpecError
from kcomplex.estimators.coder import Coder
from kcomplex.estimators.description import SHARED, Description, shape_text
from kcomplex.estimators.duplicates import distinct_weights
from kcomplex.estimators.estimator import Estimator, for_each_tensor
from kcomplex.estimators.given import GivenSource
from kcomplex.estimators.pipeline import build_estimators
from kcomplex.estimators.quantised import QuantisedCode, QuantisedLength, quantised_weights
from kcomplex.measuring.floor import TensorFloor, tensor_floor
from kcomplex.measuring.measure import count_nonfinite
from kcomplex.measuring.shuffling import shuffled_weights
from kcomplex.sources.open import Choices, Source, opened
from kcomplex.weights import TensorHandle, Weights

if TYPE_CHECKING:
    import pandas as pd

MEASURED, FLOOR, SHUFFLED = "weights", "floor", "shuffled weights"
TOTAL = "(all)"

# Called after each tensor, with what is being done.
Progress: TypeAlias = Callable[[str, TensorHandle], None]


@dataclass(frozen=True)
class Explanation:
    """A description, and what to compare its bits with.

    Attributes
    ----------
    description
        Of the weights, in bits.
    floors
        Each tensor's order-0 bits (proxy): of the weights, or of what the decoder gives back if a quantiser stands
        first. Empty for other lossy estimators.
    shuffled
        The same estimator's description of the same weights with the entries of each tensor shuffled. What it has more
        is the structure beyond the histogram that the estimator finds, and what it takes from weights that are given.
        A mosaic fits the shuffled weights worse, so that both its bits and its distortion differ.
    """

    description: Description
    floors: tuple[TensorFloor, ...] = ()
    shuffled: Description | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row a tensor and part for each of ``weights``, ``floor`` and ``shuffled weights``.

        Columns: estimator, kind, measured, tensor, shape, dtype, weights, part, bits, bits_per_weight. The bits of a
        description's rows sum to its length; those that belong to no tensor (structure, shared tables) are under the
        tensor ``(shared by all)``, whose number of weights is that of all tensors.
        """
        import pandas as pd

        rows = _description_rows(self.description, MEASURED)
        for floor in self.floors:
            shape = shape_text(floor.shape)
            row = (self.description.estimator, "proxy", FLOOR, floor.name, shape, floor.dtype, floor.weights)
            rows += [(*row, part, bits) for part, bits in floor.parts.items()]
        if self.shuffled is not None:
            rows += _description_rows(self.shuffled, SHUFFLED)
        columns = ["estimator", "kind", "measured", "tensor", "shape", "dtype", "weights", "part", "bits"]
        frame = pd.DataFrame(rows, columns=columns)
        frame["bits_per_weight"] = frame["bits"] / frame["weights"].where(frame["weights"] > 0)
        return frame


def explain(
    source: Source,
    estimators: str | Estimator | Coder | Iterable[str | Estimator | Coder],
    *,
    shuffle: int | None = None,
    given: GivenSource | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    partial: bool = False,
    **choices: Unpack[Choices],
) -> tuple[Explanation, ...]:
    """Return one explanation an estimator.

    Parameters
    ----------
    source, given, jobs, partial, choices
        See `kcomplex.describe`.
    estimators
        Specification strings or estimators that measure in bits.
    shuffle
        Seed of the shuffled control; None for none. It takes as long again as the description.

    Raises
    ------
    KComplexError
        As `kcomplex.describe`; SpecError also where an estimator doesn't measure in bits.

    Examples
    --------
    >>> import torch
    >>> weights = {"w": torch.arange(1000) % 2}
    >>> frame = explain(weights, "zstd", shuffle=0)[0].to_frame()
    >>> sorted(frame["measured"].unique())
    ['floor', 'shuffled weights', 'weights']
    """
    built = build_estimators(estimators, given)
    with opened(source, partial, **choices) as weights:
        nonfinite = count_nonfinite(weights)
        floors: dict[str, tuple[TensorFloor, ...]] = {}
        explanations = []
        for estimator in built:
            description = estimator.describe(weights, jobs=jobs, progress=_named(progress, estimator.spec))
            if description.unit != "bits":
                raise SpecError(
                    f"{estimator.spec!r} measures a {description.unit}, not bits: there is nothing to split; "
                    "choose a code or a code length"
                )
            decoded, label = _decoded(estimator, description, weights)
            if decoded is not None and label not in floors:
                named = _named(progress, label)
                # What is the same as an earlier tensor has nothing left to be told.
                alike = (
                    distinct_weights(weights) if decoded is weights else distinct_weights(weights, estimator.quantises)
                )
                distinct = Weights(decoded[name] for name in alike.weights)
                floors[label] = tuple(for_each_tensor(tensor_floor, distinct, jobs, named))
            shuffled = None
            if shuffle is not None:
                named = _named(progress, f"{estimator.spec}, shuffled")
                shuffled = estimator.describe(shuffled_weights(weights, shuffle), jobs=jobs, progress=named)
            description = replace(description, nonfinite=nonfinite)
            explanations.append(Explanation(description, floors.get(label, ()), shuffled))
        return tuple(explanations)


def fold_short_tensors(frame: pd.DataFrame, most: int, least: float = 0.0) -> pd.DataFrame:
    """Return the frame with all but the longest tensors summed in one, called ``(12 other tensors)``.

    Parameters
    ----------
    frame
        What `Explanation.to_frame` returned.
    most
        Tensors that stay as they are, at most.
    least
        Share of the tensors' bits that each of them has, at least.
    """
    import pandas as pd

    belongs = frame["tensor"] != SHARED
    own: pd.DataFrame = frame.loc[belongs]
    measured = own[own["measured"] == MEASURED]
    lengths = measured.groupby("tensor", sort=False)["bits"].sum()
    longest = lengths.nlargest(most)
    others = lengths.index.difference(longest[longest >= least * lengths.sum()].index)
    if len(others) < 2:
        return frame
    short = own["tensor"].isin(others)
    weights = measured[measured["tensor"].isin(others)].drop_duplicates("tensor")["weights"].sum()
    folded = own[short].assign(tensor=f"({len(others)} other tensors)", shape="", dtype="", weights=weights)
    keys = list(frame.columns.drop(["bits", "bits_per_weight"]))
    summed = folded.groupby(keys, sort=False)["bits"].sum().reset_index()
    summed["bits_per_weight"] = summed["bits"] / summed["weights"].where(summed["weights"] > 0)
    pieces: list[pd.DataFrame] = [own.loc[~short], summed, frame.loc[~belongs]]
    return pd.concat(pieces, ignore_index=True)


def by_part(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a part, and one of all, with what floor and control have of it.

    Columns: part, bits, share (of all bits), bits_per_weight (of all weights); where they were measured,
    floor_bits_per_weight, shuffled_bits_per_weight, and beyond_histogram: shuffled minus unshuffled, in bits per
    weight.

    Parameters
    ----------
    frame
        What `Explanation.to_frame` or `fold_short_tensors` returned.
    """
    return _compared(frame, "part").drop(columns="weights")


def by_tensor(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a tensor, and one of all: as `by_part`, with its number of weights, by which bits are divided."""
    return _compared(frame, "tensor")


def _compared(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    import pandas as pd

    sizes = frame.drop_duplicates("tensor").set_index("tensor")["weights"]
    everything = sizes.drop(index=SHARED, errors="ignore").sum()
    bits = frame.pivot_table(index=key, columns="measured", values="bits", aggfunc="sum", sort=False)
    bits = pd.concat([bits, bits.sum().to_frame(TOTAL).T])
    weights = (
        bits.index.map(sizes.to_dict()).fillna(everything) if key == "tensor" else pd.Index([everything] * len(bits))
    )
    per_weight = bits.div(weights.where(weights > 0), axis=0)
    table = pd.DataFrame({"weights": weights.astype(int), "bits": bits[MEASURED]}, index=bits.index)
    table["share"] = table["bits"] / table["bits"].iloc[-1]
    table["bits_per_weight"] = per_weight[MEASURED]
    if FLOOR in bits:
        table["floor_bits_per_weight"] = per_weight[FLOOR]
    if SHUFFLED in bits:
        table["shuffled_bits_per_weight"] = per_weight[SHUFFLED]
        table["beyond_histogram"] = per_weight[SHUFFLED] - per_weight[MEASURED]
    return table.rename_axis(key).reset_index()


def _named(progress: Progress | None, label: str) -> Callable[[TensorHandle], None] | None:
    return None if progress is None else partial(progress, label)


def _decoded(estimator: Estimator, description: Description, weights: Weights) -> tuple[Weights | None, str]:
    """Return the weights that the estimator's decoder gives back, None where it can't be asked, and a label."""
    if isinstance(estimator, (QuantisedCode, QuantisedLength)) and not estimator.quantiser.lossless:
        return quantised_weights(estimator, weights), f"floor of {estimator.spec}"
    return (None, "") if description.lossless is False else (weights, "floor")


def _description_rows(description: Description, measured: str) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    shared = dict(description.parts)
    for tensor in description.tensors:
        shape = shape_text(tensor.shape)
        row = (description.estimator, description.kind, measured, tensor.name, shape, tensor.dtype, tensor.weights)
        # An estimator that doesn't itemise has one part; so has a tensor that takes no bits, to be counted.
        for part, bits in (tensor.parts or {"payload": tensor.value}).items():
            rows.append((*row, part, bits))
            if part in shared:
                shared[part] -= bits
    # What rounding leaves of parts that are all the tensors' own.
    least = 2.0**-20
    row = (description.estimator, description.kind, measured, SHARED, "", "", description.weights)
    rows += [(*row, part, bits) for part, bits in shared.items() if bits > least]
    return rows
