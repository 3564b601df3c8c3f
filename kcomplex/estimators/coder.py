"""What plug-ins implement: coders and code lengths of integers, and the stages before them.

Each is a frozen dataclass with a ``name``, registered under the entry-point group ``kcomplex.estimators``:

- `Coder`: integers to bytes and back, lossless. Implement ``encode`` and ``decode``.
- `CodeLength`: a length in bits of integers, without a stream (``ideal`` or ``proxy``). Implement ``length``.
- `Transform`: lossless, turns integers into other integers that a coder does better on (byte planes, palette).
- `Quantiser`: lossy, turns floats into integers and side information.

What measures whole weights by itself is an `Estimator`; what learns from tensor to tensor, a `Code`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcomplex.estimators.symbols import Shape, Symbols
from kcomplex.weights import TensorHandle


class Part(NamedTuple):
    """A piece of a stream under the name that its bits are counted by.

    Attributes
    ----------
    shares
        Where one piece tells several things at once (signs, magnitudes ...): the model's bits for each, by which the
        piece's own bits are divided among those names.
    """

    name: str
    data: bytes
    shares: Mapping[str, float] | None = None

    def bits(self) -> dict[str, float]:
        """Return the piece's bits by name; they sum to eight times its bytes."""
        bits = 8.0 * len(self.data)
        total = math.fsum(self.shares.values()) if self.shares else 0.0
        if not self.shares or total <= 0:
            return {self.name: bits}
        # Multiples of 1/1024 bit, so that sums over any number of pieces stay exact.
        divided = {name: round(1024 * bits * share / total) / 1024 for name, share in self.shares.items()}
        largest = max(divided, key=divided.__getitem__)
        divided[largest] += bits - math.fsum(divided.values())
        return divided


def size_of(parts: Iterable[Part]) -> int:
    """Return the bytes of a stream in parts."""
    return sum(len(part.data) for part in parts)


class Coder(ABC):
    """A lossless coder of integers: what stands last in a specification."""

    name: ClassVar[str]

    @abstractmethod
    def encode(self, symbols: Symbols) -> bytes:
        """Return a stream that gives back integers of any NumPy integer dtype and any shape."""

    @abstractmethod
    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers of a stream; shape and dtype are those of what was encoded.

        Raises
        ------
        StreamError
            The stream is truncated or corrupted.
        """

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return the stream cut into named parts; joined, they are what `encode` returns."""
        return [Part("payload", self.encode(symbols))]


class Transform(ABC):
    """A lossless stage: integers to side information and streams of other integers, and back."""

    name: ClassVar[str]

    @abstractmethod
    def split(self, symbols: Symbols) -> tuple[bytes, list[Symbols]]:
        """Return side information and the streams that the next stage encodes."""

    @abstractmethod
    def join(self, side: bytes, streams: list[Symbols], shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the symbols of a shape and dtype that `split` took apart.

        Raises
        ------
        StreamError
            Side information and streams (of which a damaged file may tell any number, shape and dtype) don't belong
            together.
        """

    def payload_names(self, streams: int) -> list[str]:
        """Return the name that the payload of each of so many streams is counted under."""
        return ["payload"] * streams


@dataclass(frozen=True)
class Quantised:
    """What a quantiser makes of a tensor.

    Attributes
    ----------
    symbols
        Integers for the coder, in any shape.
    side
        What the decoder needs besides (scales, flags), as bytes.
    """

    symbols: Symbols
    side: bytes = b""


class Quantiser(ABC):
    """A lossy stage: the values of a floating-point tensor to integers and side information.

    Integer and boolean tensors never reach a quantiser: they are coded losslessly.
    """

    name: ClassVar[str]

    @property
    def lossless(self) -> bool:
        """Whether nothing may be lost.

        Then values needn't be finite, and tensors that don't come back bit for bit (a half-precision NaN has more bits
        than its conversion keeps) are coded by the coder alone.
        """
        return False

    def fit(self, tensors: Iterable[TensorHandle]) -> bytes:
        """Return side information that all tensors share, learned from the tensors to be quantised; none by default."""
        return b""

    def divides(self, shared: bytes) -> bool:
        """Return whether long tensors may be quantised in pieces of whole rows; ``shared`` is what `fit` returned."""
        return True

    def side_of_pieces(self, elements: int, pieces: Callable[[], Iterable[NDArray[np.floating[Any]]]]) -> bytes | None:
        """Return the side information of all pieces of a long tensor; None, the default, where each has its own.

        What it returns is what `quantise_piece` then gets.

        Parameters
        ----------
        elements
            Of the whole tensor.
        pieces
            Yields the values of each piece, finite, whenever it is called.
        """
        return None

    @abstractmethod
    def quantise(self, values: NDArray[np.floating[Any]], shared: bytes) -> Quantised:
        """Return integers and side information of float32 or float64 values, finite unless `lossless`.

        Raises
        ------
        WeightsError
            The values can't be quantised.
        """

    def quantise_piece(self, values: NDArray[np.floating[Any]], shared: bytes, side: bytes) -> Quantised:
        """Return integers of a piece of a long tensor, and the side information that all its pieces have."""
        return self.quantise(values, shared)

    @abstractmethod
    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the values that the symbols stand for, in the given shape and dtype.

        Raises
        ------
        StreamError
            Symbols (of which a damaged file may tell any shape and dtype) and side information don't belong together.
        """
