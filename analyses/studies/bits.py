"""Where the bits are: each tensor's bits per weight, stacked by what they are spent on."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kcomplex.errors import RunError
from kcomplex.estimators.description import SHARED
from kcomplex.measuring.explanation import MEASURED, TOTAL, by_tensor, fold_short_tensors
from kcomplex.tracking.frames import load_runs, load_tensors

from ..figures.axes import axes_or_new, length_label
from .selection import last_snapshots, measured_by

# The longest tensors have bars of their own; the others are summed in one more, so that single weights, of which some
# take a hundred bits, don't set the scale.
_MOST_TENSORS = 30
_LEAST_SHARE = 1e-3
# Letters of a tensor's name; its middle is left out beyond.
_LONGEST_NAME = 46
# Parts that are nowhere wider than this share of the longest bar aren't in the legend.
_NARROWEST = 1e-3
_UNTOLD = "structure and shared tables"

# Okabe and Ito's colours, which stay apart for the colour-blind; greys for what no model makes shorter. In the order
# of the stack: what says which values there are, then the fields of a number from the highest to the lowest.
_COLOURS = {
    "structure": "black",
    _UNTOLD: "0.35",
    "tables": "#CC79A7",
    "zero flags": "#56B4E9",
    "signs": "#0072B2",
    "exponents": "#E69F00",
    "magnitudes": "#009E73",
    "low magnitude bits": "#99D8C3",
    "mantissas": "#F0E442",
    "low mantissa bits": "0.8",
    "payload": "0.6",
    **{
        f"byte plane {place}": colour
        for place, colour in enumerate(
            ("#A63603", "#D55E00", "#FD8D3C", "#FDBE85", "#FDD0A2", "#FEE6CE", "0.9", "0.8"), start=1
        )
    },
}
_MORE_COLOURS = ("#D55E00", "#009E73", "#F0E442", "#56B4E9", "#CC79A7", "#0072B2", "#E69F00", "0.8")


def compute(
    tensors: pd.DataFrame, runs: pd.DataFrame, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return one row a tensor and part at a run's last snapshot, in the form of `measuring.explanation.Explanation`.

    Columns: run, step, estimator, kind, measured (always ``weights``), tensor, shape, dtype, weights, part, bits,
    bits_per_weight. What belongs to no tensor is one row, the tensor ``(shared by all)``.

    Parameters
    ----------
    tensors, runs
        What `kcomplex.tracking.frames.load_tensors` and ``load_runs`` returned for one run.
    estimator
        Whose bits; None for ``palette|entropy``.
    metric
        Not used here; see the other analyses.

    Raises
    ------
    RunError
        There are several runs, or the run wasn't measured by the estimator in bits.
    """
    total = last_snapshots(measured_by(runs, estimator))
    if len(total) > 1:
        raise RunError(f"bits draws one run: give the folder of one of {', '.join(map(str, total['run']))}")
    own = last_snapshots(measured_by(tensors, estimator))
    own = own[own["value"].notna()]
    keys = ["run", "step", "estimator", "kind", "tensor", "shape", "dtype", "weights"]
    parts = [column for column in map(str, own) if column.startswith("part_")]
    table = own.melt(keys, parts, "part", "bits").dropna(subset="bits")
    table["part"] = table["part"].str.removeprefix("part_")
    # In the tensors' order, which melting takes apart.
    table["weights"] = table["weights"].astype(int)
    order = dict(zip(own["tensor"], range(len(own)), strict=True))
    table = table.sort_values("tensor", key=lambda names: names.map(order), kind="stable")
    shared = total[["run", "step", "estimator", "kind", "weights"]].assign(
        tensor=SHARED, shape="", dtype="", part=_UNTOLD, bits=total["bits"] - own["value"].sum()
    )
    table = pd.concat([table, shared], ignore_index=True)
    table.insert(4, "measured", MEASURED)
    table["bits_per_weight"] = table["bits"] / table["weights"].where(table["weights"] > 0)
    return table


def plot(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Return axes with a stacked bar a tensor, and one for all; beside it each bar's share of the bits.

    Parameters
    ----------
    frame
        What `compute` or `measuring.explanation.Explanation.to_frame` returned. Where they are in it, a line on each
        bar marks the floor, and a diamond the shuffled control.
    ax
        Axes to draw on; new ones, as high as the bars need, by default.
    """
    frame = fold_short_tensors(frame, _MOST_TENSORS, _LEAST_SHARE)
    measured = frame[frame["measured"] == MEASURED]
    table = by_tensor(frame).set_index("tensor")
    table = table.loc[[TOTAL, *table.index.drop(TOTAL)]]
    everything = int(table["weights"].iloc[0])
    bars = measured.pivot_table(index="tensor", columns="part", values="bits", aggfunc="sum", sort=False)
    bars = pd.concat([bars.sum().to_frame(TOTAL).T, bars]).loc[table.index]
    bars = bars.div(table["weights"].where(table["weights"] > 0), axis=0).fillna(0.0)
    ax = axes_or_new(ax, width=10.0, height=1.3 + 0.21 * len(bars))
    # The bar of everything stands apart.
    rows = np.arange(len(bars)) + 0.5 * (np.arange(len(bars)) > 0)
    left = np.zeros(len(bars))
    width = bars.sum(axis=1).max()
    for part, (colour, hatch) in _looks(list(bars.columns)).items():
        visible = bars[part].max() > _NARROWEST * width
        ax.barh(
            rows, bars[part], 0.8, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3,
            label=part if visible else "_" + part,
        )  # fmt: skip
        left += bars[part].to_numpy()
    own = table.index != SHARED
    if "floor_bits_per_weight" in table:
        floors = table.loc[own, "floor_bits_per_weight"]
        ax.plot(floors, rows[own], "k|", markersize=11, markeredgewidth=1.6, label="order-0 entropy (proxy)")
    if "shuffled_bits_per_weight" in table:
        controls = table.loc[own, "shuffled_bits_per_weight"]
        ax.plot(
            controls, rows[own], "D", markersize=4.5, color="white", markeredgecolor="black", markeredgewidth=0.8,
            label=f"weights shuffled ({measured['kind'].iloc[0]})",
        )  # fmt: skip
    ax.set_xlim(left=0)
    for row, share in zip(rows, table["share"], strict=True):
        ax.text(1.01, row, f"{100 * share:.1f} %", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.text(1.01, rows[0] - 0.9, "of all bits", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set_yticks(rows, [_label(str(tensor), everything) for tensor in bars.index], fontsize=8)
    ax.set_ylim(rows[-1] + 0.6, rows[0] - 0.6)
    ax.set_xlabel(length_label(measured["estimator"], measured["kind"], "bits per weight"))
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.1, 1.0), frameon=False, fontsize=8)
    return ax


def compute_from_runs(
    path: str | os.PathLike[str], *, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return `compute` of a run."""
    return compute(load_tensors(path), load_runs(path), estimator, metric)


def _looks(parts: list[str]) -> dict[str, tuple[str, str]]:
    """Return colour and hatch of each part, in the order of the stack."""
    known = {part: (colour, "") for part, colour in _COLOURS.items() if part in parts}
    others = [part for part in parts if part not in known]
    more = {part: (_MORE_COLOURS[i % len(_MORE_COLOURS)], "////") for i, part in enumerate(others)}
    return {**known, **more}


def _label(tensor: str, weights: int) -> str:
    if tensor == TOTAL:
        return f"all {weights:,} weights"
    half = _LONGEST_NAME // 2
    return tensor if len(tensor) <= _LONGEST_NAME else f"{tensor[: half - 1]}…{tensor[-half:]}"
