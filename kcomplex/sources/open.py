"""Any source becomes weights: a path, a state dict, a live model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TypeAlias

import torch

from kcomplex.errors import WeightsError
from kcomplex.sources.files import open_path
from kcomplex.sources.modules import module_weights
from kcomplex.sources.state_dicts import state_dict_weights
from kcomplex.weights import Weights

Source: TypeAlias = "str | PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module | Weights"


def open_weights(
    source: Source,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    *,
    trainable: bool | None = None,
) -> Weights:
    """Return the weights of a file, a folder, a state dict or a live model.

    Parameters
    ----------
    source
        Path of any known format, mapping of names to tensors, `torch.nn.Module`, or Weights. For a module, what is
        read is what the network computes with in evaluation: the output of a parametrisation, of pruning or of
        weight normalisation, never its latent original.
    include, exclude, trainable
        Selection; see `Weights.select`.

    Raises
    ------
    SourceNotFoundError
        The path doesn't exist.
    FormatError
        The file is truncated, corrupted, or of no known format.
    WeightsError
        The selection is empty or can't be made.
    """
    if isinstance(source, Weights):
        weights = source
    elif isinstance(source, torch.nn.Module):
        weights = module_weights(source)
    elif isinstance(source, Mapping):
        weights = state_dict_weights(source)
    elif isinstance(source, (str, PathLike)):
        weights = open_path(fspath(source))
    else:
        raise WeightsError(
            f"can't take weights from a {type(source).__name__}: give a path, a state dict, a module or Weights"
        )
    if include or exclude or trainable is not None:
        try:
            return weights.select(include, exclude, trainable=trainable)
        except WeightsError:
            if weights is not source:
                weights.close()
            raise
    return weights


@contextmanager
def opened(
    source: Source,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    *,
    trainable: bool | None = None,
) -> Iterator[Weights]:
    """Yield the weights of a source, see `open_weights`; close what was opened for it, but not a caller's weights."""
    weights = open_weights(source, include, exclude, trainable=trainable)
    try:
        yield weights
    finally:
        # A selection of the caller's weights shares their files.
        if not isinstance(source, Weights):
            weights.close()
