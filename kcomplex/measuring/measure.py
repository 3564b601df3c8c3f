"""Weights times estimators: descriptions."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Unpack

import numpy as np

from kcomplex.estimators.coder import Coder
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import GivenSource
from kcomplex.estimators.pieces import handles_of
from kcomplex.estimators.pipeline import build_estimators
from kcomplex.machine.parallel import thread_count
from kcomplex.measuring.descriptions import Descriptions
from kcomplex.sources.open import Choices, Source, opened
from kcomplex.weights import TensorHandle, Weights

# Weights that are looked at together.
_SEGMENT = 1 << 20

DEFAULT_ESTIMATORS = ("raw", "zstd", "planes|zstd", "palette|entropy")


def describe(
    source: Source,
    estimators: str | Estimator | Coder | Iterable[str | Estimator | Coder] = DEFAULT_ESTIMATORS,
    *,
    given: GivenSource | None = None,
    jobs: int = 1,
    progress: Callable[[Estimator, TensorHandle], None] | None = None,
    partial: bool = False,
    **choices: Unpack[Choices],
) -> Descriptions:
    """Return one description an estimator, in the order asked for.

    Parameters
    ----------
    source
        Path, state dict, module or Weights; see `open_weights`.
    estimators
        Specification strings or estimators.
    given
        Weights that the estimators, all of them codes, may use: a checkpoint, or a recipe of an initialisation as in
        `kcomplex.estimators.given.given_of`. The lengths are then those of the difference.
    jobs
        Threads to measure tensors with; results don't depend on it.
    progress
        Called after each tensor.
    partial
        Measure what can be read although it is less than half of the weights, or nothing.
    choices
        What of the source is counted: include, exclude, trainable, root, count, skip; see `open_weights`.

    Raises
    ------
    KComplexError
        The source, or most of it, can't be read, an estimator can't be built, or the two don't go together.

    Examples
    --------
    >>> import torch
    >>> describe({"w": torch.zeros(1000)}, "zstd")[0].kind
    'code'
    """
    thread_count(jobs)
    built = build_estimators(estimators, given)
    with opened(source, partial, **choices) as weights:
        nonfinite = count_nonfinite(weights)
        descriptions = (
            item.describe(weights, jobs=jobs, progress=None if progress is None else functools.partial(progress, item))
            for item in built
        )
        return Descriptions(replace(description, nonfinite=nonfinite) for description in descriptions)


def count_nonfinite(weights: Weights) -> dict[str, int]:
    """Return how many weights are NaN or infinite, of the tensors that have such, by name."""
    counts = Counter[str]()
    for name, handle in weights.items():
        if handle.dtype.is_floating_point or handle.dtype.is_complex:
            for piece in handles_of(handle, _SEGMENT):
                finite = np.isfinite(piece.values())
                # Of a complex number, both parts have to be.
                counts[name] += int((~(finite.all(axis=-1) if handle.dtype.is_complex else finite)).sum())
    return dict(+counts)
