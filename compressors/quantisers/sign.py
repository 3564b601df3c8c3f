"""Sign: one bit a weight, and the mean magnitude."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.symbols import Shape

from .scales import Values, largest_magnitude, pack_scales, row_count, rows, scaled, unpack_scales


@dataclass(frozen=True)
class Sign(Quantiser):
    """Replaces every value by plus or minus the mean magnitude, which of all scales leaves the least squared error.

    The symbols are 1 for positive values, else 0, one byte each: the coder makes one bit of them. A zero counts as
    negative and comes back as minus the scale, unless all values are zero: then the scale is 0.

    Parameters
    ----------
    per_row
        One scale for each row of the first axis instead of one a tensor. Tensors with fewer than two axes keep one.

    Notes
    -----
    A scale takes 4 bytes, for float64 tensors 8.

    References
    ----------
    M. Courbariaux, Y. Bengio, J.-P. David: BinaryConnect. NIPS 2015. M. Rastegari et al.: XNOR-Net. ECCV 2016, section
    3.1 (the scale).
    """

    per_row: bool = False
    name: ClassVar[str] = "sign"

    def side_of_pieces(self, elements: int, pieces: Callable[[], Iterable[Values]]) -> bytes | None:
        """Return the scale of the whole; None where rows have their own."""
        if self.per_row:
            return None
        largest = largest_magnitude(pieces())
        sums = [_shares(rows(values, False), largest) for values in pieces()]
        return pack_scales((np.sum(sums) / elements * largest).astype(largest.dtype))

    def quantise(self, values: Values, shared: bytes) -> Quantised:
        """Return the signs in the values' shape, and the scales; see `Quantiser.quantise`."""
        table = rows(values, self.per_row)
        largest = np.abs(table).max(axis=1, initial=0, keepdims=True)
        scales = _shares(table, largest) / max(table.shape[1], 1) * largest
        return self.quantise_piece(values, shared, pack_scales(scales.astype(values.dtype)))

    def quantise_piece(self, values: Values, shared: bytes, side: bytes) -> Quantised:
        """Return the signs in the values' shape, and the scales as they are; see `Quantiser.quantise_piece`."""
        return Quantised(np.asarray(values > 0).astype(np.uint8), side)

    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return plus or minus the scale; see `Quantiser.reconstruct`."""
        require_forms(self.name, [quantised.symbols], [(shape, np.dtype(np.uint8))])
        scales = unpack_scales(quantised.side, row_count(shape, self.per_row), dtype)
        if quantised.symbols.size and quantised.symbols.max() > 1:
            raise StreamError(f"{quantised.symbols.max()} isn't a sign: the stream is corrupted")
        signs = rows(quantised.symbols.astype(dtype), self.per_row) * 2 - 1
        return scaled(signs, scales, shape)


def _shares(table: Values, largest: Values) -> Values:
    """Return the sum of each row's magnitudes as shares of the largest, which can't overflow."""
    shares = np.abs(table) / np.where(largest == 0, 1, largest)
    sums: Values = shares.sum(axis=1, dtype=np.float64, keepdims=True)
    return sums
