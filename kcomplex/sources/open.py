"""Any source becomes weights: a path, a state dict, a live model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TypeAlias, TypedDict, Unpack

import torch

from kcomplex.errors import KComplexError, WeightsError
from kcomplex.sources.files import open_path
from kcomplex.sources.modules import module_weights
from kcomplex.sources.packed import unpacked
from kcomplex.sources.roles import with_roles
from kcomplex.sources.state_dicts import state_dict_weights
from kcomplex.weights import Weights, as_patterns


class Choices(TypedDict, total=False):
    """What `open_weights` takes beside a source."""

    include: str | Iterable[str]
    exclude: str | Iterable[str]
    trainable: bool | None
    root: str
    count: str | Iterable[str]
    skip: str | Iterable[str]


Source: TypeAlias = "str | PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module | Weights"


def open_weights(
    source: Source,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    *,
    trainable: bool | None = None,
    root: str = "",
    count: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
) -> Weights:
    """Return the weights of a file, a folder, a state dict or a live model.

    What is read is what the network computes with in evaluation: the product of pruning, of a parametrisation or of
    weight normalisation, never its latent originals, of a live module as of a file. Optimiser state, copies of the
    network, masks and constants that its configuration gives are left out and listed in `Weights.skipped`.

    Parameters
    ----------
    source
        Path of any known format, mapping of names to tensors, `torch.nn.Module`, or Weights, which stay as they are
        but for ``include``, ``exclude`` and ``trainable``.
    include, exclude, trainable
        Selection; see `Weights.select`.
    root
        Where the network stands in a file or mapping that holds several things: ``model.encoder`` is what stands under
        ``encoder`` under ``model``.
    count, skip
        Roles to count beside the usual ones, and usual ones to leave out; see `kcomplex.weights.ROLES`. ``all`` counts
        everything as it is stored.

    Raises
    ------
    SourceNotFoundError
        The path doesn't exist.
    FormatError
        The file is truncated, corrupted, of no known format, or holds several networks.
    WeightsError
        The selection is empty or can't be made.
    """
    if isinstance(source, Weights):
        if root or count or skip:
            raise WeightsError("root, count and skip say how a source is opened, and these weights are: open them anew")
        return source.select(include, exclude, trainable=trainable) if _chosen(include, exclude, trainable) else source
    weights = _read(source, root)
    try:
        weights = with_roles(unpacked(weights), as_patterns(count), as_patterns(skip))
        return (
            weights.select(include, exclude, trainable=trainable) if _chosen(include, exclude, trainable) else weights
        )
    except KComplexError:
        weights.close()
        raise


@contextmanager
def opened(source: Source, partial: bool = False, **choices: Unpack[Choices]) -> Iterator[Weights]:
    """Yield the weights of a source to be measured; close what was opened for it, but not a caller's weights.

    Parameters
    ----------
    source, choices
        See `open_weights`.
    partial
        Take what can be read although it is less than half of the weights, or nothing.

    Raises
    ------
    WeightsError
        Most of the weights can't be read, or there are none.
    """
    weights = open_weights(source, **choices)
    try:
        if not partial:
            _require_coverage(weights)
        yield weights
    finally:
        # A selection of the caller's weights shares their files.
        if not isinstance(source, Weights):
            weights.close()


def _read(source: Source, root: str) -> Weights:
    """Return all tensors of a source."""
    if isinstance(source, torch.nn.Module):
        if root:
            raise WeightsError("root is a place in a file or mapping; of a module, give the part: model.encoder")
        return module_weights(source)
    if isinstance(source, Mapping):
        return state_dict_weights(source, root=root)
    if isinstance(source, (str, PathLike)):
        return open_path(fspath(source), root)
    raise WeightsError(
        f"can't take weights from a {type(source).__name__}: give a path, a state dict, a module or Weights"
    )


def _chosen(include: object, exclude: object, trainable: bool | None) -> bool:
    return bool(include or exclude or trainable is not None)


def _require_coverage(weights: Weights) -> None:
    """Refuse a number that would be that of a small part of the network, or of nothing.

    Raises
    ------
    WeightsError
        Fewer weights can be read than can't, or there is no tensor.
    """
    unread = [item for item in weights.skipped if item.role in ("", "packed")]
    missing = sum(item.elements for item in unread)
    if len(weights) and missing <= weights.elements:
        return
    if not len(weights) and not weights.skipped:
        raise WeightsError(f"{weights.source}: there is no tensor in it")
    some = "; ".join(f"{item.name}: {item.reason}" for item in (unread or weights.skipped)[:3])
    told = f"{weights.elements:,} of at least {weights.elements + missing:,} weights can be measured"
    raise WeightsError(
        f"{weights.source}: {told} ({some}); --dry-run lists what there is, --count ROLE counts what is left out, and "
        "--partial (partial=True) measures the part all the same"
    )
