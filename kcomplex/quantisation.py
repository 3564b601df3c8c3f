"""Lossy codes as short as a wish allows: a mean squared error, a number of bits, or a loss that the user measures."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch

from kcomplex.container import Container, encode_file
from kcomplex.errors import SpecError, WeightsError
from kcomplex.estimator import Code, EncodedTensor, Estimator, Shape
from kcomplex.pipeline import QuantisedCode, QuantisedTensor, build_estimator, finite_values, is_quantisable
from kcomplex.step_search import (
    DEFAULT_ESTIMATOR,
    EVALUATIONS,
    FINE,
    WITHIN,
    LossSearch,
    Steps,
    boundary,
    length_probe,
    mean_square_probe,
)
from kcomplex.weights import Source, TensorHandle, Weights, open_weights

if TYPE_CHECKING:
    import pandas as pd

# Steps are sought between these logarithms to the base of 2: of a tensor's root mean square, and of its largest
# magnitude.
_FINEST, _COARSEST = -22.0, 2.0
_START = -2.0

Evaluate: TypeAlias = Callable[[dict[str, torch.Tensor]], Any]
Progress: TypeAlias = Callable[[int, float], None]


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
    """What `quantise_file` wrote, and how it was found.

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
    distortion
        Mean squared error a weight.
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
    distortion: float
    loss: float | None = None
    baseline: float | None = None
    limit: float | None = None
    evaluations: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file divided by the number of weights."""
        return self.bits / max(self.weights, 1)

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


@dataclass(frozen=True)
class SteppedCode(Code):
    """A quantised code with a step of its own for every tensor; what it writes is decoded by the plain code."""

    code: QuantisedCode
    steps: Steps
    name: ClassVar[str] = "stepped"

    @property
    def spec(self) -> str:
        """The plain code's."""
        return self.code.spec

    @property
    def full_spec(self) -> str:
        """The plain code's."""
        return self.code.full_spec

    @property
    def sequential(self) -> bool:
        """See `TensorwiseEstimator.sequential`."""
        return self.code.sequential

    def fresh(self) -> SteppedCode:
        """Return the same with a fresh coder; see `TensorwiseEstimator.fresh`."""
        return replace(self, code=self.code.fresh())

    def prepare(self, weights: Weights) -> bytes:
        """Return the plain code's shared side information."""
        return self.code.prepare(weights)

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the stream of a tensor quantised with its step."""
        step = self.steps.get(handle.name)
        code = self.code if step is None else with_step(self.code, step)
        return code.encode_tensor(handle, shared)

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor; see `Code.decode_tensor`."""
        return self.code.decode_tensor(data, dtype, shape, shared)


def with_step(code: QuantisedCode, step: float) -> QuantisedCode:
    """Return a code whose quantiser has another step."""
    quantiser: Any = code.quantiser
    return replace(code, quantiser=replace(quantiser, step=step))


