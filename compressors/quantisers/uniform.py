"""Uniform: a symmetric uniform quantiser whose top level is the largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.estimator import Layout, Quantised, Quantiser, Shape

from .scales import pack_scales, row_count, rows, scaled, unpack_scales


@dataclass(frozen=True)
class Uniform(Quantiser):
    """Rounds values to multiples of ``max|w| / q`` with ``q = 2**(bits - 1) - 1``, half to even.

    Parameters
    ----------
    bits
        Bits a code, 2 to 16: ``2 * q + 1`` levels. The codes are int8 up to 8 bits, else int16.
    per_row
        One scale for each row of the first axis instead of one a tensor. Tensors with fewer than two axes keep one.

    Raises
    ------
    SpecError
        The number of bits is out of range.

    Notes
    -----
    A scale takes 4 bytes, for float64 tensors 8. A tensor of zeros has the scale 0.
    """

    bits: int = 8
    per_row: bool = False
    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise SpecError(f"uniform: bits must be 2 to 16, not {self.bits}")

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def quantise(self, values: NDArray[np.floating[Any]], shared: bytes) -> Quantised:
        """Return codes in the values' shape, and the scales; see `Quantiser.quantise`."""
        table = rows(values, self.per_row)
        scales = np.abs(table).max(axis=1, initial=0, keepdims=True) / self.top
        # Where all is zero any step will do; this one spares the division by zero.
        steps = np.where(scales == 0, 1, scales)
        codes = np.clip(np.rint(table / steps), -self.top, self.top).astype(code_dtype(self.bits))
        return Quantised(codes.reshape(values.shape), pack_scales(scales))

    def layout(self, side: bytes, shape: Shape, dtype: np.dtype[Any], shared: bytes) -> Layout:
        """Return the values' shape and the codes' dtype; see `Quantiser.layout`."""
        unpack_scales(side, row_count(shape, self.per_row), dtype)
        return shape, code_dtype(self.bits)

    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the scale times the codes; see `Quantiser.reconstruct`."""
        scales = unpack_scales(quantised.side, row_count(shape, self.per_row), dtype)
        codes = within(quantised.codes, self.top)
        return scaled(rows(codes.astype(dtype), self.per_row), scales, shape)


def code_dtype(bits: int) -> np.dtype[np.signedinteger[Any]]:
    """Return the shortest dtype for signed codes of so many bits: int8 or int16."""
    return np.dtype(np.int8 if bits <= 8 else np.int16)


def within(codes: NDArray[np.integer[Any]], top: int) -> NDArray[np.integer[Any]]:
    """Return codes after checking that their magnitude is at most ``top``.

    Raises
    ------
    StreamError
        It isn't.
    """
    if codes.size and not (-top <= codes.min() and codes.max() <= top):
        raise StreamError(f"a code is beyond {top}, the largest of its quantiser: the stream is corrupted")
    return codes
