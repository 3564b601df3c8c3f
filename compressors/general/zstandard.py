"""Zstandard (RFC 8878), through the zstandard package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import zstandard

from kcomplex.errors import SpecError, StreamError

from ..tables.words import ByteCoder

# Windows of the highest level and of long-distance matching; the decoder refuses frames that ask for more.
_LARGEST_WINDOW_LOG = 27


@dataclass(frozen=True)
class Zstd(ByteCoder):
    """Zstandard frames without magic number, checksum, content size or dictionary id.

    Parameters
    ----------
    level
        1 (fast) to 22 (small).
    long
        Long-distance matching with a window of 2**27 bytes.

    Raises
    ------
    SpecError
        The level is out of range.
    """

    level: int = 3
    long: bool = False
    name: ClassVar[str] = "zstd"
    # A block of at most 128 KiB takes at least 4 bytes: a header of 3, and the byte to repeat (RFC 8878, 3.1.1.2).
    largest_expansion: ClassVar[int | None] = 1 << 15

    def __post_init__(self) -> None:
        if not 1 <= self.level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise SpecError(f"zstd: level must be 1 to {zstandard.MAX_COMPRESSION_LEVEL}, not {self.level}")

    def compress(self, plain: bytes, width: int) -> bytes:
        """Return one frame."""
        options: dict[str, Any] = {"enable_ldm": True, "window_log": _LARGEST_WINDOW_LOG} if self.long else {}
        parameters = zstandard.ZstdCompressionParameters.from_level(
            self.level,
            source_size=len(plain),
            write_content_size=False,
            **options,
        )
        return (
            zstandard.ZstdCompressor(compression_params=parameters).compress(plain).removeprefix(zstandard.FRAME_HEADER)
        )

    def decompress(self, data: bytes, size: int, width: int) -> bytes:
        """Return the bytes; see `ByteCoder.decompress`."""
        # The three highest bits after the magic number say that it states its content size (RFC 8878, 3.1.1.1.1),
        # which these frames never do and which the library would allocate unseen.
        if data[0] >> 5:
            raise StreamError("the zstd frame is corrupted: it states a content size")
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _LARGEST_WINDOW_LOG)
        try:
            return decompressor.decompress(zstandard.FRAME_HEADER + data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise StreamError(f"the zstd frame is truncated, corrupted or too long: {error}") from error
