"""Frames on a terminal as tables; as CSV where the output is piped; as JSON or CSV on request."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kcomplex.errors import KComplexError, SpecError
from kcomplex.machine.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from kcomplex.weights import Coverage

GIVEN = "weights that the code may use: a checkpoint, or 'seed:factory=package.module:function,seed=0'"

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class OutputFormat(Enum):
    """How a frame is written to the standard output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def output_format(as_json: bool, as_csv: bool) -> OutputFormat:
    """Return the format asked for; without a wish, a table on a terminal and CSV elsewhere.

    Raises
    ------
    SpecError
        Both formats are asked for.
    """
    if as_json and as_csv:
        raise SpecError("--json and --csv exclude each other: choose one")
    if as_json:
        return OutputFormat.JSON
    return OutputFormat.CSV if as_csv or not sys.stdout.isatty() else OutputFormat.TABLE


def write_frame(frame: pd.DataFrame, output: OutputFormat, title: str = "") -> None:
    """Write a frame to the standard output; CSV and JSON hold every column, unrounded."""
    if output is OutputFormat.CSV:
        sys.stdout.write(frame.to_csv(index=False))
        return
    if output is OutputFormat.JSON:
        records = [{key: _plain(value) for key, value in row.items()} for row in frame.to_dict("records")]
        sys.stdout.write(json.dumps(records, indent=2) + "\n")
        return
    table = Table(title=Text(printable(title)) if title else None, title_justify="left")
    for column in frame.columns:
        numeric = frame[column].dtype.kind in "iuf"
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(printable(cell(value))) for value in row))
    Console().print(table)


def check_figure(path: Path) -> None:
    """Refuse a figure's path before anything is measured for it.

    Raises
    ------
    SpecError
        The suffix isn't .png, .pdf or .svg.
    """
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise SpecError(f"{path}: a figure's name ends in .png, .pdf or .svg")


def write_figure(axes: Axes, frame: pd.DataFrame, path: Path) -> None:
    """Write the figure that axes stand in, and its table beside it as CSV; say so on the standard error.

    Raises
    ------
    KComplexError
        One of them can't be written.
    """
    table, figure = path.with_suffix(".csv"), axes.get_figure(root=True)
    assert figure is not None
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)
        with replacing(table) as temporary:
            frame.to_csv(temporary, index=False)
    except OSError as error:
        raise KComplexError(f"{path}: can't be written: {error.strerror or error}") from error
    errors.print(f"wrote {path} and {table}", markup=False)


def tell_coverage(coverage: Coverage, given: object = None, care: Iterable[str] = ()) -> None:
    """Say on the standard error what share of its source a number is the number of, and what to know besides."""
    lines = {"coverage": coverage, "given": given, "care": "; ".join(care)}
    for name, told in lines.items():
        if told:
            errors.print(printable(f"{name}: {told}"), markup=False)


def printable(text: str) -> str:
    """Return a text without control characters: names in files come from anybody, and terminals obey them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def cell(value: Any) -> str:
    """Return a value as a table shows it: integers with thousands separators, floats to four significant places."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100_000 else f"{value:.4g}"
    return str(value)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: NumPy's numbers as Python's; NaN, infinity and what is missing as null."""
    import pandas as pd

    plain = value.item() if hasattr(value, "item") else value
    missing = plain is pd.NA or plain is pd.NaT or (isinstance(plain, float) and not math.isfinite(plain))
    return None if missing else plain
