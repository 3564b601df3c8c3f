"""Options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from kcomplex.cli.output import GIVEN
from kcomplex.errors import SpecError

if TYPE_CHECKING:
    from kcomplex.sources.open import Choices

Estimator: TypeAlias = Annotated[str, typer.Option("--estimator", "-e", metavar="SPEC", help="a code")]


def import_from_here() -> None:
    """Let modules of the working directory be imported, as ``python -m`` does: the user names one in this call."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def _given(text: str | None) -> str | None:
    if text is not None and text.startswith("seed:"):
        import_from_here()
    return text


Given: TypeAlias = Annotated[str | None, typer.Option(metavar="PATH|RECIPE", help=GIVEN, callback=_given)]
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


# No reader of these would take what encode and quantise write.
_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz", ".npy")


def check_container(path: Path) -> None:
    """Refuse the name of a checkpoint for a ``.kcz`` file.

    Raises
    ------
    SpecError
        It has the suffix of another format.
    """
    if path.suffix in _CHECKPOINTS:
        raise SpecError(f"{path}: what is written is no {path.suffix} file: take another name, in .kcz")


def choices(include: Include, exclude: Exclude, root: Root, count: Count, skip: Skip) -> Choices:
    """Return what `open_weights` is told of a source."""
    return {
        "include": include or (),
        "exclude": exclude or (),
        "root": root,
        "count": count or (),
        "skip": skip or (),
    }
