"""Uniform: a symmetric uniform quantiser whose top level is the largest magnitude."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.symbols import Shape

from .scales import Values, largest_magnitude, pack_scales, row_count, rows, scaled, unpack_scales


@dataclass(frozen=True)
class Uniform(Quantiser):
    """Rounds values to multiples of ``max|w| / q`` with ``q = 2**(bits - 1) - 1``, half to even.

    Parameters
    ----------
    bits
        Bits a symbol, 2 to 16: ``2 * q + 1`` levels. The symbols are int8 up to 8 bits, else int16.
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
        """The largest symbol."""
        return int(2 ** (self.bits - 1) - 1)

    def side_of_pieces(self, elements: int, pieces: Callable[[], Iterable[Values]]) -> bytes | None:
        """Return the scale of the whole; None where rows have their own."""
        return None if self.per_row else pack_scales(largest_magnitude(pieces()) / self.top)

    def quantise(self, values: Values, shared: bytes) -> Quantised:
        """Return symbols in the values' shape, and the scales; see `Quantiser.quantise`."""
        scales = np.abs(rows(values, self.per_row)).max(axis=1, initial=0) / self.top
        return self.quantise_piece(values, shared, pack_scales(scales))

    def quantise_piece(self, values: Values, shared: bytes, side: bytes) -> Quantised:
        """Return symbols in the values' shape, and the scales as they are; see `Quantiser.quantise_piece`."""
        table = rows(values, self.per_row)
        scales = unpack_scales(side, len(table), values.dtype)
        # Where all is zero any step will do; this one spares the division by zero.
        steps = np.where(scales == 0, 1, scales)
        symbols = np.clip(np.rint(table / steps), -self.top, self.top).astype(signed_dtype(self.bits))
        return Quantised(symbols.reshape(values.shape), side)

    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the scale times the symbols; see `Quantiser.reconstruct`."""
        require_forms(self.name, [quantised.symbols], [(shape, signed_dtype(self.bits))])
        scales = unpack_scales(quantised.side, row_count(shape, self.per_row), dtype)
        symbols = within(quantised.symbols, self.top)
        return scaled(rows(symbols.astype(dtype), self.per_row), scales, shape)


def signed_dtype(bits: int) -> np.dtype[np.signedinteger[Any]]:
    """Return the shortest dtype for signed symbols of so many bits: int8 or int16."""
    return np.dtype(np.int8 if bits <= 8 else np.int16)


def within(symbols: NDArray[np.integer[Any]], top: int) -> NDArray[np.integer[Any]]:
    """Return symbols after checking that their magnitude is at most ``top``.

    Raises
    ------
    StreamError
        It isn't.
    """
    if symbols.size and not (-top <= symbols.min() and symbols.max() <= top):
        raise StreamError(f"a symbol is beyond {top}, the largest of its quantiser: the stream is corrupted")
    return symbols
