"""``kcomplex quantise``: the shortest lossy code that meets a wish, as a ``.kcz`` file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcomplex.cli.options import Count, Jobs, Partial, Root, Skip, check_container, import_from_here
from kcomplex.cli.output import OutputFormat, output_format, progress, tell, tell_coverage, write_frame, write_json
from kcomplex.errors import KComplexError, SpecError
from kcomplex.quantising.step_search import DEFAULT_ESTIMATOR, EVALUATIONS, WITHIN

if TYPE_CHECKING:
    import torch


def quantise(
    path: Annotated[str, typer.Argument(help="a checkpoint of any format that describe reads")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".kcz file to write")],
    estimator: Annotated[
        str, typer.Option("--estimator", "-e", metavar="SPEC", help="a quantiser with a step, and a coder")
    ] = DEFAULT_ESTIMATOR,
    mse: Annotated[float | None, typer.Option(help="at most this mean squared error a quantised weight")] = None,
    bits: Annotated[
        float | None, typer.Option(help="at most so many bits a quantised weight, with the least error")
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="a loss of the state dict that grows by no more than --within"),
    ] = None,
    within: Annotated[float, typer.Option(help="share of the loss that may be added")] = WITHIN,
    evaluations: Annotated[int, typer.Option(help="how often the loss may be evaluated")] = EVALUATIONS,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="quantise what matches, not weights and biases; repeat it")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="keep what matches exactly; repeat it")
    ] = None,
    root: Root = "",
    count: Count = None,
    skip: Skip = None,
    partial: Partial = False,
    jobs: Jobs = 1,
    as_json: Annotated[bool, typer.Option("--json", help="the outcome as JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="the tensors as CSV (the default when piped)")] = False,
) -> None:
    """Write the smallest .kcz file found whose error, bits or loss are as wished; decode gives back its weights."""
    from rich.progress import TextColumn

    from kcomplex.quantising import quantisation
    from kcomplex.sources.open import open_weights

    check_container(output)
    shown = output_format(as_json, as_csv)
    function = None if evaluate is None else _imported(evaluate)
    with progress(TextColumn("trial {task.completed}")) as bar:
        task = bar.add_task("quantising", total=None)

        def advance(trials: int, number: float) -> None:
            what = "loss" if function else "error" if mse is not None else "bits a weight"
            bar.update(task, completed=trials, description=f"{what} {number:.6g}")

        with open_weights(path, root=root, count=count or (), skip=skip or ()) as weights:
            coverage = weights.coverage
        told = quantisation.quantise(
            path,
            output,
            estimator,
            mse=mse,
            bits=bits,
            evaluate=function,
            within=within,
            evaluations=evaluations,
            include=include or (),
            exclude=exclude or (),
            root=root,
            count=count or (),
            skip=skip or (),
            partial=partial,
            jobs=jobs,
            progress=advance,
        )
    if shown is OutputFormat.JSON:
        write_json(told.to_dict())
    else:
        write_frame(told.to_frame(), shown)
    loss = ""
    if told.loss is not None:
        loss = f", loss {told.loss:.6g} ({told.baseline:.6g} before, {told.evaluations} evaluations)"
    tell(
        f"wrote {output}: {told.bits // 8:,} bytes, {told.bits / told.weights:.4f} bits a weight; "
        f"{told.quantised_weights:,} of {told.weights:,} weights quantised at {told.bits_per_weight:.4f} bits each, "
        f"with a mean squared error of {told.distortion:.6g}{loss}"
    )
    tell_coverage(coverage)


def _imported(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Return a function by the name of its module and its own, its failures told as errors of its own.

    Raises
    ------
    SpecError
        There is no such module or function, or the module can't be imported.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise SpecError(f"--evaluate {name!r}: write package.module:function")
    import_from_here()
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise SpecError(f"--evaluate {name!r} can't be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise SpecError(f"--evaluate {name!r} is a {type(function).__name__}, not a function")

    def evaluate(tensors: dict[str, torch.Tensor]) -> Any:
        try:
            return function(tensors)
        except Exception as error:
            raise KComplexError(f"--evaluate {name!r} failed: {type(error).__name__}: {error}") from error

    return evaluate