def quantise_file(
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
        The wish: a mean squared error a weight of at most this.
    bits
        The wish: at most so many bits a weight, and the least error at that.
    evaluate
        The wish: a loss of at most ``baseline + within * abs(baseline)``. It gets a state dict (names, aliases too, to
        tensors in their own dtypes, which it may change) and returns a number.
    within
        Share of the baseline's loss that may be added.
    evaluations
        How often ``evaluate`` may be called.
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
    with nullcontext(source) if isinstance(source, Weights) else open_weights(source) as weights:
        search = _Search(source, weights, code, jobs, progress)
        if evaluate is not None:
            return search.by_loss(Path(path), evaluate, within, evaluations)
        if mse is not None:
            return search.by_error(Path(path), mse)
        assert bits is not None
        return search.by_length(Path(path), bits)


class _Search:
    """The tensors that are quantised, with what is measured of them."""

    def __init__(
        self, source: Source, weights: Weights, code: QuantisedCode, jobs: int, progress: Progress | None
    ) -> None:
        self.source, self.weights, self.code = source, weights, code
        self.jobs, self.progress = jobs, progress
        self.handles = [handle for handle in weights.values() if is_quantisable(handle.dtype) and handle.elements]
        if not self.handles:
            raise WeightsError(f"{weights.source}: there is no floating-point tensor to quantise")
        self.sizes = {handle.name: handle.elements for handle in self.handles}
        self.shared = code.prepare(weights)
        self.trials = 0
        self.kept: dict[str, tuple[float, QuantisedTensor]] = {}
        squares, largest = {}, {}
        for handle in self.handles:
            magnitudes = np.abs(finite_values(handle.read(), code.quantiser, handle).astype(np.float64))
            largest[handle.name] = float(magnitudes.max())
            # As shares of the largest, so that nothing overflows.
            shares = magnitudes / (largest[handle.name] or 1.0)
            squares[handle.name] = largest[handle.name] ** 2 * float(np.square(shares).mean())
        total = sum(self.sizes.values())
        mean = math.sqrt(sum(squares[name] * size for name, size in self.sizes.items()) / total) or 1.0
        self.equal = dict.fromkeys(self.sizes, mean)
        self.relative = {name: math.sqrt(square) or mean for name, square in squares.items()}
        self.highest = max(
            max(math.log2(largest[name] / unit[name]) if largest[name] else 0.0 for name in self.sizes)
            for unit in (self.equal, self.relative)
        )
        self.highest += _COARSEST

    def by_error(self, path: Path, limit: float) -> Quantisation:
        """Write the file with the largest step whose mean squared error is within a limit."""

        def error(place: float) -> float:
            quantised = self._quantised(self._equal(place))
            return self._tell(sum(item.squared_error for item in quantised.values()) / self.weights.elements)

        place = boundary(mean_square_probe(error, limit), _START, _FINEST, self.highest, FINE)
        if place is None:
            raise WeightsError(f"no step has a mean squared error of {limit:.6g}: use a lossless code")
        return self._written(path, self._equal(place))

    def by_length(self, path: Path, limit: float) -> Quantisation:
        """Write the file with the smallest step whose bits a weight are within a limit."""
        with tempfile.TemporaryDirectory() as folder:

            def bits(fineness: float) -> float:
                steps = self._equal(-fineness)
                return self._tell(self._bits(Path(folder), steps) / self.weights.elements)

            fineness = boundary(length_probe(bits, limit), -_START, -self.highest, -_FINEST, FINE)
        if fineness is None:
            raise WeightsError(
                f"names, shapes and the coarsest step take more than {limit:.6g} bits a weight: allow more bits"
            )
        return self._written(path, self._equal(-fineness))

    def by_loss(self, path: Path, evaluate: Evaluate, within: float, evaluations: int) -> Quantisation:
        """Write the shortest file found whose loss is within a share of the baseline's."""

        def loss(steps: Steps) -> float:
            return self._tell(_number(evaluate(self._state_dict(steps))))

        baseline = loss({})
        if not math.isfinite(baseline):
            raise WeightsError(f"the loss of the weights as they are is {baseline}: there is nothing to compare with")
        limit = baseline + within * abs(baseline)
        with tempfile.TemporaryDirectory() as folder:
            search = LossSearch(
                loss,
                lambda steps: self._bits(Path(folder), steps),
                self._tensor_bits,
                baseline,
                limit,
                evaluations - 1,
            )
            outcome = search.run([self.equal, self.relative], _FINEST, self.highest, _START, self.sizes)
        told = self._written(path, outcome.steps)
        return replace(told, loss=outcome.loss, baseline=baseline, limit=limit, evaluations=self.trials)

    def _equal(self, place: float) -> dict[str, float]:
        return {name: unit * 2**place for name, unit in self.equal.items()}

    def _tell(self, number: float) -> float:
        self.trials += 1
        if self.progress is not None:
            self.progress(self.trials, number)
        return number

    def _quantised(self, steps: Steps) -> dict[str, QuantisedTensor]:
        """Return the quantised tensors; those whose step hasn't changed since the last call aren't made anew."""

        def quantise(handle: TensorHandle) -> tuple[float, QuantisedTensor]:
            step = steps[handle.name]
            kept = self.kept.get(handle.name)
            if kept is not None and kept[0] == step:
                return kept
            return step, QuantisedTensor(with_step(self.code, step).quantiser, handle, self.shared)

        wanted = [handle for handle in self.handles if handle.name in steps]
        if self.jobs == 1 or len(wanted) < 2:
            made = [quantise(handle) for handle in wanted]
        else:
            from joblib import Parallel, delayed

            made = Parallel(n_jobs=self.jobs, prefer="threads")(delayed(quantise)(handle) for handle in wanted)
        self.kept = {handle.name: item for handle, item in zip(wanted, made, strict=True)}
        return {name: quantised for name, (_, quantised) in self.kept.items()}

    def _state_dict(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Return all tensors, quantised where they have a step, as copies that a caller may change."""
        quantised = self._quantised(steps)
        tensors = {}
        for handle in self.weights.values():
            made = quantised.get(handle.name)
            tensor = (handle.read() if made is None else made.decoded).detach().clone()
            tensors.update(dict.fromkeys((handle.name, *handle.aliases), tensor))
        return tensors

    def _code(self, steps: Steps) -> SteppedCode:
        return SteppedCode(with_step(self.code, self._global(steps)), steps)

    def _global(self, steps: Steps) -> float:
        octaves = math.fsum(self.sizes[name] * math.log2(step) for name, step in steps.items())
        # Few digits: the file tells this step too, and no tensor has it.
        return float(f"{2 ** (octaves / sum(self.sizes.values())):.4g}")

    def _bits(self, folder: Path, steps: Steps) -> float:
        return 8 * encode_file(self.source, folder / "trial.kcz", self._code(steps), jobs=self.jobs)

    def _tensor_bits(self, name: str, step: float) -> float:
        coded = with_step(self.code, step).fresh().encode_tensor(self.weights[name], self.shared)
        return 8.0 * len(coded.to_bytes())

    def _written(self, path: Path, steps: Steps) -> Quantisation:
        code = self._code(steps)
        size = encode_file(self.source, path, code, jobs=self.jobs)
        with Container(path) as container:
            errors = container.notes.inexact
            tensors = tuple(
                SteppedTensor(
                    name := entry.names[0],
                    entry.shape,
                    math.prod(entry.shape),
                    steps.get(name),
                    8 * entry.length,
                    errors.get(name, 0.0),
                )
                for entry in container.entries
            )
        elements = self.weights.elements
        return Quantisation(
            code.spec, self._global(steps), tensors, elements, 8 * size, sum(errors.values()) / max(elements, 1)
        )


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
    for name, value in (("mse", mse), ("bits", bits)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SpecError(f"{name} must be above 0 and finite, not {value}")
    if not (math.isfinite(within) and within >= 0):
        raise SpecError(f"within is a share of the baseline's loss, 0 or above, not {within}")
    if evaluations < 2:
        raise SpecError(f"evaluations must be at least 2 (the baseline and one trial), not {evaluations}")


def _number(loss: Any) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"the evaluation returned a {type(loss).__name__}, not a number") from error
