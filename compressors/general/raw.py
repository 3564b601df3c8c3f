"""Raw: the words as they are; the reference that every ratio is taken against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kcomplex.estimators.coder import Coder
from kcomplex.estimators.symbols import Shape, Symbols

from ..tables.words import from_bytes, to_bytes


@dataclass(frozen=True)
class Raw(Coder):
    """Writes every integer in its own width, little-endian."""

    name: ClassVar[str] = "raw"

    def encode(self, symbols: Symbols) -> bytes:
        """Return the integers' bytes."""
        return to_bytes(symbols)

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`."""
        return from_bytes(data, shape, dtype)
