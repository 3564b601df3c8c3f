"""Lloyd: a codebook of numbers fitted to the values, by their error alone or by error and bits together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.pieces import values_of_pieces
from kcomplex.estimators.structure import Reader
from kcomplex.estimators.symbols import Shape
from kcomplex.machine.compiled import compiled
from kcomplex.weights import TensorHandle

from ..tables.codebook import pack_codebook, sorted_rows, unpack_codebook
from .scales import Values, bounded

Floats: TypeAlias = NDArray[np.float64]

# Codebooks are fitted to evenly spaced values of about this number; fits end where they gain less than this share.
_FITTED = 1 << 22
_GAIN = 1e-7
_MOST_ITERATIONS = 500
_CELLS = 1 << 12
# Along the rate-distortion curve at high rates a bit is worth so many times the squared error.
_SLOPE = 2 * math.log(2)
# After so many passes the values have settled on the levels that are cheap because they are used.
_PASSES = 4


@dataclass(frozen=True)
class Lloyd(Quantiser):
    """Replaces every value by a level of a codebook, fitted by Lloyd's iteration.

    Codes are positions in the codebook in ascending order, counted from the level nearest to zero.

    Parameters
    ----------
    k
        Levels, 1 to 32,768; fewer where they aren't used. With no more than k distinct values nothing is lost.
    price
        Of a bit, relative to the slope of the rate-distortion curve at high rates; 0 minds the error alone. The higher
        the price, the fewer levels stay and the more values share the cheap ones.
    shared
        Whether all tensors share one codebook instead of having one each.

    Raises
    ------
    SpecError
        A value is out of range.

    Notes
    -----
    A level takes at most 4 bytes, for float64 tensors 8; a shared codebook is one of float64 where such a tensor is
    among those that it is fitted to.

    References
    ----------
    S. P. Lloyd: Least squares quantization in PCM. IEEE Transactions on Information Theory 28, 1982. P. A. Chou,
    T. Lookabaugh, R. M. Gray: Entropy-constrained vector quantization. IEEE Transactions on Acoustics, Speech and
    Signal Processing 37, 1989 (with a price).
    """

    k: int = 16
    price: float = 0.0
    shared: bool = False
    name: ClassVar[str] = "lloyd"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 1 << 15:
            raise SpecError(f"lloyd: k must be 1 to 32768, not {self.k}")
        if not (math.isfinite(self.price) and self.price >= 0):
            raise SpecError(f"lloyd: price must be 0 or above and finite, not {self.price}")

    def fit(self, tensors: Iterable[TensorHandle]) -> bytes:
        """Return the width of a value and the codebook that all tensors share; nothing where each has its own."""
        handles = [handle for handle in tensors if handle.elements] if self.shared else []
        if not handles:
            return b""
        stride = _stride(sum(handle.elements for handle in handles))
        samples = [sample for handle in handles for sample in _samples(values_of_pieces(handle), stride)]
        values = np.concatenate([sample[np.isfinite(sample)] for sample in samples])
        return bytes([values.dtype.itemsize]) + pack_codebook(self._codebook(values))

    def side_of_pieces(self, elements: int, pieces: Callable[[], Iterable[Values]]) -> bytes | None:
        """Return the codebook of the whole; None where all tensors share one."""
        if self.shared:
            return None
        return pack_codebook(self._codebook(np.concatenate(list(_samples(pieces(), _stride(elements))))))

    def quantise(self, values: Values, shared: bytes) -> Quantised:
        """Return symbols in the values' shape, and the codebook where it isn't shared; see `Quantiser.quantise`."""
        side = b"" if self.shared else pack_codebook(self._codebook(values.reshape(-1)[:: _stride(values.size)]))
        return self.quantise_piece(values, shared, side)

    def quantise_piece(self, values: Values, shared: bytes, side: bytes) -> Quantised:
        """Return symbols in the values' shape, and the codebook as it is; see `Quantiser.quantise_piece`."""
        levels = self._levels(side, values.dtype, shared)
        if not (levels.size and values.size):
            return Quantised(np.zeros(values.shape, _signed_dtype(levels.size)), side)
        scale = float(np.abs(levels).max()) or 1.0
        flat, fitted = values.reshape(-1).astype(np.float64) / scale, levels.astype(np.float64) / scale
        places = np.searchsorted((fitted[1:] + fitted[:-1]) / 2, flat)
        # Between neighbours of vastly smaller magnitude than the largest, the middle is rounded to one of them.
        equal = np.minimum(np.searchsorted(levels, values.reshape(-1)), levels.size - 1)
        places = np.where(levels[equal] == values.reshape(-1), equal, places)
        if self.price:
            weight = self.price * _SLOPE * float(np.square(flat - fitted[places]).mean())
            for _ in range(_PASSES):
                used, edges = _cells(fitted, _penalties(np.bincount(places, minlength=fitted.size), weight))
                places = used[np.searchsorted(edges, flat)]
        symbols = (places - np.abs(levels).argmin()).astype(_signed_dtype(levels.size))
        return Quantised(symbols.reshape(values.shape), side)

    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the levels that the symbols name; see `Quantiser.reconstruct`."""
        levels = self._levels(quantised.side, dtype, shared)
        require_forms(self.name, [quantised.symbols], [(shape, _signed_dtype(levels.size))])
        if not quantised.symbols.size:
            return np.zeros(shape, dtype)
        if not levels.size:
            raise StreamError("there are symbols and no level that they could stand for: the stream is corrupted")
        places = quantised.symbols.astype(np.int64) + np.abs(levels).argmin()
        if places.min() < 0 or places.max() >= levels.size:
            raise StreamError(f"a symbol is beyond the {levels.size} levels of its codebook: the stream is corrupted")
        return np.asarray(levels[places]).reshape(shape)

    def _codebook(self, values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return the levels fitted to flat values, in a column and in the order in which their table is short."""
        ordered = np.sort(values + 0.0)
        distinct = ordered[np.flatnonzero(np.diff(ordered, prepend=np.nan))]
        if distinct.size <= (1 if self.price else self.k):
            levels = distinct
        else:
            scale = float(max(-ordered[0], ordered[-1])) or 1.0
            fitted = _fitted(ordered.astype(np.float64) / scale, self.k, self.price)
            levels = np.unique((fitted * scale).astype(values.dtype))
        return sorted_rows(levels.reshape(-1, 1))

    def _levels(self, side: bytes, dtype: np.dtype[Any], shared: bytes) -> NDArray[np.floating[Any]]:
        """Return the levels in ascending order.

        Raises
        ------
        StreamError
            The codebook is truncated or corrupted.
        """
        reader, written = Reader(side), dtype
        if self.shared:
            if side:
                raise StreamError("a tensor has a codebook though all share one: the stream is corrupted")
            if not shared:
                return np.zeros(0, dtype)
            reader = Reader(shared)
            width = reader.take(1)[0]
            if width not in (4, 8):
                raise StreamError(f"a codebook of floats of {width} bytes: the stream is corrupted")
            written = np.dtype(f"f{width}")
        levels = unpack_codebook(reader, 1, written).reshape(-1)
        if reader.left or levels.size > 1 << 15 or not np.isfinite(levels).all():
            raise StreamError("a codebook is too long, or holds NaN or infinity: the stream is corrupted")
        with np.errstate(over="ignore"):
            return np.sort(bounded(levels.astype(dtype)) + 0.0)


