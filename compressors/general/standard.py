"""Deflate (RFC 1951) and bzip2, through the standard library."""

from __future__ import annotations

import bz2
import zlib
from dataclasses import dataclass
from typing import ClassVar

from kcomplex.errors import SpecError, StreamError

from ..tables.words import ByteCoder, require_end

# Negative: a raw deflate stream with the largest window, without the header and checksum of zlib.
_RAW_DEFLATE = -zlib.MAX_WBITS


@dataclass(frozen=True)
class Zlib(ByteCoder):
    """Raw deflate streams, without header and checksum.

    Parameters
    ----------
    level
        1 (fast) to 9 (small).

    Raises
    ------
    SpecError
        The level is out of range.
    """

    level: int = 9
    name: ClassVar[str] = "zlib"
    # A match of at most 258 bytes takes at least two bits, one for its length and one for its distance.
    largest_expansion: ClassVar[int | None] = 1032

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 9:
            raise SpecError(f"zlib: level must be 1 to 9, not {self.level}")

    def compress(self, plain: bytes, width: int) -> bytes:
        """Return one deflate stream."""
        deflater = zlib.compressobj(self.level, zlib.DEFLATED, _RAW_DEFLATE, zlib.DEF_MEM_LEVEL + 1)
        return deflater.compress(plain) + deflater.flush()

    def decompress(self, data: bytes, size: int, width: int) -> bytes:
        """Return the bytes; see `ByteCoder.decompress`."""
        inflater = zlib.decompressobj(_RAW_DEFLATE)
        try:
            plain = inflater.decompress(data, size + 1)
        except zlib.error as error:
            raise StreamError(f"the deflate stream is corrupted: {error}") from error
        require_end(self.name, ended=inflater.eof, surplus=inflater.unused_data)
        return plain


@dataclass(frozen=True)
class Bz2(ByteCoder):
    """Bzip2 streams without their first four bytes, which only repeat the level.

    Parameters
    ----------
    level
        Block size in units of 100,000 bytes, 1 to 9.

    Raises
    ------
    SpecError
        The level is out of range.
    """

    level: int = 9
    name: ClassVar[str] = "bz2"

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 9:
            raise SpecError(f"bz2: level must be 1 to 9, not {self.level}")

    def compress(self, plain: bytes, width: int) -> bytes:
        """Return one bzip2 stream without its header."""
        return bz2.compress(plain, self.level).removeprefix(self._header)

    def decompress(self, data: bytes, size: int, width: int) -> bytes:
        """Return the bytes; see `ByteCoder.decompress`."""
        decompressor = bz2.BZ2Decompressor()
        try:
            plain = decompressor.decompress(self._header + data, size + 1)
        except OSError as error:
            raise StreamError(f"the bzip2 stream is corrupted: {error}") from error
        require_end(self.name, ended=decompressor.eof, surplus=decompressor.unused_data)
        return plain

    @property
    def _header(self) -> bytes:
        return b"BZh%d" % self.level
