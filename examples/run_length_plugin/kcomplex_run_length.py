"""A run-length code for kcomplex: each run of equal integers as its value and its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.coder import Coder
from kcomplex.estimators.symbols import Shape, Symbols


@dataclass(frozen=True)
class RunLength(Coder):
    """Values in their own width, lengths in ``length_bytes`` bytes; longer runs are split."""

    length_bytes: int = 2
    name: ClassVar[str] = "run_length"

    def __post_init__(self) -> None:
        if self.length_bytes not in (1, 2, 4):
            raise SpecError(f"run_length: length_bytes must be 1, 2 or 4, not {self.length_bytes}")

    def encode(self, symbols: Symbols) -> bytes:
        """Return all lengths, then all values."""
        flat = symbols.reshape(-1)
        longest = 256**self.length_bytes - 1
        starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]])) if flat.size else np.zeros(0, int)
        lengths = np.diff(starts, append=flat.size)
        pieces = -(-lengths // longest)
        parts = np.full(pieces.sum(), longest)
        parts[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * longest
        values = np.repeat(flat[starts], pieces)
        return parts.astype(f"<u{self.length_bytes}").tobytes() + values.astype(flat.dtype.newbyteorder("<")).tobytes()

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; refuse a stream that doesn't give exactly as many as the shape has."""
        runs, rest = divmod(len(data), self.length_bytes + dtype.itemsize)
        cut = runs * self.length_bytes
        lengths = np.frombuffer(data[:cut], f"<u{self.length_bytes}").astype(np.int64)
        if rest or lengths.sum() != np.prod(shape, dtype=np.int64):
            raise StreamError("the run-length stream is truncated or corrupted")
        values = np.frombuffer(data[cut:], dtype.newbyteorder("<")).astype(dtype)
        return np.repeat(values, lengths).reshape(shape)
