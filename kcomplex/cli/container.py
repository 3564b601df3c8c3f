"""``kcomplex encode``, ``decode`` and ``verify``: a checkpoint as a ``.kcz`` file, back, and the proof."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcomplex.cli import options
from kcomplex.cli.output import errors, tell_coverage

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_DEFAULT = "planes|zstd:level=19"


def encode(
    path: Annotated[str, typer.Argument(help="a checkpoint of any format that describe reads")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".kcz file to write")],
    estimator: options.Estimator = _DEFAULT,
    include: options.Include = None,
    exclude: options.Exclude = None,
    root: options.Root = "",
    count: options.Count = None,
    skip: options.Skip = None,
    partial: options.Partial = False,
    given: options.Given = None,
    jobs: options.Jobs = 1,
) -> None:
    """Write a checkpoint as a .kcz file that decode gives back."""
    from kcomplex.kcz import container
    from kcomplex.sources.open import open_weights

    choices = options.choices(include, exclude, root, count, skip)
    with open_weights(path, **choices) as weights, _progress("encoding", weights.nbytes) as (bar, task):
        size = container.encode(
            path,
            output,
            estimator,
            given=given,
            jobs=jobs,
            progress=lambda handle: bar.update(task, advance=handle.nbytes),
            partial=partial,
            **choices,
        )
    bits = 8 * size / max(weights.elements, 1)
    ratio = weights.nbytes / size
    errors.print(f"wrote {output}: {size:,} bytes, {bits:.4f} bits a weight, raw / this = {ratio:.3f}", markup=False)
    tell_coverage(weights.coverage)


def decode(
    path: Annotated[Path, typer.Argument(help=".kcz file")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".safetensors file to write")],
    given: options.Given = None,
    jobs: options.Jobs = 1,
) -> None:
    """Write the tensors of a .kcz file as a safetensors file."""
    from kcomplex.kcz import container

    with container.Container(path) as opened:
        total = len(opened.entries)
    with _progress("decoding", total) as (bar, task):
        container.decode(path, output, given=given, jobs=jobs, progress=lambda _: bar.update(task, advance=1))
    errors.print(f"wrote {output}: {total} tensors", markup=False)


def verify(
    path: Annotated[Path, typer.Argument(help=".kcz file")],
    original: Annotated[str | None, typer.Argument(help="the checkpoint that it was made of")] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    root: options.Root = "",
    count: options.Count = None,
    skip: options.Skip = None,
    given: options.Given = None,
    jobs: options.Jobs = 1,
) -> None:
    """Check every byte of a .kcz file, decode it, and compare it with the original; exit code 1 if they differ."""
    from kcomplex.kcz import container

    choices = options.choices(include, exclude, root, count, skip)
    error = container.verify(path, original, given=given, jobs=jobs, **choices)
    told = "every bit" if error == 0 else f"quantised, mean squared error {error:.6g}"
    compared = f"decodes and is what {original} holds" if original is not None else "is undamaged and decodes"
    errors.print(f"{path} {compared} ({told})", markup=False)


@contextmanager
def _progress(what: str, total: float) -> Iterator[tuple[Progress, TaskID]]:
    from rich.progress import Progress

    with Progress(console=errors, transient=True, disable=not sys.stderr.isatty()) as bar:
        yield bar, bar.add_task(what, total=max(total, 1))
