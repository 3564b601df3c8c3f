"""Block decomposition method: the proxy for algorithmic complexity that the MoMos paper reports.

Strings of 12 bits are looked up in a table of their algorithmic complexity, estimated by the coding theorem method
(Soler-Toscano, Zenil, Delahaye and Gauvrit, "Calculating Kolmogorov complexity from the output frequency
distributions of small Turing machines", PLoS ONE 9, 2014), and added up (Zenil, Hernández-Orozco, Kiani,
Soler-Toscano, Rueda-Toicen and Tegnér, "A decomposition method for global evaluation of Shannon entropy and local
estimations of algorithmic complexity", Entropy 20, 2018). The table, ``ctm_b2_d12.npz``, holds the values of the
package pybdm (Szymon Talaga, MIT licence).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import WeightsError
from kcomplex.estimators.description import Description, Kind, TensorDescription
from kcomplex.estimators.estimator import Estimator, Progress, assemble
from kcomplex.weights import TensorHandle, Weights, dtype_name

from .segments import value_segments

STRING_BITS = 12


@dataclass(frozen=True)
class Bdm(Estimator):
    """One-dimensional BDM of the weights' signs; a proxy.

    The bits ``w > 0`` of all weights, tensors in the order of their names and each in C order, are cut into strings
    of 12, across the borders of tensors; an incomplete last one is dropped. The value is the sum over the distinct
    strings of their tabulated complexity and of log2 of how often they occur. A complex weight gives two bits; NaN
    and zeros of either sign give 0.

    The row of a tensor is the BDM of that tensor alone, 0 where it has fewer than 12 weights; rows don't sum to the
    whole.

    Notes
    -----
    It bounds nothing. Being blind to magnitudes, it can't see what quantisation or repeated blocks save; and since
    there are only 4,096 strings it saturates: random signs cost 0.53 bits a weight in a network of 270,000 weights,
    0.15 in one of a million and 0.03 in one of five million. Report it next to a code.
    """

    name: ClassVar[str] = "bdm"

    @property
    def kind(self) -> Kind:
        """``proxy``."""
        return "proxy"

    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description; its parts are the strings' complexity and their multiplicity.

        Tensors are read one after the other whatever ``jobs`` says: reading takes longer than counting.

        Raises
        ------
        WeightsError
            There are fewer than 12 weights.
        """
        start = time.perf_counter()
        whole = _StringCounter()
        tensors = []
        for handle in weights.values():
            alone = _StringCounter()
            for bits in _signs(handle):
                whole.add(bits)
                alone.add(bits)
            tensors.append(_row(handle, sum(_complexity(alone.counts))))
            if progress is not None:
                progress(handle)
        if not whole.counts.any():
            raise WeightsError(
                f"{weights.source}: BDM needs {STRING_BITS} weights or more, and there are {weights.elements}"
            )
        table, multiplicity = _complexity(whole.counts)
        return assemble(self, weights, tensors, {"table": table, "multiplicity": multiplicity}, start)


class _StringCounter:
    """Counts the strings of a sequence of bits that comes in pieces."""

    def __init__(self) -> None:
        self.counts = np.zeros(1 << STRING_BITS, np.int64)
        self._rest = np.zeros(0, np.bool_)

    def add(self, bits: NDArray[np.bool_]) -> None:
        """Count the strings that these further bits complete."""
        if self._rest.size:
            missing = min(STRING_BITS - self._rest.size, bits.size)
            self._rest = np.concatenate([self._rest, bits[:missing]])
            bits = bits[missing:]
            if self._rest.size < STRING_BITS:
                return
            self.counts += count_strings(self._rest)
        whole = bits.size - bits.size % STRING_BITS
        self.counts += count_strings(bits[:whole])
        self._rest = bits[whole:].copy()


def count_strings(bits: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how often each of the 4,096 strings occurs among consecutive ones; the first bit is the highest."""
    strings = bits.size // STRING_BITS
    packed = np.packbits(bits[: strings * STRING_BITS])
    # Three bytes hold two strings.
    triples = np.concatenate([packed, np.zeros(-packed.size % 3, np.uint8)]).reshape(-1, 3).astype(np.uint16)
    strings_seen = np.empty((triples.shape[0], 2), np.uint16)
    strings_seen[:, 0] = triples[:, 0] << 4 | triples[:, 1] >> 4
    strings_seen[:, 1] = (triples[:, 1] & 15) << 8 | triples[:, 2]
    return np.bincount(strings_seen.reshape(-1)[:strings], minlength=1 << STRING_BITS)


@cache
def complexity_table() -> NDArray[np.float64]:
    """Return the estimated complexity of each string in bits, by the number that it reads as, first bit highest."""
    with np.load(Path(__file__).with_name("ctm_b2_d12.npz"), allow_pickle=False) as stored:
        table: NDArray[np.float64] = stored["ctm"]
    return table


def _complexity(counts: NDArray[np.int64]) -> tuple[float, float]:
    """Return the sums over distinct strings of tabulated complexity and of log2 of their number."""
    distinct = counts > 0
    return float(complexity_table()[distinct].sum()), float(np.log2(counts[distinct]).sum())


def _signs(handle: TensorHandle) -> Iterator[NDArray[np.bool_]]:
    for values in value_segments(handle):
        yield values.reshape(-1) > 0


def _row(handle: TensorHandle, value: float) -> TensorDescription:
    return TensorDescription(
        handle.name, handle.shape, dtype_name(handle.dtype), handle.elements, 8 * handle.nbytes, value
    )
