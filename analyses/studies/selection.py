"""Which rows of a run store's frames an analysis looks at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kcomplex.errors import RunError
from kcomplex.estimators.pipeline import build_estimator

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_ESTIMATOR = "palette|entropy"


def measured_by(frame: pd.DataFrame, estimator: str | None) -> pd.DataFrame:
    """Return the rows of one estimator that measures in bits.

    Parameters
    ----------
    frame
        What `kcomplex.tracking.frames.load_runs` or ``load_tensors`` returned.
    estimator
        Specification; None for ``palette|entropy``.

    Raises
    ------
    RunError
        The runs weren't measured by this estimator, or its unit isn't bits.
    SpecError, UnknownNameError, PluginError
        There is no such estimator.
    """
    # The store has canonical specifications, without options that are at their default.
    wanted = build_estimator(estimator or DEFAULT_ESTIMATOR).spec
    rows = frame[frame["estimator"] == wanted]
    if rows.empty:
        known = ", ".join(sorted(frame["estimator"].dropna().unique())) or "nothing yet"
        raise RunError(f"no run was measured by {wanted!r}; there is: {known}")
    units = set(rows["unit"])
    if units != {"bits"}:
        raise RunError(f"{wanted!r} measures {', '.join(sorted(units))}, not bits: choose a code or a code length")
    return rows


def last_snapshots(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run's last snapshot."""
    return frame[frame["step"] == frame.groupby("run")["step"].transform("max")]


def last_measured(path: Path) -> pd.DataFrame:
    """Return one row an estimator at a run's last measured snapshot.

    Raises
    ------
    RunError
        There is no run, or nothing of it was measured.
    """
    from kcomplex.tracking.frames import load_runs

    frame = last_snapshots(load_runs(path))
    if frame.empty:
        raise RunError(f"{path}: nothing is measured yet: kcomplex runs {path} --measure does it, --events tells why")
    return frame


def scores(frame: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Return the column of a metric.

    Raises
    ------
    RunError
        No run logged it, or one of the rows lacks it.
    """
    if metric not in frame:
        raise RunError(f"no run logged the metric {metric!r}")
    missing = frame.loc[frame[metric].isna(), "run"].unique()
    if len(missing):
        raise RunError(f"the metric {metric!r} is missing at the last snapshot of {', '.join(map(str, missing))}")
    return frame[metric].astype(float)


def smaller_is_better(metric: str) -> bool:
    """Return whether a metric improves downwards, judged by its name: losses, errors and perplexities do."""
    return any(word in metric for word in ("loss", "error", "perplexity"))
