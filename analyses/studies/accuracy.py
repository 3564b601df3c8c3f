"""Complexity against accuracy: what each run's last snapshot costs and how well it does, with the best trade-offs."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from kcomplex.tracking.frames import load_runs

from ..figures.axes import RAW_STYLE, add_grid_and_legend, axes_or_new, length_label, scale_lengths, styles
from .selection import last_snapshots, measured_by, scores, smaller_is_better

# More runs than this would make a legend longer than the figure: then it names the best trade-offs only.
_MOST_NAMED = 16


def compute(frame: pd.DataFrame, estimator: str | None = None, metric: str = "accuracy") -> pd.DataFrame:
    """Return one row a run, at its last snapshot, by increasing bits.

    Columns: run, step, epoch, estimator, kind, weights, bits, raw_bits, bits_per_weight, metric (its name), score (its
    value), pareto (whether no other run is at least as short and as good, and better in one of the two).

    Parameters
    ----------
    frame
        What `kcomplex.tracking.frames.load_runs` returned.
    estimator
        Whose bits; None for ``palette|entropy``.
    metric
        What to set them against. Losses, errors and perplexities are better when smaller, others when larger.

    Raises
    ------
    RunError
        The runs weren't measured by the estimator in bits, or lack the metric.
    """
    rows = last_snapshots(measured_by(frame, estimator))
    columns = ["run", "step", "epoch", "estimator", "kind", "weights", "bits", "raw_bits", "bits_per_weight"]
    table = rows[columns].assign(metric=metric, score=scores(rows, metric))
    sign = -1.0 if smaller_is_better(metric) else 1.0
    table["pareto"] = pareto_front(table["bits"].to_numpy(float), sign * table["score"].to_numpy(float))
    return table.sort_values("bits", ignore_index=True)


def pareto_front(costs: NDArray[np.float64], gains: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other dominates, by costing no more and gaining no less without being the same.

    Parameters
    ----------
    costs, gains
        One of each a point, not NaN; shape (n,).
    """
    points, which = np.unique(np.column_stack([costs, -gains]), axis=0, return_inverse=True)
    # By increasing cost, the larger gain first: a point is on the front if it gains more than all before it.
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], points[:-1, 1]]))
    front: NDArray[np.bool_] = (points[:, 1] < best_before)[which.ravel()]
    return front


def plot(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Return axes with one marker a run, the front of best trade-offs, and the raw size as a reference line.

    Parameters
    ----------
    frame
        What `compute` returned.
    ax
        Axes to draw on; new ones by default.
    """
    ax = axes_or_new(ax, width=8.0)
    metric = str(frame["metric"].iloc[0])
    front = frame[frame["pareto"]]
    # What is best with fewer bits stays within reach of more.
    budgets, best = [*front["bits"], frame["raw_bits"].max()], [*front["score"], front["score"].iloc[-1]]
    ax.plot(budgets, best, drawstyle="steps-post", color="0.6", zorder=1, label="best trade-offs")
    # In the order of their names, a run looks the same in every figure.
    named = frame if len(frame) <= _MOST_NAMED else front
    others = frame.drop(named.index)
    if len(others):
        ax.plot(others["bits"], others["score"], ".", color="0.6", zorder=2, label=f"{len(others)} other runs")
    for style, (_, row) in zip(styles(len(named)), named.sort_values("run").iterrows(), strict=True):
        ax.plot(
            row["bits"],
            row["score"],
            style.marker,
            color=style.grey,
            markeredgecolor="black",
            markersize=8,
            label=row["run"],
        )
    for position, size in enumerate(frame["raw_bits"].unique()):
        ax.axvline(size, label=None if position else "raw size", **RAW_STYLE)
    scale_lengths(ax, "x", [*frame["bits"], *frame["raw_bits"]])
    ax.set_xlabel(length_label(frame["estimator"], frame["kind"], "bits"))
    ax.set_ylabel(metric.replace("_", " "))
    add_grid_and_legend(ax)
    return ax


def compute_from_runs(
    path: str | os.PathLike[str], *, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return `compute` of a run or a folder of runs."""
    return compute(load_runs(path), estimator, metric)
