"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from kcomplex.cli.output import GIVEN

if TYPE_CHECKING:
    from kcomplex.sources.open import Choices

Estimator: TypeAlias = Annotated[str, typer.Option("--estimator", "-e", metavar="SPEC", help="a code")]
Given: TypeAlias = Annotated[str | None, typer.Option(metavar="PATH|RECIPE", help=GIVEN)]
Include: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="only tensors that match; repeat it")
]
Exclude: TypeAlias = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="no tensors that match; repeat it")]
Root: TypeAlias = Annotated[str, typer.Option(metavar="KEY", help="the place of the network in a file: model.encoder")]
Count: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ROLE", help="count buffer, mask, constant, latent, copy, optimiser, packed or all, too; repeat it"
    ),
]
Skip: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="ROLE", help="leave out bias, norm or statistic; repeat it")
]
Partial: TypeAlias = Annotated[bool, typer.Option("--partial", help="measure what can be read, however little it is")]
Jobs: TypeAlias = Annotated[
    int, typer.Option("--jobs", "-j", help="threads, -1 for one a core; no result depends on it")
]


def choices(include: Include, exclude: Exclude, root: Root, count: Count, skip: Skip) -> Choices:
    """Return what `open_weights` is told of a source."""
    return {
        "include": include or (),
        "exclude": exclude or (),
        "root": root,
        "count": count or (),
        "skip": skip or (),
    }
