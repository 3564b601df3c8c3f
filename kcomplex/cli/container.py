"""``kcomplex encode``, ``decode`` and ``verify``: a checkpoint as a ``.kcz`` file, back, and the proof."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from kcomplex.cli import options
from kcomplex.cli.output import progress, tell, tell_coverage

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_DEFAULT = "planes|zstd:level=19"
_Limit: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES", min=0, help="weights that the file may hold [default: 1000 times its size, and 1 GiB]"
    ),
]


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

    options.check_container(output)
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
    tell(f"wrote {output}: {size:,} bytes, {bits:.4f} bits a weight, raw / this = {ratio:.3f}")
    tell_coverage(weights.coverage)


def decode(
    path: Annotated[Path, typer.Argument(help=".kcz file")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".safetensors or .pt file to write")],
    given: options.Given = None,
    limit: _Limit = None,
    jobs: options.Jobs = 1,
) -> None:
    """Write the tensors of a .kcz file as a safetensors or a PyTorch file; the latter holds every dtype and name."""
    from kcomplex.kcz import container

    with container.Container(path, limit=limit) as opened:
        total, metadata = len(opened.entries), opened.notes.metadata
    with _progress("decoding", total) as (bar, task):
        container.decode(
            path, output, given=given, limit=limit, jobs=jobs, progress=lambda _: bar.update(task, advance=1)
        )
    tell(f"wrote {output}: {total} tensors")
    if metadata and output.suffix == ".pt":
        tell("the metadata of the safetensors file isn't in it: a .pt file has none")


def verify(
    path: Annotated[Path, typer.Argument(help=".kcz file")],
    original: Annotated[str | None, typer.Argument(help="the checkpoint that it was made of")] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    root: options.Root = "",
    count: options.Count = None,
    skip: options.Skip = None,
    given: options.Given = None,
    limit: _Limit = None,
    jobs: options.Jobs = 1,
) -> None:
    """Check every byte of a .kcz file, decode it, and compare it with the original.

    Exit code 1 if the file is damaged, or isn't what the original holds; 2 if it can't be checked.
    """
    from kcomplex.kcz import container

    choices = options.choices(include, exclude, root, count, skip)
    error = container.verify(path, original, given=given, limit=limit, jobs=jobs, **choices)
    with container.Container(path, limit=limit) as opened:
        total, inexact = len(opened.entries), len(opened.notes.inexact)
    told = f"{path} is undamaged and decodes"
    if original is not None:
        told += f"; {total - inexact} of {total} tensors are those of {original}, bit for bit"
    if inexact:
        told += (
            f"; {inexact} of {total} are quantised, with a mean squared error of {error:.6g} averaged over all weights"
        )
        told += ", as compared with the original" if original is not None else ", as the file says"
    tell(told)


@contextmanager
def _progress(what: str, total: float) -> Iterator[tuple[Progress, TaskID]]:
    with progress() as bar:
        yield bar, bar.add_task(what, total=max(total, 1))
