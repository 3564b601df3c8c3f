"""``kcomplex plot``: an analysis' table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kcomplex.cli.output import errors


def plot(
    analysis: Annotated[str, typer.Argument(help="accuracy, trajectory, layers, or a plug-in's")],
    runs: Annotated[str, typer.Argument(help="a run, or a folder of runs")],
    output: Annotated[Path, typer.Option("--output", "-o", help="figure to write: .png, .pdf or .svg")],
    estimator: Annotated[str, typer.Option("--estimator", "-e", metavar="SPEC", help="whose bits")] = "palette|entropy",
    metric: Annotated[str, typer.Option(help="metric to set the bits against")] = "accuracy",
) -> None:
    """Draw an analysis of tracked runs, and write its table beside the figure as CSV."""
    from kcomplex.errors import KComplexError, SpecError
    from kcomplex.files import replacing
    from kcomplex.registry import registry

    module = registry("kcomplex.analyses").load(analysis)
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise SpecError(f"{output}: a figure's name ends in .png, .pdf or .svg")
    frame = module.compute_from_runs(runs, estimator=estimator, metric=metric)
    axes = module.plot(frame)
    table = output.with_suffix(".csv")
    try:
        with replacing(output) as temporary:
            axes.figure.savefig(temporary, dpi=150)
        with replacing(table) as temporary:
            frame.to_csv(temporary, index=False)
    except OSError as error:
        raise KComplexError(f"{output}: can't be written: {error.strerror or error}") from error
    errors.print(f"wrote {output} and {table}", markup=False)
