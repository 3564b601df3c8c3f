"""LZMA, through the standard library: raw LZMA2 streams whose literal and position contexts fit the weights' width."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import Any, ClassVar

from kcomplex.errors import SpecError, StreamError

from ..tables.words import ByteCoder, require_end

# Literal context, literal position and position bits by the bytes of an integer. Position bits say which byte of its
# integer a literal is, which is worth 5 to 10 % on floats; the byte before it tells little about a weight, so that
# single bytes do best without literal context. Measured on Gaussian, trained, quantised and dead-zoned weights.
_CONTEXTS = {1: (0, 0, 0), 2: (2, 1, 1), 4: (2, 2, 2), 8: (1, 3, 3)}
_SMALLEST_DICTIONARY = 1 << 12
_LARGEST_DICTIONARY = 1 << 26


@dataclass(frozen=True)
class Lzma(ByteCoder):
    """Raw LZMA2 streams, without the container of ``.xz`` and its checksum.

    Parameters
    ----------
    preset
        0 (fast) to 9 (small).
    extreme
        Search longer for matches.
    aligned
        Set the literal and position contexts to the width of the integers; False keeps the preset's own
        (lc=3, lp=0, pb=2), which are made for text.

    Raises
    ------
    SpecError
        The preset is out of range.

    Notes
    -----
    The dictionary is as long as the data, up to 2**26 bytes, so that memory follows the data on both sides.
    """

    preset: int = 9
    extreme: bool = True
    aligned: bool = True
    name: ClassVar[str] = "lzma"
    # A match of at most 273 bytes takes 14 binary decisions, each with a probability of at most 2017 in 2048:
    # 0.31 bits, or 7,100 bytes of one.
    largest_expansion: ClassVar[int | None] = 1 << 13

    def __post_init__(self) -> None:
        if not 0 <= self.preset <= 9:
            raise SpecError(f"lzma: preset must be 0 to 9, not {self.preset}")

    def compress(self, plain: bytes, width: int) -> bytes:
        """Return one raw stream."""
        return lzma.compress(plain, lzma.FORMAT_RAW, filters=self._filters(len(plain), width))

    def decompress(self, data: bytes, size: int, width: int) -> bytes:
        """Return the bytes; see `ByteCoder.decompress`."""
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=self._filters(size, width))
        try:
            plain = decompressor.decompress(data, size + 1)
        except lzma.LZMAError as error:
            raise StreamError(f"the LZMA2 stream is corrupted: {error}") from error
        require_end(self.name, ended=decompressor.eof, surplus=decompressor.unused_data)
        return plain

    def _filters(self, size: int, width: int) -> list[dict[str, Any]]:
        dictionary = min(max(1 << (size - 1).bit_length(), _SMALLEST_DICTIONARY), _LARGEST_DICTIONARY)
        options = dict(zip(("lc", "lp", "pb"), _CONTEXTS[width], strict=True)) if self.aligned else {}
        preset = self.preset | (lzma.PRESET_EXTREME if self.extreme else 0)
        return [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary, **options}]
