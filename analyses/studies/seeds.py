"""Seeds: mean and spread over runs that differ in their seed alone, of their networks' size and accuracy."""

from __future__ import annotations

import os

import pandas as pd
from matplotlib.axes import Axes

from kcomplex.errors import SpecError

from ..figures.axes import axes_or_new
from .front import finish_axes, measured, refuse_other_metric, rows_by_method

_ALIKE = ["data", "network", "mode", "settings", "estimator"]
_AVERAGED = ["accuracy", "bytes", "rate", "non_zeros", "bit_operations"]


def compute(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each configuration, in the order of its first run.

    Columns: data, network, mode, settings, estimator; seeds (how many runs); and of accuracy, bytes, rate, non_zeros
    and bit_operations the mean and, as ``accuracy_std`` and so on, the standard deviation of the sample, NaN for a
    single run.

    Parameters
    ----------
    frame
        What `kcomplex.analyses.studies.front.measured` returned.

    Raises
    ------
    SpecError
        Two runs of one configuration have the same seed: they aren't independent.
    """
    twice = frame[frame.duplicated([*_ALIKE, "seed"])]
    if not twice.empty:
        raise SpecError(f"{twice['run'].iloc[0]}: another run has the same configuration and seed: keep one of them")
    groups = frame.groupby(_ALIKE, sort=False)[_AVERAGED]
    # What some of the runs lack has neither.
    complete = groups.count().eq(groups.size(), axis=0)
    table = groups.mean().where(complete).join(groups.std().where(complete).add_suffix("_std"))
    ordered = [name for column in _AVERAGED for name in (column, f"{column}_std")]
    return table[ordered].assign(seeds=groups.size()).reset_index()


def plot(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Return axes with one marker a configuration, a standard deviation to each side, one style a mode.

    Parameters
    ----------
    frame
        What `compute` returned.
    ax
        Axes to draw on; new ones by default.
    """
    ax = axes_or_new(ax, width=8.0)
    for name, style, rows in rows_by_method(frame.sort_values("bytes")):
        ax.errorbar(
            rows["bytes"],
            rows["accuracy"],
            xerr=rows["bytes_std"].fillna(0),
            yerr=rows["accuracy_std"].fillna(0),
            fmt=style.marker,
            color=style.grey,
            markeredgecolor="black",
            ecolor="0.6",
            label=name,
        )
    return finish_axes(ax, frame, ", mean and standard deviation over seeds")


def compute_from_runs(
    path: str | os.PathLike[str], *, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return `compute` of a folder of runs.

    Raises
    ------
    SpecError
        Another metric than the accuracy is asked for: it is measured anew, on the decoded networks.
    """
    refuse_other_metric("seeds", metric)
    return compute(measured(path, estimator, data_given_network=False))
