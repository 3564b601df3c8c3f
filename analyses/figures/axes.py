"""What the figures share: axes without global state, and styles that stay apart in black and white."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

# Beyond this ratio of largest to smallest, a linear axis would squeeze the small ones together.
_WIDE = 5.0
# Beyond this one, three labels a decade would run into each other.
_MANY_DECADES = 2000.0
_MARKERS = "osD^vP*X<>"
_LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_GREYS = ("black", "0.45", "0.7", "white", "0.85", "0.25")
_HATCHES = ("", "///", "...", "xxx", "", "\\\\\\", "---", "ooo", "+++")
RAW_STYLE: dict[str, Any] = {"color": "0.5", "linestyle": (0, (8, 3)), "linewidth": 1.0, "zorder": 0}


@dataclass(frozen=True)
class Style:
    """How one run looks: no two of the first sixty share both marker and fill, line style or hatch."""

    marker: str
    line: str | tuple[int, tuple[int, ...]]
    grey: str
    hatch: str


def styles(count: int) -> list[Style]:
    """Return as many styles, the most different ones first."""
    cycles = zip(
        itertools.cycle(_MARKERS),
        itertools.cycle(_LINES),
        itertools.cycle(_GREYS),
        itertools.cycle(_HATCHES),
        strict=False,
    )
    return [Style(*parts) for parts in itertools.islice(cycles, count)]


def axes_or_new(ax: Axes | None, width: float = 7.0, height: float = 4.5) -> Axes:
    """Return the axes, or new ones in a figure of their own (inches) that no global state knows of."""
    return Figure(figsize=(width, height), layout="constrained").subplots() if ax is None else ax


def length_label(estimators: Iterable[str], kinds: Iterable[str], unit: Literal["bits", "bits per weight"]) -> str:
    """Return the label of an axis of lengths in two lines: the unit; the estimator and its kind."""
    name, kind = " / ".join(dict.fromkeys(estimators)), " / ".join(dict.fromkeys(kinds))
    return f"description length, {unit}\n{name} ({kind})"


def scale_lengths(ax: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Make an axis of lengths logarithmic where the values are wide, with readable ticks either way."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    positive = np.array([value for value in values if value > 0])
    spread = positive.max() / positive.min() if positive.size else 1.0
    if spread > _WIDE:
        ax.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < _MANY_DECADES else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(_short))


def add_grid_and_legend(ax: Axes) -> None:
    """Draw a pale grid behind the data, and the legend beside the axes, where it covers nothing."""
    ax.grid(color="0.92", zorder=-1)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _short(value: float, position: int) -> str:
    """Return 0.5, 20, 500k, 1M."""
    return f"{value:g}" if abs(value) < 1000 else EngFormatter(sep="").format_eng(value)