def _stride(size: int) -> int:
    return max(1, size // _FITTED)


def _samples(pieces: Iterable[Values], stride: int) -> Iterator[Values]:
    """Yield what each piece of a flat tensor has of its values at every so many places."""
    start = 0
    for values in pieces:
        yield values.reshape(-1)[-start % stride :: stride].copy()
        start += values.size


def _signed_dtype(levels: int) -> np.dtype[np.signedinteger[Any]]:
    return np.dtype(np.int8 if levels <= 128 else np.int16)


def _fitted(ordered: Floats, k: int, price: float) -> Floats:
    """Return at most ``k`` levels for values of magnitude up to 1 in ascending order."""
    levels, error = _iterated(ordered, _start(ordered, k), 0.0)
    return _iterated(ordered, levels, price * _SLOPE * error)[0] if price else levels


def _start(ordered: Floats, k: int) -> Floats:
    """Return levels as dense as the cube root of the values' density, which is best for many levels."""
    edges = np.linspace(ordered[0], ordered[-1], _CELLS + 1)
    counts = np.diff(np.searchsorted(ordered, edges[1:-1]), prepend=0, append=ordered.size)
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
    levels: Floats = np.interp((np.arange(k) + 0.5) / k * mass[-1], mass, edges)
    return np.unique(levels)


def _iterated(ordered: Floats, levels: Floats, weight: float) -> tuple[Floats, float]:
    """Return levels after Lloyd's iteration has settled, and their mean squared error."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    power = float(np.square(ordered).sum())
    penalties, before = np.zeros(levels.size), math.inf
    for _ in range(_MOST_ITERATIONS):
        _, edges = _cells(levels, penalties)
        cuts = np.concatenate([[0], np.searchsorted(ordered, edges, side="right"), [ordered.size]])
        filled = np.diff(cuts) > 0
        starts, stops = cuts[:-1][filled], cuts[1:][filled]
        counts = stops - starts
        levels = (sums[stops] - sums[starts]) / counts
        penalties = _penalties(counts, weight)
        error = max(power - float((counts * np.square(levels)).sum()), 0.0) / ordered.size
        total = error + float((counts * penalties).sum()) / ordered.size
        if total >= before * (1 - _GAIN):
            break
        before = total
    return levels, error


def _penalties(counts: NDArray[np.integer[Any]], weight: float) -> Floats:
    """Return the price of each level; infinity for one that isn't used."""
    if not weight:
        return np.zeros(counts.size)
    with np.errstate(divide="ignore"):
        penalties: Floats = weight * (np.log2(counts.sum()) - np.log2(counts))
    return penalties


@compiled
def _cells(levels: Floats, penalties: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Return which of ascending levels are worth their penalty somewhere, and the edges between their cells.

    A level's squared error and penalty, less the square of the value, is a straight line over the values: the cells are
    those of the lower envelope of the lines.
    """
    used, edges = np.empty(levels.size, np.int64), np.empty(levels.size)
    count = 0
    for place in range(levels.size):
        if penalties[place] == np.inf:
            continue
        edge = -np.inf
        while count:
            last = used[count - 1]
            distance = levels[place] - levels[last]
            edge = (levels[place] + levels[last]) / 2 + (penalties[place] - penalties[last]) / (2 * distance)
            if count == 1 or edge > edges[count - 1]:
                break
            count -= 1
        used[count], edges[count] = place, edge
        count += 1
    return used[:count], edges[1:count]
