"""``kcomplex plot``: an analysis' table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kcomplex.cli.output import check_figure, write_figure


def plot(
    analysis: Annotated[str, typer.Argument(help="accuracy, trajectory, layers, bits, front, seeds, or a plug-in's")],
    runs: Annotated[str, typer.Argument(help="a run, or a folder of runs")],
    output: Annotated[Path, typer.Option("--output", "-o", help="figure to write: .png, .pdf or .svg")],
    estimator: Annotated[str, typer.Option("--estimator", "-e", metavar="SPEC", help="whose bits")] = "palette|entropy",
    metric: Annotated[
        str, typer.Option(help="metric to set the bits against; front and seeds take none but accuracy")
    ] = "accuracy",
) -> None:
    """Draw an analysis of tracked runs, and write its table beside the figure as CSV."""
    from kcomplex.registry import registry

    module = registry("kcomplex.analyses").load(analysis)
    check_figure(output)
    frame = module.compute_from_runs(runs, estimator=estimator, metric=metric)
    write_figure(module.plot(frame), frame, output)
