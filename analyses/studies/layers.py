"""Complexity by layer: what each tensor of each run's last snapshot costs."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kcomplex.estimators.description import SHARED as SHARED
from kcomplex.tracking.frames import load_runs, load_tensors

from ..figures.axes import axes_or_new, length_label, scale_lengths, styles
from .selection import last_snapshots, measured_by

# The longest tensors that have bars of their own; the others are summed in one more.
_MOST_TENSORS = 12


def compute(
    tensors: pd.DataFrame, runs: pd.DataFrame, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return one row a run and tensor, at the run's last snapshot; each run's bits sum to its description length.

    Columns: run, step, epoch, estimator, kind, tensor, weights, bits, bits_per_weight, and the metric under its name
    where it was logged. A last row a run, the tensor ``(shared by all)`` without weights, has the parts that belong to
    the whole: the structure, and tables that the tensors share, such as a mosaic's motifs.

    Parameters
    ----------
    tensors, runs
        What `kcomplex.tracking.frames.load_tensors` and ``load_runs`` returned for the same runs.
    estimator
        Whose bits; None for ``palette|entropy``.
    metric
        A metric to list beside the bits; it isn't drawn.

    Raises
    ------
    RunError
        The runs weren't measured by the estimator in bits.
    """
    own = last_snapshots(measured_by(tensors, estimator)).rename(columns={"value": "bits"})
    totals = last_snapshots(measured_by(runs, estimator))
    shared = totals.assign(
        tensor=SHARED, weights=0, bits=totals["bits"] - totals["run"].map(own.groupby("run")["bits"].sum())
    )
    columns = ["run", "step", "epoch", "estimator", "kind", "tensor", "weights", "bits"]
    table = pd.concat([own[columns], shared[columns]]).sort_values("run", kind="stable", ignore_index=True)
    table["bits_per_weight"] = table["bits"] / table["weights"].where(table["weights"] > 0)
    if metric in totals:
        table[metric] = table["run"].map(totals.set_index("run")[metric])
    return table


def plot(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Return axes with a group of bars a tensor, one bar a run.

    Parameters
    ----------
    frame
        What `compute` returned.
    ax
        Axes to draw on; new ones, as high as the bars need, by default.
    """
    runs = list(frame["run"].unique())
    bits = _grouped(frame).reindex(columns=runs)
    ax = axes_or_new(ax, width=8.0, height=1.2 + 0.16 * bits.size + 0.1 * len(bits))
    height = 0.8 / len(runs)
    rows = np.arange(len(bits))
    for position, (style, run) in enumerate(zip(styles(len(runs)), runs, strict=True)):
        ax.barh(
            rows + (position - (len(runs) - 1) / 2) * height,
            bits[run].fillna(0),
            height,
            color=style.grey,
            edgecolor="0.6" if style.grey == "black" else "black",
            hatch=style.hatch,
            label=str(run),
        )
    ax.set_yticks(rows, [str(tensor) for tensor in bits.index])
    ax.invert_yaxis()
    scale_lengths(ax, "x", bits.to_numpy().ravel())
    ax.set_xlabel(length_label(frame["estimator"], frame["kind"], "bits"))
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return ax


def compute_from_runs(
    path: str | os.PathLike[str], *, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return `compute` of a run or a folder of runs."""
    return compute(load_tensors(path), load_runs(path), estimator, metric)


def _grouped(frame: pd.DataFrame) -> pd.DataFrame:
    """Return bits by tensor (rows, in the network's order) and run; all but the longest are summed in one row."""
    bits = frame.pivot_table(index="tensor", columns="run", values="bits", aggfunc="sum", sort=False)
    own, shared = bits.drop(index=SHARED), bits.loc[[SHARED]]
    if len(own) > _MOST_TENSORS + 1:
        kept = own.index.isin(own.max(axis=1).nlargest(_MOST_TENSORS).index)
        own = pd.concat([own[kept], own[~kept].sum().to_frame(f"{(~kept).sum()} other tensors").T])
    return pd.concat([own, shared])
