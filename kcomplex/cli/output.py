"""Frames on a terminal as tables; as CSV where the output is piped; as JSON or CSV on request."""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kcomplex.errors import KComplexError, SpecError, VerificationError
from kcomplex.machine.files import output_path, replacing
from kcomplex.machine.terminal import printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from rich.progress import Progress, ProgressColumn

    from kcomplex.weights import Coverage

GIVEN = "weights that the code may use: a checkpoint, or 'seed:factory=package.module:function,seed=0'"

CHECK_FAILED = 1
BAD_INPUT = 2
OWN_FAULT = 3
# Characters of an error message that are shown: its beginning and its end.
_HEAD, _TAIL = 600, 300
# PyTorch's allocators raise RuntimeError.
_ALLOCATION = re.compile("can't allocate memory|not enough memory|out of memory")

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
        write_text(frame.to_csv(index=False))
        return
    if output is OutputFormat.JSON:
        write_json([{key: _plain(value) for key, value in row.items()} for row in frame.to_dict("records")])
        return
    table = Table(title=Text(printable(title)) if title else None, title_justify="left")
    for column in frame.columns:
        numeric = frame[column].dtype.kind in "iuf"
        heading = Text(printable(column.replace("_", " ")))
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(printable(cell(value))) for value in row))
    Console().print(table)


def write_json(value: Any) -> None:
    """Write a value to the standard output as JSON."""
    write_text(json.dumps(value, indent=2) + "\n")


def write_text(text: str) -> None:
    """Write a text to the standard output, exactly; on a terminal, without the control characters in its lines."""
    shown = "\n".join(map(printable, text.split("\n"))) if sys.stdout.isatty() else text
    sys.stdout.write(shown)


def tell(text: str) -> None:
    """Print a line on the standard error; where that can't be written, nobody is told."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def tell_error(error: Exception, source: str = "") -> int:
    """Print the line that tells an error and its source, and return the exit code that stands for its kind."""
    message = str(error) if source in str(error) else f"{source}: {error}"
    if isinstance(error, KComplexError):
        pass
    elif isinstance(error, OSError):
        message = f"{error.filename or 'the standard output (or a temporary file)'}: {error.strerror or error}"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _ALLOCATION.search(message)):
        message = f"there isn't enough memory: {message or 'it is used up'}"
    elif isinstance(error, RecursionError):
        message = f"something is nested too deeply: {message}"
    else:
        for part in traceback.format_exception(error):
            for line in part.splitlines():
                tell(line)
        tell("this is a fault of kcomplex: please report it with the lines above")
        return OWN_FAULT
    message = " ".join(message.split())
    if len(message) > _HEAD + _TAIL:
        message = f"{message[:_HEAD]} ... {message[-_TAIL:]}"
    tell(f"error: {message}")
    return CHECK_FAILED if isinstance(error, VerificationError) else BAD_INPUT


@contextmanager
def telling_errors(codes: list[int], source: str) -> Iterator[None]:
    """Tell what goes wrong with one of several sources, and keep its exit code, so that the others aren't hidden."""
    try:
        yield
    except (KComplexError, MemoryError, RecursionError) as error:
        codes.append(tell_error(error, source))


def progress(*columns: ProgressColumn, transient: bool = True) -> Progress:
    """Return a bar on the standard error, which appears on a terminal only, with other columns than the usual ones.

    A transient one goes when it ends.
    """
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TimeRemainingColumn

    class Description(ProgressColumn):
        """What a task is called: specifications and names, which aren't markup."""

        def render(self, task: Task) -> Text:
            return Text(printable(task.description))

    shown = columns or (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(Description(), *shown, console=errors, transient=transient, disable=not sys.stderr.isatty())


def check_figure(path: Path, *sources: str | None) -> None:
    """Refuse a figure's path before anything is measured for it; see `output_path`.

    Raises
    ------
    SpecError
        The suffix isn't .png, .pdf or .svg.
    KComplexError
        The figure or its table may not be written.
    """
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise SpecError(f"{path}: a figure's name ends in .png, .pdf or .svg")
    for file in (path, _table_of(path)):
        output_path(file, *sources)


def _table_of(figure: Path) -> Path:
    # Not bits.csv for bits.png: who draws may have data of that name.
    return figure.with_name(f"{figure.name}.csv")


def write_figure(axes: Axes, frame: pd.DataFrame, path: Path, *sources: str | None) -> None:
    """Write the figure that axes stand in, and its table beside it, ``NAME.png.csv``; say so on the standard error.

    Raises
    ------
    KComplexError
        One of them can't be written, or is one of the sources.
    """
    table, figure = _table_of(path), axes.get_figure(root=True)
    assert figure is not None
    with replacing(path, *sources) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    with replacing(table, *sources) as temporary:
        frame.to_csv(temporary, index=False)
    tell(f"wrote {path} and {table}")


def tell_coverage(coverage: Coverage, given: object = None, care: Iterable[str] = ()) -> None:
    """Say on the standard error what share of its source a number is the number of, and what to know besides."""
    lines = {"coverage": coverage, "given": given, "care": "; ".join(care)}
    for name, told in lines.items():
        if told:
            tell(f"{name}: {told}")


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
