"""Sign: one bit a weight, and the mean magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.symbols import Shape

from .scales import pack_scales, row_count, rows, scaled, unpack_scales


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

    def quantise(self, values: NDArray[np.floating[Any]], shared: bytes) -> Quantised:
        """Return the signs in the values' shape, and the scales; see `Quantiser.quantise`."""
        magnitudes = np.abs(rows(values, self.per_row))
        largest = magnitudes.max(axis=1, initial=0, keepdims=True)
        # As shares of the largest the magnitudes can't overflow when they are added up.
        shares = magnitudes / np.where(largest == 0, 1, largest)
        means = shares.sum(axis=1, dtype=np.float64, keepdims=True) / max(magnitudes.shape[1], 1)
        scales = (means * largest).astype(values.dtype)
        return Quantised(np.asarray(values > 0).astype(np.uint8), pack_scales(scales))

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
