"""Weights times estimators: descriptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from kcomplex.estimators.coder import Coder
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import GivenSource
from kcomplex.estimators.pipeline import build_estimators
from kcomplex.measuring.descriptions import Descriptions
from kcomplex.sources.open import Source, opened
from kcomplex.weights import TensorHandle

DEFAULT_ESTIMATORS = ("raw", "zstd", "planes|zstd", "palette|entropy")


def describe(
    source: Source,
    estimators: str | Estimator | Coder | Iterable[str | Estimator | Coder] = DEFAULT_ESTIMATORS,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    trainable: bool | None = None,
    given: GivenSource | None = None,
    jobs: int = 1,
    progress: Callable[[Estimator, TensorHandle], None] | None = None,
) -> Descriptions:
    """Return one description an estimator, in the order asked for.

    Parameters
    ----------
    source
        Path, state dict, module or Weights; see `open_weights`.
    estimators
        Specification strings or estimators.
    include, exclude, trainable
        Selection of tensors; see `Weights.select`.
    given
        Weights that the estimators, all of them codes, may use: a checkpoint, or a recipe of an initialisation as in
        `kcomplex.estimators.given.given_of`. The lengths are then those of the difference.
    jobs
        Threads to measure tensors with; results don't depend on it.
    progress
        Called after each tensor.

    Raises
    ------
    KComplexError
        The source can't be read, an estimator can't be built, or the two don't go together.

    Examples
    --------
    >>> import torch
    >>> describe({"w": torch.zeros(1000)}, "zstd")[0].kind
    'code'
    """
    built = build_estimators(estimators, given)
    with opened(source, include, exclude, trainable=trainable) as weights:
        return Descriptions(
            item.describe(weights, jobs=jobs, progress=None if progress is None else partial(progress, item))
            for item in built
        )
