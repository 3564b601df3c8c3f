"""Trials of steps: the tensors quantised with them, what they cost, and the search for those that meet a wish."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from kcomplex.errors import WeightsError
from kcomplex.estimators.code import divided
from kcomplex.estimators.duplicates import distinct_weights, duplicate
from kcomplex.estimators.pieces import handles_of, piece_limit
from kcomplex.estimators.quantised import (
    QuantisedCode,
    finite_values,
    quantised_pieces,
    quantised_tensor,
)
from kcomplex.kcz.container import Container, encode
from kcomplex.machine.parallel import in_order
from kcomplex.quantising.step_search import FINE, LossSearch, Outcome, Steps, boundary, length_probe, mean_square_probe
from kcomplex.quantising.stepped_code import SteppedCode, with_step
from kcomplex.sources.open import Choices, Source
from kcomplex.weights import TensorHandle, Weights

# Steps are sought between these logarithms to the base of 2: of a tensor's root mean square, and of its largest
# magnitude.
_FINEST, _COARSEST = -22.0, 2.0
_START = -2.0
_TRIAL = "trial.kcz"

Evaluate: TypeAlias = Callable[[dict[str, torch.Tensor]], Any]
Progress: TypeAlias = Callable[[int, float], None]


class Trials:
    """The tensors that are quantised, with what is measured of them.

    Parameters
    ----------
    names
        Of the tensors that are quantised.

    Attributes
    ----------
    quantised_weights
        How many weights they have.
    count
        How many trials there were.
    """

    def __init__(
        self,
        source: Source,
        choices: Choices,
        weights: Weights,
        code: QuantisedCode,
        names: frozenset[str],
        jobs: int,
        progress: Progress | None,
    ) -> None:
        self.source, self.choices, self.weights = source, choices, weights
        self.code = code = replace(code, names=names)
        self.names = names
        self.jobs, self.progress = jobs, progress
        # A tensor that is the same as an earlier one has its step, and costs nothing.
        own, self.originals = distinct_weights(weights, code.quantises)
        self.copies = Counter(original.name for original in self.originals.values())
        self.handles = [handle for handle in own.values() if code.quantises(handle)]
        self.sizes = {handle.name: handle.elements for handle in self.handles}
        self.shared = code.prepare(own)
        self.quantised_weights = sum(size * (1 + self.copies[name]) for name, size in self.sizes.items())
        self.count = 0
        self.kept: dict[str, tuple[float, torch.Tensor]] = {}
        largest, scales = {}, {}
        for handle in self.handles:
            most = norm = 0.0
            for piece in handles_of(handle, piece_limit(True)):
                values = finite_values(piece.read(), code.quantiser, handle).astype(np.float64)
                top = float(np.abs(values).max())
                # As shares of the largest, so that nothing overflows.
                values /= top or 1.0
                most, norm = (
                    max(most, top),
                    math.hypot(norm, top * math.sqrt(float(np.square(values, out=values).sum()))),
                )
            largest[handle.name], scales[handle.name] = most, norm / math.sqrt(handle.elements)
        top, total = max(scales.values()) or 1.0, sum(self.sizes.values())
        mean = top * math.sqrt(math.fsum((scales[name] / top) ** 2 * size / total for name, size in self.sizes.items()))
        self.equal = dict.fromkeys(self.sizes, mean or 1.0)
        self.relative = {name: scale or mean or 1.0 for name, scale in scales.items()}
        self.highest = max(
            max(math.log2(largest[name] / unit[name]) if largest[name] else 0.0 for name in self.sizes)
            for unit in (self.equal, self.relative)
        )
        self.highest += _COARSEST

    def by_error(self, limit: float) -> dict[str, float]:
        """Return the largest equal steps whose mean squared error is within a limit."""

        def error(place: float) -> float:
            steps = self._equal(place)

            def tensor_error(handle: TensorHandle) -> float:
                pieces = quantised_pieces(with_step(self.code, steps[handle.name]), handle, self.shared)
                return sum(piece.squared_error for piece in pieces) * (1 + self.copies[handle.name])

            return self._tell(sum(in_order(tensor_error, self.handles, self.jobs)) / self.quantised_weights)

        place = boundary(mean_square_probe(error, limit), _START, _FINEST, self.highest, FINE)
        if place is None:
            raise WeightsError(f"no step has a mean squared error of {limit:.6g}: use a lossless code")
        return self._equal(place)

    def by_length(self, limit: float) -> dict[str, float]:
        """Return the smallest equal steps whose bits a weight are within a limit."""
        with tempfile.TemporaryDirectory() as folder:

            def bits(fineness: float) -> float:
                steps = self._equal(-fineness)
                whole = self._bits(Path(folder), steps)
                with Container(Path(folder) / _TRIAL) as container:
                    kept = sum(entry.length for entry in container.entries if entry.names[0] not in self.names)
                return self._tell((whole - 8 * kept) / self.quantised_weights)

            fineness = boundary(length_probe(bits, limit), -_START, -self.highest, -_FINEST, FINE)
        if fineness is None:
            raise WeightsError(
                f"names, shapes and the coarsest step take more than {limit:.6g} bits a weight: allow more bits"
            )
        return self._equal(-fineness)

    def by_loss(self, evaluate: Evaluate, within: float, evaluations: int) -> tuple[Outcome, float, float]:
        """Return the outcome with the shortest code found, the baseline's loss, and the largest that was allowed."""

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
        return outcome, baseline, limit

    def _equal(self, place: float) -> dict[str, float]:
        return {name: unit * 2**place for name, unit in self.equal.items()}

    def _tell(self, number: float) -> float:
        self.count += 1
        if self.progress is not None:
            self.progress(self.count, number)
        return number

    def _quantised(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Return the quantised tensors; those whose step hasn't changed since the last call aren't made anew."""

        def quantise(handle: TensorHandle) -> tuple[float, torch.Tensor]:
            step = steps[handle.name]
            kept = self.kept.get(handle.name)
            if kept is not None and kept[0] == step:
                return kept
            return step, quantised_tensor(with_step(self.code, step), handle, self.shared)

        wanted = [handle for handle in self.handles if handle.name in steps]
        made = list(in_order(quantise, wanted, self.jobs))
        self.kept = {handle.name: item for handle, item in zip(wanted, made, strict=True)}
        return {name: quantised for name, (_, quantised) in self.kept.items()}

    def _state_dict(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Return all tensors, quantised where they have a step, as copies that a caller may change."""
        quantised = self._quantised(steps)
        tensors = {}
        for handle in self.weights.values():
            original = self.originals.get(handle.name)
            made = quantised.get(handle.name if original is None else original.name)
            if made is None:
                tensor = handle.read().detach().clone()
            else:
                tensor = duplicate(made, handle.shape, original is not None and original.transposed)
            tensors.update(dict.fromkeys((handle.name, *handle.aliases), tensor))
        return tensors

    def code_with(self, steps: Steps) -> SteppedCode:
        """Return the code with a step for each tensor."""
        return SteppedCode.of(with_step(self.code, self.global_step(steps)), steps)

    def global_step(self, steps: Steps) -> float:
        """Return the mean of steps, on a logarithmic scale and by number of weights."""
        octaves = math.fsum(self.sizes[name] * math.log2(step) for name, step in steps.items())
        # Few digits: the file tells this step too, and no tensor has it.
        return float(f"{2 ** (octaves / sum(self.sizes.values())):.4g}")

    def _bits(self, folder: Path, steps: Steps) -> float:
        path = folder / _TRIAL
        code = self.code_with(steps)
        return 8 * encode(self.source, path, code, jobs=self.jobs, partial=True, **self.choices)

    def _tensor_bits(self, name: str, step: float) -> float:
        code = with_step(self.code, step)
        memory, limit = code.memory(self.shared), piece_limit(code.divides(self.shared))
        return 8.0 * sum(own.encode(piece, memory).size for own, piece in divided(code, self.weights[name], limit))


def _number(loss: Any) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"the evaluation returned a {type(loss).__name__}, not a number") from error
