"""The tight codes: `mix` mixes predictions of every binary decision, `lin` predicts each weight from others as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kcomplex.estimators.estimator import Coder, Part, Shape, Symbols

from .stream import LearningMix


@dataclass(frozen=True)
class Mix(Coder):
    """Decides bit by bit with a mixture of adaptive and parametric predictions: short codes, at 1e6 weights a second.

    Tensors of a stream share what is learned, so that a tensor is decoded after those before it. Given other weights,
    each tensor is expected to be a factor times what is given for it, plus an offset (of integers) and a matrix of low
    rank; what differs from that is coded. The rank, 0 included, is that of the shortest of several streams.
    """

    name: ClassVar[str] = "mix"
    linear: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """True: tensors learn from those before them."""
        return True

    def fresh(self) -> LearningMix:
        """Return a coder that knows nothing yet and learns from tensor to tensor."""
        return LearningMix(self.linear)

    def encode(self, symbols: Symbols) -> bytes:
        """Return the stream; see `Coder.encode`."""
        return b"".join(part.data for part in self.encode_parts(symbols))

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return layout (structure), choices of the linear prediction (tables) and the payload."""
        return self.fresh().encode_parts(symbols)

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`."""
        return self.fresh().decode(data, shape, dtype)


@dataclass(frozen=True)
class Lin(Mix):
    """`mix` around a mean that is predicted linearly from entries that are already coded, along rows or columns."""

    name: ClassVar[str] = "lin"
    linear: ClassVar[bool] = True
