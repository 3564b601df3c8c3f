"""The columns of a run's frame, and which names they leave for metrics."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from kcomplex.errors import RunError

SNAPSHOT_COLUMNS = ("run", "step", "epoch", "wall_time")
DESCRIPTION_COLUMNS = (
    "estimator",
    "kind",
    "unit",
    "value",
    "bits",
    "bits_per_weight",
    "bytes",
    "ratio",
    "weights",
    "raw_bits",
    "counted_tensors",
    "all_tensors",
    "coverage",
    "nonfinite",
    "selection",
    "lossless",
    "distortion",
    "given_tensors",
    "given_of",
    "seconds",
    "version",
)
# Of the snapshots' own tables.
STATE_COLUMNS = ("id", "snapshot", "description", "state", "skipped")
# Names that no metric may have.
TAKEN = (*SNAPSHOT_COLUMNS, *DESCRIPTION_COLUMNS, *STATE_COLUMNS)


def storable(text: str) -> str:
    """Return a text as a run store can hold it: bytes that some file names have instead of letters are written out."""
    return text.encode(errors="backslashreplace").decode()


def whole(step: object) -> int:
    """Return a number of steps as Python's own: a run store takes no other integers.

    Raises
    ------
    RunError
        It is no whole number.
    """
    try:
        return operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        raise RunError(f"steps are counted in whole numbers, not {step!r:.80}") from None


def checked_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as floats; infinity and NaN are values too, because a training that diverges has them.

    Raises
    ------
    RunError
        A name is empty, no Unicode text or taken by a column of the frame, or a value isn't one number.
    """
    checked = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not name:
            raise RunError(f"a metric needs a name, not {name!r}")
        if storable(name) != name:
            raise RunError(f"a metric can't be called {name!r}, which isn't Unicode text")
        if name in TAKEN:
            raise RunError(f"a metric can't be called {name!r}, which is a column of the runs' frame already")
        # Strings aren't numbers, even where float() would read them as such.
        if isinstance(value, (str, bytes, bytearray)):
            raise RunError(f"the metric {name!r} must be a number, not {value!r}")
        try:
            # A live loss is a number too; converting it while it requires a gradient makes torch warn.
            checked[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise RunError(f"the metric {name!r} must be a number, not {type(value).__name__}: {error}") from None
    return checked
