"""Brotli (RFC 7932), through the brotli package (``pip install 'kcomplex[brotli]'``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import brotli

from kcomplex.errors import SpecError, StreamError

from ..tables.words import ByteCoder, require_end


@dataclass(frozen=True)
class Brotli(ByteCoder):
    """Brotli streams with a window that holds the whole input, up to 2**24 bytes.

    Parameters
    ----------
    quality
        0 (fast) to 11 (small).

    Raises
    ------
    SpecError
        The quality is out of range.
    """

    quality: int = 11
    name: ClassVar[str] = "brotli"

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 11:
            raise SpecError(f"brotli: quality must be 0 to 11, not {self.quality}")

    def compress(self, plain: bytes, width: int) -> bytes:
        """Return one stream."""
        window = min(max(len(plain).bit_length(), 10), 24)
        compressed: bytes = brotli.compress(plain, quality=self.quality, lgwin=window)
        return compressed

    def decompress(self, data: bytes, size: int, width: int) -> bytes:
        """Return the bytes; see `ByteCoder.decompress`."""
        decompressor = brotli.Decompressor()
        try:
            plain: bytes = decompressor.process(data, output_buffer_limit=size + 1)
        except brotli.error as error:
            raise StreamError(f"the brotli stream is corrupted: {error}") from error
        require_end(self.name, ended=decompressor.is_finished(), surplus=b"")
        return plain
