"""Lossy codes as short as a wish allows: a mean squared error, a number of bits, or a loss that the user measures."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kcomplex.errors import SpecError, WeightsError
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.quantised import QuantisedCode, is_quantisable
from kcomplex.estimators.symbols import Shape
from kcomplex.kcz.container import Container, encode
from kcomplex.machine.files import output_path
from kcomplex.machine.parallel import thread_count
from kcomplex.quantising.step_search import DEFAULT_ESTIMATOR, EVALUATIONS, WITHIN, Steps
from kcomplex.quantising.step_trials import Evaluate, Progress, Trials
from kcomplex.sources.open import Choices, Source, opened
from kcomplex.weights import Weights, as_patterns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SteppedTensor:
    """One tensor of a quantised file: its step (None where it is kept exactly), bits and squared error."""

    name: str
    shape: Shape
    weights: int
    step: float | None
    bits: int
    squared_error: float


@dataclass(frozen=True)
class Quantisation:
    """What `quantise` wrote, and how it was found.

    Attributes
    ----------
    estimator
        Specification that decodes the file.
    step
        The global step: the mean of the tensors' steps, on a logarithmic scale and by number of weights.
    tensors
        Each tensor's step, bits and squared error.
    weights, bits
        Number of weights, and eight times the bytes of the file.
    quantised_weights, distortion
        Number of weights in quantised tensors, and the mean squared error of each of these.
    loss, baseline, limit
        Of the decoded and of the original weights, and what was allowed; None where no loss was evaluated.
    evaluations
        How many times the loss was evaluated, the baseline included.
    """

    estimator: str
    step: float
    tensors: tuple[SteppedTensor, ...]
    weights: int
    bits: int
    quantised_weights: int
    distortion: float
    loss: float | None = None
    baseline: float | None = None
    limit: float | None = None
    evaluations: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file, but for the streams of tensors that are kept, for each weight that is quantised."""
        kept = sum(item.bits for item in self.tensors if item.step is None)
        return (self.bits - kept) / self.quantised_weights

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as a flat dictionary."""
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "tensors"}
        return {**told, "bits_per_weight": self.bits_per_weight}

    def to_frame(self) -> pd.DataFrame:
        """Return one row a tensor: shape, weights, step, bits, bits a weight, mean squared error."""
        import pandas as pd

        return pd.DataFrame(
            {
                "tensor": item.name,
                "shape": "x".join(map(str, item.shape)) or "scalar",
                "weights": item.weights,
                "step": item.step,
                "bits": item.bits,
                "bits_per_weight": item.bits / item.weights if item.weights else math.nan,
                "distortion": item.squared_error / max(item.weights, 1),
            }
            for item in self.tensors
        )


def quantise(
    source: Source,
    path: str | os.PathLike[str],
    estimator: str | Estimator = DEFAULT_ESTIMATOR,
    *,
    mse: float | None = None,
    bits: float | None = None,
    evaluate: Evaluate | None = None,
    within: float = WITHIN,
    evaluations: int = EVALUATIONS,
    jobs: int = 1,
    progress: Progress | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    partial: bool = False,
    root: str = "",
    count: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
) -> Quantisation:
    """Write the shortest ``.kcz`` file found that meets one wish, and return what it took.

    Parameters
    ----------
    source
        Anything that `open_weights` opens.
    path
        Of the file to write.
    estimator
        A quantiser with an option ``step``, and a coder. The step is searched for; its value here doesn't matter.
    mse
        The wish: a mean squared error of at most this for each weight that is quantised.
    bits
        The wish: at most so many bits for each weight that is quantised, the file but for the streams of other tensors,
        and the least error at that.
    evaluate
        The wish: a loss of at most ``baseline + within * abs(baseline)``. It gets a state dict (names, aliases too, to
        tensors in their own dtypes, which it may change) and returns a number.
    within
        Share of the baseline's loss that may be added.
    evaluations
        How often ``evaluate`` may be called.
    include, exclude
        Globs of names: floating-point tensors that match are quantised, or kept exactly. By default weights and biases
        are quantised; norms, statistics and other buffers aren't.
    root, count, skip, partial
        What of the source is written; see `open_weights` and `kcomplex.describe`.
    jobs
        Threads that quantise and encode; the result doesn't depend on them.
    progress
        Called after each trial with the number of trials so far, and the trial's loss, error or bits.

    Returns
    -------
    Quantisation
        The decoded file holds the very weights that ``loss`` and ``distortion`` were measured on.

    Raises
    ------
    SpecError
        Not exactly one wish, a wish that makes no sense, or an estimator without a step.
    WeightsError
        No step meets the wish; a tensor holds NaN or infinity; the baseline's loss isn't finite.
    KComplexError
        The source can't be read, or the file can't be written.

    Notes
    -----
    The steps are in proportion to one global step, found by bisection: equal steps, which are best for the squared
    error, and steps relative to each tensor's root mean square. For a loss, each tensor's step is then made wider or
    narrower by the bits that it saves and the loss that it adds, and the tensors are coarsened one by one.
    """
    code = _searchable(estimator)
    _check_wishes(mse, bits, evaluate, within, evaluations)
    thread_count(jobs)
    choices: Choices = {"root": root, "count": as_patterns(count), "skip": as_patterns(skip)}
    with opened(source, partial, **choices) as weights:
        # Before the search, which takes long.
        output_path(path, source, weights.source)
        trials = Trials(source, choices, weights, code, _names(weights, code, include, exclude), jobs, progress)
        if evaluate is not None:
            outcome, baseline, limit = trials.by_loss(evaluate, within, evaluations)
            told = _written(path, trials, outcome.steps)
            return replace(told, loss=outcome.loss, baseline=baseline, limit=limit, evaluations=trials.count)
        if mse is not None:
            return _written(path, trials, trials.by_error(mse))
        assert bits is not None
        return _written(path, trials, trials.by_length(bits))


def _written(path: str | os.PathLike[str], trials: Trials, steps: Steps) -> Quantisation:
    code = trials.code_with(steps)
    size = encode(trials.source, path, code, jobs=trials.jobs, partial=True, **trials.choices)
    with Container(path) as container:
        errors = container.notes.inexact
        tensors = tuple(
            SteppedTensor(
                name := entry.names[0],
                entry.shape,
                math.prod(entry.shape),
                steps.get(name if entry.original is None else container.entries[entry.original].names[0]),
                8 * entry.length,
                errors.get(name, 0.0),
            )
            for entry in container.entries
        )
    elements, quantised = trials.weights.elements, trials.quantised_weights
    distortion = sum(errors.values()) / quantised
    return Quantisation(code.spec, trials.global_step(steps), tensors, elements, 8 * size, quantised, distortion)


def _names(
    weights: Weights, code: QuantisedCode, include: str | Iterable[str], exclude: str | Iterable[str]
) -> frozenset[str]:
    """Return the names of the tensors that are to be quantised.

    Raises
    ------
    WeightsError
        There is none, or a pattern matches no tensor of floats.
    """
    floats = [handle for handle in weights.values() if is_quantisable(handle.dtype) and handle.elements]
    chosen = Weights(floats, source=weights.source).select(include, exclude)
    found = [name for name, handle in chosen.items() if include or code.quantises(handle)]
    if not found:
        raise WeightsError(f"{weights.source}: there is no floating-point tensor to quantise")
    return frozenset(found)


def _searchable(estimator: str | Estimator) -> QuantisedCode:
    code = build_estimator(estimator)
    if not isinstance(code, QuantisedCode):
        raise SpecError(f"{code.spec!r} isn't a quantiser and a coder: write for example {DEFAULT_ESTIMATOR!r}")
    quantiser: Any = code.quantiser
    if not any(field.name == "step" for field in dataclasses.fields(quantiser)):
        raise SpecError(f"the quantiser {code.quantiser.name!r} has no option 'step' to search for: use 'grid'")
    return code


def _check_wishes(
    mse: float | None, bits: float | None, evaluate: Evaluate | None, within: float, evaluations: int
) -> None:
    if sum(wish is not None for wish in (mse, bits, evaluate)) != 1:
        raise SpecError("give exactly one of mse, bits and evaluate: it decides how coarse the weights become")
    numbers = {"mse": mse, "bits": bits, "within": within, "evaluations": evaluations}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise SpecError(f"{name} is a number, not {value!r:.80}")
    if evaluate is not None and not callable(evaluate):
        raise SpecError(f"evaluate is a function of a state dict, not {evaluate!r:.80}")
    for name, value in (("mse", mse), ("bits", bits)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SpecError(f"{name} must be above 0 and finite, not {value}")
    if not (math.isfinite(within) and within >= 0):
        raise SpecError(f"within is a share of the baseline's loss, 0 or above, not {within}")
    if evaluations < 2:
        raise SpecError(f"evaluations must be at least 2 (the baseline and one trial), not {evaluations}")
