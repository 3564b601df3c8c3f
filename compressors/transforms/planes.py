"""Planes: the bytes, or bits, of equal significance stand together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.arrays import Form, require_forms
from kcomplex.estimators.coder import Transform
from kcomplex.estimators.symbols import Shape, Symbols

_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True)
class Planes(Transform):
    """Cuts integers into planes, the most significant first: sign and exponent of a float apart from its mantissa.

    Parameters
    ----------
    unit
        ``byte``: one plane a byte, of the symbols' shape; symbols of one byte stay as they are. ``bit``: one plane a
        bit, flat, eight symbols packed in a byte (the first in the highest bit).

    Raises
    ------
    SpecError
        The unit is neither.

    Notes
    -----
    Signed integers are cut as the two's complement that they are stored in.
    """

    unit: Literal["byte", "bit"] = "byte"
    name: ClassVar[str] = "planes"

    def __post_init__(self) -> None:
        if self.unit not in ("byte", "bit"):
            raise SpecError(f"planes: unit must be byte or bit, not {self.unit!r}")

    def split(self, symbols: Symbols) -> tuple[bytes, list[Symbols]]:
        """Return no side information and the planes."""
        if self.unit == "bit":
            return b"", _bit_planes(symbols)
        if symbols.dtype.itemsize == 1:
            return b"", [symbols]
        columns = _big_endian_bytes(symbols)
        return b"", [columns[..., index].copy() for index in range(symbols.dtype.itemsize)]

    def payload_names(self, streams: int) -> list[str]:
        """Return ``byte plane 1`` (the most significant) and so on, for planes of bits too."""
        if streams == 1:
            return super().payload_names(streams)
        planes = 1 if self.unit == "byte" else 8
        return [f"byte plane {index // planes + 1}" for index in range(streams)]

    def join(self, side: bytes, streams: list[Symbols], shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the symbols; see `Transform.join`."""
        if side:
            raise StreamError(f"planes: {len(side)} bytes of side information where there is none")
        require_forms(self.name, streams, self._forms(shape, dtype))
        if self.unit == "bit":
            return _from_bit_planes(streams, shape, dtype)
        if dtype.itemsize == 1:
            return streams[0]
        columns = np.empty((*shape, dtype.itemsize), _BYTE)
        for index, plane in enumerate(streams):
            columns[..., index] = plane
        joined: Symbols = columns.view(dtype.newbyteorder(">")).reshape(shape).astype(dtype)
        return joined

    def _forms(self, shape: Shape, dtype: np.dtype[Any]) -> list[Form]:
        """Return shape and dtype of each plane."""
        if self.unit == "bit":
            return [((-(-math.prod(shape) // 8),), _BYTE)] * (8 * dtype.itemsize)
        return [(shape, dtype)] if dtype.itemsize == 1 else [(shape, _BYTE)] * dtype.itemsize


def _big_endian_bytes(symbols: Symbols) -> NDArray[np.uint8]:
    """Return the bytes of symbols along a new last axis, the most significant first."""
    swapped = np.ascontiguousarray(symbols.astype(symbols.dtype.newbyteorder(">"))).view(np.uint8)
    return swapped.reshape(*symbols.shape, symbols.dtype.itemsize)


def _bit_planes(symbols: Symbols) -> list[Symbols]:
    words = np.ascontiguousarray(symbols).reshape(-1).view(f"u{symbols.dtype.itemsize}")
    masks = [words.dtype.type(1 << bit) for bit in reversed(range(8 * words.dtype.itemsize))]
    return [np.packbits((words & mask) != 0) for mask in masks]


def _from_bit_planes(planes: list[Symbols], shape: Shape, dtype: np.dtype[Any]) -> Symbols:
    words = np.zeros(math.prod(shape), f"u{dtype.itemsize}")
    for plane in planes:
        words <<= words.dtype.type(1)
        words |= np.unpackbits(plane.astype(_BYTE, copy=False), count=words.size)
    return words.view(dtype).reshape(shape)
