"""Grid: multiples of a given step, chosen by their error alone or by error and bits together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.symbols import Shape

from .rate_distortion import SHIFTS, choose_levels
from .scales import Values, bounded, pack_scales, unpack_scales
from .trellis import multiples_of
from .uniform import within

# A step that cuts the largest magnitude in more pieces than this would outdo the precision of float32.
_MOST_LEVELS = 1 << 22
_DTYPES: tuple[np.dtype[np.signedinteger[Any]], ...] = (np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.int32))
_NEAREST = 0.5
# Behind the step: the width of a code, and two shifts.
_TAIL = 3


@dataclass(frozen=True)
class Grid(Quantiser):
    """Turns values into multiples of a step; by default the path through a trellis with the least error and bits.

    Parameters
    ----------
    step
        Distance of neighbouring multiples, above 0, in every tensor. Where it is finer than a 2**22th of the tensor's
        largest magnitude, that is the step.
    trellis
        Whether each code's parity chooses between even and odd multiples for the next (see
        `kcomplex.compressors.quantisers.trellis`). At the same squared error a code then takes about 0.15 bits less.
    price
        Of a bit, relative to the slope of the rate-distortion curve at high rates: 1 is what theory asks for, 0 minds
        the error alone.
    contexts
        Whether prices follow the scales of rows and columns, as the coders do that learn them (`mix`, `lin`). Without
        it they are those of one table for the tensor, as of `entropy`.
    rounding
        Without trellis and price, from 0 to 0.5: ``floor(|w| / step + rounding)`` is the code's magnitude. Below 0.5
        zero's bin is wider than the others.

    Raises
    ------
    SpecError
        A value is out of range, or options exclude each other.

    Notes
    -----
    Each tensor's side information is its step (4 bytes, for float64 tensors 8), the width of its symbols and two
    shifts: how far symbols of magnitude 1, and those above, lie from their multiples, as the means of what they stand
    for do.
    """

    step: float = 0.01
    trellis: bool = True
    price: float = 1.0
    contexts: bool = True
    rounding: float = _NEAREST
    name: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step > 0):
            raise SpecError(f"grid: step must be above 0 and finite, not {self.step}")
        if not (math.isfinite(self.price) and self.price >= 0):
            raise SpecError(f"grid: price must be 0 or above and finite, not {self.price}")
        if not 0 <= self.rounding <= _NEAREST:
            raise SpecError(f"grid: rounding must be from 0 to 0.5, not {self.rounding}")
        if self.rounding != _NEAREST and (self.trellis or self.price):
            raise SpecError("grid: rounding needs trellis=False and price=0, which choose otherwise")

    def quantise(self, values: NDArray[np.floating[Any]], shared: bytes) -> Quantised:
        """Return symbols in the values' shape, and step, width and shifts; see `Quantiser.quantise`."""
        step = self._step(values)
        scaled = values.astype(np.float64) / float(step)
        if self.trellis or self.price:
            symbols, shifts = choose_levels(scaled, self.price, trellis=self.trellis, contexts=self.contexts)
        else:
            nearest = self.rounding == _NEAREST
            rounded = np.rint(scaled) if nearest else np.sign(scaled) * np.floor(np.abs(scaled) + self.rounding)
            symbols, shifts = rounded.astype(np.int32), np.zeros(2, np.int8)
        largest = int(np.abs(symbols).max(initial=0))
        width = next(width for width, dtype in enumerate(_DTYPES) if largest >> (8 * dtype.itemsize - 1) == 0)
        side = pack_scales(np.array([step])) + bytes([width]) + shifts.tobytes()
        return Quantised(np.asarray(symbols, _DTYPES[width]), side)

    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the multiples that the symbols stand for, moved by their shifts; see `Quantiser.reconstruct`."""
        step, width, shifts = _unpacked(quantised.side, dtype)
        require_forms(self.name, [quantised.symbols], [(shape, _DTYPES[width])])
        symbols = within(quantised.symbols, min(2 * _MOST_LEVELS, np.iinfo(_DTYPES[width]).max))
        multiples = multiples_of(symbols) if self.trellis else symbols
        moves = np.sign(symbols) * shifts[np.minimum(np.abs(symbols), 2)]
        with np.errstate(over="ignore"):
            products: Values = (multiples.astype(dtype) + moves.astype(dtype)) * step
        return np.asarray(bounded(products) + 0.0).reshape(shape)

    def _step(self, values: NDArray[np.floating[Any]]) -> np.floating[Any]:
        """Return the step as the values' dtype has it."""
        limits = np.finfo(values.dtype)
        finest = np.abs(values).max(initial=0) / values.dtype.type(_MOST_LEVELS)
        step = max(min(self.step, float(limits.max)), float(finest), float(limits.smallest_subnormal))
        return values.dtype.type(step)


def _unpacked(side: bytes, dtype: np.dtype[Any]) -> tuple[np.floating[Any], int, NDArray[np.float64]]:
    """Return step, width and shifts (of levels 0, 1 and above) in steps.

    Raises
    ------
    StreamError
        They aren't what a grid writes.
    """
    step = unpack_scales(side[:-_TAIL], 1, dtype)[0, 0]
    width = side[-_TAIL]
    if step == 0 or width >= len(_DTYPES):
        raise StreamError("a grid's step or width is out of range: the stream is corrupted")
    return step, width, np.concatenate([[0.0], np.frombuffer(side[-2:], np.int8) / SHIFTS])
