"""Complexity over training: how a run's bits per weight develop from snapshot to snapshot."""

from __future__ import annotations

import os

import pandas as pd
from matplotlib.axes import Axes

from kcomplex.tracking.frames import load_runs

from ..figures.axes import RAW_STYLE, add_grid_and_legend, axes_or_new, length_label, scale_lengths, styles
from .selection import measured_by

# Markers a line: enough to tell lines apart, too few to cover them.
_MARKERS = 7


def compute(frame: pd.DataFrame, estimator: str | None = None, metric: str = "accuracy") -> pd.DataFrame:
    """Return one row a run and snapshot, in order.

    Columns: run, step, epoch, estimator, kind, weights, bits, raw_bits, bits_per_weight, and the metric under its name
    where it was logged.

    Parameters
    ----------
    frame
        What `kcomplex.tracking.frames.load_runs` returned.
    estimator
        Whose bits; None for ``palette|entropy``.
    metric
        A metric to list beside the bits; it isn't drawn.

    Raises
    ------
    RunError
        The runs weren't measured by the estimator in bits.
    """
    rows = measured_by(frame, estimator)
    columns = ["run", "step", "epoch", "estimator", "kind", "weights", "bits", "raw_bits", "bits_per_weight"]
    return rows[[*columns, *({metric} & set(rows))]].sort_values(["run", "step"], ignore_index=True)


def plot(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Return axes with one line a run over epochs (over steps where epochs aren't known), and the raw size.

    Parameters
    ----------
    frame
        What `compute` returned.
    ax
        Axes to draw on; new ones by default.
    """
    ax = axes_or_new(ax, width=8.0)
    clock = "step" if frame["epoch"].isna().any() else "epoch"
    runs = list(frame.groupby("run", sort=False))
    for position, (style, (name, rows)) in enumerate(zip(styles(len(runs)), runs, strict=True)):
        every = max(1, len(rows) // _MARKERS)
        ax.plot(
            rows[clock],
            rows["bits_per_weight"],
            linestyle=style.line,
            color="black" if style.grey == "white" else style.grey,
            marker=style.marker,
            markevery=(position * every // max(1, len(runs)), every),
            markerfacecolor=style.grey,
            markeredgecolor="black",
            label=str(name),
        )
    raw = (frame["raw_bits"] / frame["weights"]).unique()
    for position, size in enumerate(raw):
        ax.axhline(size, label=None if position else "raw size", **RAW_STYLE)
    scale_lengths(ax, "y", [*frame["bits_per_weight"], *raw])
    ax.set_xlabel(clock)
    ax.set_ylabel(length_label(frame["estimator"], frame["kind"], "bits per weight"))
    add_grid_and_legend(ax)
    return ax


def compute_from_runs(
    path: str | os.PathLike[str], *, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return `compute` of a run or a folder of runs."""
    return compute(load_runs(path), estimator, metric)
