"""Dead zone: a uniform quantiser whose zero bin is as wide as the wanted share of zeros asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.symbols import Shape

from .scales import Values, bounded, largest_magnitude, ordered_magnitude, pack_scales, row_count, rows, unpack_scales
from .uniform import signed_dtype, within


@dataclass(frozen=True)
class DeadZone(Quantiser):
    """Sets what is small to zero and spreads ``q = 2**(bits - 1) - 1`` levels of each sign over the rest.

    Magnitudes below a threshold t become zero. The range from t to the largest magnitude is cut in q bins of one step
    s, and a code j stands for the middle of its bin, ``t + (j - 1/2) s``. What is exactly zero stays zero.

    Parameters
    ----------
    bits
        Bits a symbol, 2 to 16. The symbols are int8 up to 8 bits, else int16.
    zeros
        Share of each tensor's values that become zero, from 0 to below 1: t is that quantile of the magnitudes. The
        share is met from below; values that equal t are kept. None makes the zero bin as wide as the others
        (``2 t = s``).
    per_row
        A threshold and a step for each row of the first axis instead of one a tensor. Tensors with fewer than two axes
        keep one.

    Raises
    ------
    SpecError
        A value is out of range.

    Notes
    -----
    Threshold and step take 4 bytes each, for float64 tensors 8.

    References
    ----------
    G. J. Sullivan: Efficient scalar quantization of exponential and Laplacian random variables. IEEE Transactions on
    Information Theory 42, 1996.
    """

    bits: int = 4
    zeros: float | None = 0.7
    per_row: bool = False
    name: ClassVar[str] = "deadzone"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise SpecError(f"deadzone: bits must be 2 to 16, not {self.bits}")
        if self.zeros is not None and not 0 <= self.zeros < 1:
            raise SpecError(f"deadzone: zeros must be from 0 to below 1, or None, not {self.zeros}")

    @property
    def top(self) -> int:
        """The largest symbol."""
        return int(2 ** (self.bits - 1) - 1)

    def side_of_pieces(self, elements: int, pieces: Callable[[], Iterable[Values]]) -> bytes | None:
        """Return threshold and step of the whole; None where rows have their own."""
        if self.per_row:
            return None
        largest = largest_magnitude(pieces())
        threshold = largest if self.zeros is None else ordered_magnitude(pieces, self._rank(elements))
        return pack_scales(self._edges(np.array([largest]), np.array([threshold])))

    def quantise(self, values: Values, shared: bytes) -> Quantised:
        """Return symbols in the values' shape, and threshold and step; see `Quantiser.quantise`."""
        return self.quantise_piece(values, shared, pack_scales(self._bins(np.abs(rows(values, self.per_row)))))

    def quantise_piece(self, values: Values, shared: bytes, side: bytes) -> Quantised:
        """Return symbols in the values' shape, and threshold and step as they are; see `Quantiser.quantise_piece`."""
        table = rows(values, self.per_row)
        magnitudes = np.abs(table)
        bins = unpack_scales(side, 2 * len(table), values.dtype).reshape(-1, 2)
        threshold, step = bins[:, :1], bins[:, 1:]
        # Without a step all values that are kept equal the threshold: the first bin is theirs.
        numbers = np.floor((magnitudes - threshold) / np.where(step == 0, np.inf, step)) + 1
        symbols = np.where(magnitudes < threshold, 0, np.sign(table) * np.clip(numbers, 1, self.top))
        return Quantised(symbols.astype(signed_dtype(self.bits)).reshape(values.shape), side)

    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the middles of the bins; see `Quantiser.reconstruct`."""
        require_forms(self.name, [quantised.symbols], [(shape, signed_dtype(self.bits))])
        bins = unpack_scales(quantised.side, 2 * row_count(shape, self.per_row), dtype).reshape(-1, 2)
        threshold, step = bins[:, :1], bins[:, 1:]
        symbols = rows(within(quantised.symbols, self.top).astype(dtype), self.per_row)
        with np.errstate(over="ignore"):
            levels: Values = (np.abs(symbols) - 0.5) * step + threshold
        values: Values = bounded(levels) * np.sign(symbols) + 0.0
        return values.reshape(shape)

    def _bins(self, magnitudes: Values) -> Values:
        """Return threshold and step of each row."""
        if not magnitudes.size:
            return np.zeros((len(magnitudes), 2), magnitudes.dtype)
        largest = threshold = magnitudes.max(axis=1)
        if self.zeros is not None:
            rank = self._rank(magnitudes.shape[1])
            threshold = np.partition(magnitudes, rank, axis=1)[:, rank]
        return self._edges(largest, threshold)

    def _rank(self, length: int) -> int:
        """Return the place of the threshold among as many ordered magnitudes."""
        assert self.zeros is not None
        return min(int(self.zeros * length), length - 1)

    def _edges(self, largest: Values, threshold: Values) -> Values:
        """Return threshold and step of rows, given their largest magnitudes, and thresholds for a share of zeros."""
        step = largest / (self.top + 0.5) if self.zeros is None else (largest - threshold) / self.top
        return np.stack([step / 2 if self.zeros is None else threshold, step], axis=1).astype(largest.dtype)
