"""Mosaic: blocks of weights as indices into one codebook of motifs for the whole network (MoMos, arXiv:2602.14896)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError, WeightsError
from kcomplex.estimators.arrays import require_forms
from kcomplex.estimators.coder import Quantised, Quantiser
from kcomplex.estimators.pieces import ALIGNMENT
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape
from kcomplex.motifs.blocks import blocks_of, draw_motifs, motif_count, update_motifs
from kcomplex.motifs.nearest import Rows, distinct, nearest
from kcomplex.weights import TensorHandle

from ..tables.codebook import (
    bits_of,
    narrow,
    narrow_word_dtype,
    pack_codebook,
    sorted_rows,
    unpack_codebook,
    widen,
)
from .repeated_blocks import LARGEST_FOUND, best_block_size, find_blocks, repeated_blocks

_SINGLE: np.dtype[Any] = np.dtype(np.float32)
_DOUBLE: np.dtype[Any] = np.dtype(np.float64)
_LLOYD_STEPS = 8
# Every tensor is padded to whole blocks.
_LARGEST_BLOCK = 1 << 16
_FITTED_BLOCK = 4


@dataclass(frozen=True)
class Mosaic(Quantiser):
    """Codes every block of s weights as the index of a motif in a codebook that all tensors share.

    Without `k` and `capacity` the codebook holds the blocks themselves, compared bit for bit, and nothing is lost: a
    network that MoMos trained costs about k s q + m H bits, the motifs and the entropy of the indices. Tensors that
    hardly repeat a block are left as words, in the narrowest float dtype that holds them. float32 and shorter dtypes
    share a codebook, float64 has its own.

    With `k` or `capacity` the codebook is fitted to all blocks and every block becomes its nearest motif.

    Parameters
    ----------
    s
        Weights a block, 1 to 65,536. A tensor is cut in C order; its last block may be shorter. None: the size up to 64
        at which repeated blocks make the weights shortest is found; 4 where motifs are fitted.
    k
        Number of motifs, the zero motif included, which is free.
    capacity
        Number of motifs as a share of the number of blocks; see `kcomplex.motifs.blocks.motif_count`.
    seed
        Of the blocks that the fit starts from.

    Raises
    ------
    SpecError
        A value is out of range, or both k and capacity are given.

    Notes
    -----
    The fit draws distinct blocks and takes eight steps of Lloyd's algorithm, in each of which unused motifs move to
    the blocks that fit worst. Motifs are float32.
    """

    s: int | None = None
    k: int | None = None
    capacity: float | None = None
    seed: int = 0
    name: ClassVar[str] = "mosaic"

    def __post_init__(self) -> None:
        if self.s is not None and not 1 <= self.s <= _LARGEST_BLOCK:
            raise SpecError(f"mosaic: s must be 1 to {_LARGEST_BLOCK}, not {self.s}")
        if self.k is not None and self.capacity is not None:
            raise SpecError("mosaic: k and capacity exclude each other: give one of them, or none to lose nothing")
        if self.k is not None and self.k < 2:
            raise SpecError(f"mosaic: k counts the zero motif and must be at least 2, not {self.k}")
        if self.capacity is not None and not 0 < self.capacity <= 1:
            raise SpecError(f"mosaic: capacity must be above 0 and at most 1, not {self.capacity}")
        if self.seed < 0:
            raise SpecError(f"mosaic: seed must not be negative, but is {self.seed}")

    @property
    def lossless(self) -> bool:
        """Whether blocks are compared bit for bit; see `Quantiser.lossless`."""
        return self.k is None and self.capacity is None

    def divides(self, shared: bytes) -> bool:
        """Return whether blocks end where pieces do, or there are none."""
        return not shared or ALIGNMENT % self._table(_SINGLE, shared).shape[1] == 0

    def fit(self, tensors: Iterable[TensorHandle]) -> bytes:
        """Return the codebooks for float32 and for float64 values; nothing where both are empty.

        Raises
        ------
        WeightsError
            Motifs are to be fitted, and a tensor holds NaN, infinity, or values beyond float32.
        """
        handles = list(tensors)
        if not self.lossless:
            size, told = self.s or _FITTED_BLOCK, b""
            books: list[NDArray[np.floating[Any]]] = [self._fitted(handles, size), np.zeros((0, size))]
        else:
            groups = [[handle for handle in handles if _values_dtype(handle) == dtype] for dtype in (_SINGLE, _DOUBLE)]
            found = self.s or best_block_size(groups)
            size = found or 1
            told = b"" if self.s else varint(size)
            books = [
                repeated_blocks(group if found else [], size, dtype)
                for group, dtype in zip(groups, (_SINGLE, _DOUBLE), strict=True)
            ]
        if not any(map(len, books)):
            return b""
        return told + b"".join(pack_codebook(sorted_rows(book)) for book in books)

    def quantise(self, values: NDArray[np.floating[Any]], shared: bytes) -> Quantised:
        """Return indices, flat; or words and the number of their dtype, where a block isn't in the codebook.

        Raises
        ------
        WeightsError
            The values can't be assigned to motifs; see `kcomplex.motifs.blocks.blocks_of`.
        """
        table = self._table(values.dtype, shared)
        index = _index_dtype(len(table))
        if not self.lossless:
            blocks = blocks_of([values], table.shape[1])
            return Quantised(nearest(blocks.rows, table.astype(np.float64), blocks.real).astype(index))
        rows = find_blocks(bits_of(values).reshape(-1), bits_of(table))
        if rows is not None:
            return Quantised(rows.astype(index))
        width, words = narrow(values)
        return Quantised(words, bytes([width]))

    def reconstruct(
        self, quantised: Quantised, shape: Shape, dtype: np.dtype[Any], shared: bytes
    ) -> NDArray[np.floating[Any]]:
        """Return the values of the motifs, or of the words; see `Quantiser.reconstruct`."""
        symbols = quantised.symbols
        if quantised.side:
            width = self._literal(quantised.side)
            require_forms(self.name, [symbols], [(shape, narrow_word_dtype(width, dtype))])
            return widen(width, symbols, dtype)
        table = self._table(dtype, shared)
        indices = (-(-math.prod(shape) // table.shape[1]),)
        require_forms(self.name, [symbols], [(indices, _index_dtype(len(table)))])
        if symbols.size and int(symbols.max()) >= len(table):
            raise StreamError(f"the index {symbols.max()} is beyond the {len(table)} motifs of the codebook")
        return table[symbols].reshape(-1)[: math.prod(shape)].reshape(shape).astype(dtype, copy=False)

    def _literal(self, side: bytes) -> int:
        if len(side) != 1 or not self.lossless:
            raise StreamError(f"a tensor of a mosaic has no {len(side)} bytes of side information")
        return side[0]

    def _table(self, dtype: np.dtype[Any], shared: bytes) -> NDArray[np.floating[Any]]:
        """Return the motifs for values of a dtype, of shape (k, s), the zero motif first."""
        single, double = _tables(shared, self.s or (_FITTED_BLOCK if not self.lossless else None))
        return double if dtype == _DOUBLE and self.lossless else single

    def _fitted(self, handles: Sequence[TensorHandle], size: int) -> NDArray[np.float32]:
        """Return motifs fitted to the blocks of all tensors, without the zero motif."""
        blocks = blocks_of([handle.values() for handle in handles], size, [handle.name for handle in handles])
        total = len(blocks.rows)
        if not total:
            return np.zeros((0, size), _SINGLE)
        largest = float(np.abs(blocks.rows).max())
        if largest > float(np.finfo(_SINGLE).max):
            raise WeightsError(
                f"mosaic: motifs are float32 and can't hold weights as large as {largest:g}: exclude them"
            )
        count = self.k if self.capacity is None else motif_count(self.capacity, total)
        assert count is not None
        motifs = _single(draw_motifs(blocks, max(count, 2), np.random.default_rng(self.seed).permutation(total)))
        for _ in range(_LLOYD_STEPS):
            motifs = _single(update_motifs(blocks, motifs, nearest(blocks.rows, motifs, blocks.real)))
        motifs = motifs[distinct(motifs)]
        return motifs[motifs.any(axis=1)].astype(_SINGLE)


@lru_cache(maxsize=2)
def _tables(shared: bytes, size: int | None) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    # Every tensor asks for them anew.
    if not shared:
        shared, size = varint(0) + varint(0), size or 1
    reader = Reader(shared)
    if size is None:
        size = reader.varint()
        if not 1 <= size <= LARGEST_FOUND:
            raise StreamError(f"a mosaic of blocks of {size} weights: the stream is corrupted")
    tables = []
    for dtype in (_SINGLE, _DOUBLE):
        rows = unpack_codebook(reader, size, dtype)
        table = np.concatenate([np.zeros((1, size), dtype), rows])
        table.flags.writeable = False
        tables.append(table)
    if reader.left:
        raise StreamError(f"{reader.left} bytes are left over after the codebooks")
    return tables[0], tables[1]


def _index_dtype(motifs: int) -> np.dtype[Any]:
    return np.min_scalar_type(motifs - 1)


def _values_dtype(handle: TensorHandle) -> np.dtype[Any]:
    return _DOUBLE if handle.dtype is torch.float64 else _SINGLE


def _single(motifs: Rows) -> Rows:
    return motifs.astype(_SINGLE).astype(_DOUBLE)
