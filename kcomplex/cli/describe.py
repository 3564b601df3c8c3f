"""``kcomplex describe``: the length of a checkpoint under one or more estimators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcomplex.cli.explain import draw_explanation, explain_weights, show_explanation
from kcomplex.cli.options import Count, Exclude, Given, Include, Jobs, Partial, Root, Skip, choices
from kcomplex.cli.output import (
    OutputFormat,
    check_figure,
    output_format,
    progress,
    tell_coverage,
    telling_errors,
    write_frame,
    write_json,
)

if TYPE_CHECKING:
    import pandas as pd

    from kcomplex.estimators.estimator import Estimator
    from kcomplex.measuring.descriptions import Descriptions
    from kcomplex.weights import SkippedTensor, TensorHandle, Weights


def describe(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="safetensors, Hugging Face folder, .pt/.pth/.ckpt/.bin, .npz or .npy"),
    ],
    estimator: Annotated[
        list[str] | None,
        typer.Option("--estimator", "-e", metavar="SPEC", help="'zstd:level=19', 'palette|entropy' ...; repeat it"),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    root: Root = "",
    count: Count = None,
    skip: Skip = None,
    partial: Partial = False,
    given: Given = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="one row an estimator and tensor")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="where the bits are: by part and tensor, beside what histograms leave")
    ] = False,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="--explain with the same weights shuffled, coded as a control")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="--explain drawn: .png, .pdf or .svg")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the tensors, their roles and what is counted, reading headers only")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="decode every code and compare before its number is shown")
    ] = False,
    jobs: Jobs = 1,
    as_json: Annotated[bool, typer.Option("--json", help="everything as JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="the table as CSV (the default when piped)")] = False,
) -> None:
    """Measure weights with one or more estimators: bits per weight, total bytes, ratio to raw, by kind."""
    import pandas as pd

    from kcomplex.errors import SpecError
    from kcomplex.estimators.pipeline import build_estimators
    from kcomplex.measuring.measure import DEFAULT_ESTIMATORS
    from kcomplex.sources.open import open_weights

    output = output_format(as_json, as_csv)
    wanted = build_estimators(estimator or DEFAULT_ESTIMATORS, given)
    explain = explain or shuffled or figure is not None
    if explain and dry_run:
        raise SpecError("--dry-run measures nothing that could be explained: leave one of the two out")
    if figure is not None:
        check_figure(figure, *paths, given)
        if len(paths) > 1 or len(wanted) > 1:
            raise SpecError("--figure draws one checkpoint under one estimator: give one path and one -e")
    documents = []
    frames = []
    chosen = choices(include, exclude, root, count, skip)
    codes: list[int] = []
    for path in paths:
        with telling_errors(codes, path), open_weights(path, **chosen) as weights:
            if dry_run:
                frames.append(_listing(weights))
            elif explain:
                explanations = explain_weights(weights, wanted, jobs, shuffled, verify, partial)
                frames.append(pd.concat([item.to_frame() for item in explanations], ignore_index=True))
            else:
                descriptions = _measure(weights, wanted, jobs, verify, partial)
                documents.append(_document(path, weights, descriptions))
                frames.append(descriptions.to_frame(per_tensor=per_tensor))
            if len(paths) > 1:
                frames[-1].insert(0, "path", path)
            if output is OutputFormat.TABLE and explain:
                for item in explanations:
                    show_explanation(item, weights.source, per_tensor)
            elif output is OutputFormat.TABLE:
                write_frame(_shown(frames[-1], dry_run, per_tensor), output, title=_title(weights))
            told = explanations[0].description if explain else None if dry_run else descriptions[0]
            if told is None:
                tell_coverage(weights.coverage)
            else:
                tell_coverage(told.coverage, told.given, told.care)
            if figure is not None:
                draw_explanation(explanations[0], figure, path, given)
    if output is OutputFormat.JSON and not dry_run and not explain:
        write_json(documents)
    elif output is not OutputFormat.TABLE and frames:
        write_frame(pd.concat(frames, ignore_index=True), output)
    if codes:
        raise typer.Exit(max(codes))


def _measure(weights: Weights, wanted: list[Estimator], jobs: int, verify: bool, partial: bool) -> Descriptions:
    from kcomplex.measuring.measure import describe as measure
    from kcomplex.measuring.stream import prove

    with progress() as bar:
        task = bar.add_task("", total=max(weights.nbytes, 1) * len(wanted))

        def advance(estimator: Estimator, handle: TensorHandle) -> None:
            bar.update(task, advance=handle.nbytes, description=estimator.spec)

        descriptions = measure(weights, wanted, jobs=jobs, progress=advance, partial=partial)
        for description in descriptions:
            if verify and description.kind == "code":
                bar.update(task, description=f"verifying {description.estimator}")
                prove(weights, description)
    return descriptions


def _document(path: str, weights: Weights, descriptions: Descriptions) -> dict[str, object]:
    return {
        "path": path,
        "tensors": len(weights),
        "weights": weights.elements,
        "raw_bytes": weights.nbytes,
        "descriptions": json.loads(descriptions.to_json()),
    }


def _listing(weights: Weights) -> pd.DataFrame:
    import pandas as pd

    from kcomplex.weights import dtype_name

    listed: list[tuple[TensorHandle | SkippedTensor, str, str, str]] = [
        *((item, " = ".join((name, *item.aliases)), dtype_name(item.dtype), "") for name, item in weights.items()),
        *((item, item.name, item.dtype, item.why) for item in weights.skipped),
    ]
    rows = [
        {
            "tensor": name,
            "dtype": dtype,
            "shape": _shape(item.shape),
            "bytes": item.nbytes,
            "role": item.role,
            "counted": not why,
            "why": why,
        }
        for item, name, dtype, why in listed
    ]
    return pd.DataFrame(rows, columns=["tensor", "dtype", "shape", "bytes", "role", "counted", "why"])


def _shape(shape: tuple[int, ...] | None) -> str:
    from kcomplex.estimators.description import shape_text

    return "" if shape is None else shape_text(shape)


def _shown(frame: pd.DataFrame, dry_run: bool, per_tensor: bool) -> pd.DataFrame:
    """Return the columns that a terminal has room for; CSV and JSON have them all."""
    if dry_run:
        return frame
    columns = (
        ["estimator", "kind", "tensor", "shape", "dtype", "weights", "bits_per_weight", "value", "unit"]
        if per_tensor
        else ["estimator", "kind", "bits_per_weight", "bytes", "ratio", "seconds"]
    )
    if not per_tensor:
        if (frame["unit"] != "bits").any():
            columns[2:2] = ["value", "unit"]
        if (frame["lossless"] == False).any():  # noqa: E712 (the column holds None for proxies)
            columns.append("distortion")
    return frame[[name for name in ("path", *columns) if name in frame]]


def _title(weights: Weights) -> str:
    return f"{weights.source}: {len(weights)} tensors, {weights.elements:,} weights, {weights.nbytes:,} bytes"
