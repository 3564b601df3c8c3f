"""The compression figures of the MoMos paper, by the conventions of its official code."""

from __future__ import annotations

import bz2
import lzma
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np

from kcomplex.errors import SpecError
from kcomplex.estimators.description import Description, Kind, TensorDescription
from kcomplex.estimators.estimator import Estimator, Progress, assemble, for_each_tensor
from kcomplex.motifs.blocks import mosaic_bits
from kcomplex.weights import TensorHandle, Weights, dtype_name

from .segments import value_segments

Metric: TypeAlias = Literal["gzip", "bz2", "lzma"]


@dataclass(frozen=True)
class Published(Estimator):
    """Raw bytes divided by compressed bytes of all weights in one file; a proxy, for comparison with published figures.

    The file holds the weights, tensors in the order of their names, as little-endian float32; or, binarised, one
    byte for each weight: 1 where it is positive, else 0. Of a complex weight both parts are written. A network
    without weights has ratio 0. The row of a tensor is the ratio of a file with that tensor alone.

    Parameters
    ----------
    metric
        ``gzip``: level 9, no time stamp; ``bz2``: level 9; ``lzma``: preset 9 in an ``.xz`` container.
    binarised
        Compress the signs, a byte each, instead of the floats.

    Raises
    ------
    SpecError
        The metric is unknown.

    Notes
    -----
    Binarised, "raw" is eight times what the signs need: random signs have ratios near 5 and are incompressible all
    the same. Use `Lzma` and its like for lengths that mean something; this is for tables next to published ones.
    Compressors differ in the last bytes between builds of their libraries.
    """

    metric: Metric = "gzip"
    binarised: bool = False
    name: ClassVar[str] = "published"

    def __post_init__(self) -> None:
        if self.metric not in _COMPRESSORS:
            raise SpecError(f"published: metric must be one of {', '.join(_COMPRESSORS)}, not {self.metric!r}")

    @property
    def kind(self) -> Kind:
        """``proxy``."""
        return "proxy"

    def describe(self, weights: Weights, *, jobs: int = 1, progress: Progress | None = None) -> Description:
        """Return the description; its unit is ``ratio``, for the whole and for each tensor."""
        start = time.perf_counter()
        tensors = for_each_tensor(self._describe_tensor, weights, jobs, progress)
        return assemble(self, weights, tensors, {}, start, "ratio", self._ratio(weights.values()))

    def _describe_tensor(self, handle: TensorHandle) -> TensorDescription:
        return TensorDescription(
            handle.name,
            handle.shape,
            dtype_name(handle.dtype),
            handle.elements,
            8 * handle.nbytes,
            self._ratio([handle]),
        )

    def _ratio(self, handles: Iterable[TensorHandle]) -> float:
        compressor = _COMPRESSORS[self.metric]()
        raw = compressed = 0
        for handle in handles:
            for piece in self._pieces(handle):
                raw += len(piece)
                compressed += len(compressor.compress(piece))
        compressed += len(compressor.flush())
        return raw / compressed if raw else 0.0

    def _pieces(self, handle: TensorHandle) -> Iterator[bytes]:
        for values in value_segments(handle):
            if self.binarised:
                yield (values > 0).astype(np.uint8).tobytes()
            else:
                # What doesn't fit float32 becomes infinite there, as in the published files.
                with np.errstate(over="ignore"):
                    yield values.astype("<f4").tobytes()


def relative_algorithmic_compression(weights: int, blocks: int, block_size: int, motifs: int, bits: int) -> float:
    """Return how many times shorter a mosaic with fixed-length indices is than the plain weights.

    ``n q / (k s q + m ceil(log2 k))``: n weights of q bits against a table of k motifs of s weights and one index a
    block. The MoMos paper reports it as the relative algorithmic compression.

    Parameters
    ----------
    weights, blocks
        Number of weights n, and of blocks m that they are cut into.
    block_size, motifs
        Weights a block s, and motifs in the table k.
    bits
        Bits a weight q.

    Raises
    ------
    SpecError
        A number isn't positive.
    """
    if min(weights, blocks, block_size, motifs, bits) < 1:
        raise SpecError(
            f"weights {weights}, blocks {blocks}, block size {block_size}, motifs {motifs} and bits {bits} "
            "must all be positive"
        )
    return weights * bits / mosaic_bits(motifs, block_size, bits, blocks)


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


# 16 more than the window's logarithm asks zlib for the header and trailer of gzip, without a time stamp.
_COMPRESSORS: dict[str, Callable[[], _Compressor]] = {
    "gzip": partial(zlib.compressobj, 9, zlib.DEFLATED, zlib.MAX_WBITS + 16),
    "bz2": partial(bz2.BZ2Compressor, 9),
    "lzma": partial(lzma.LZMACompressor, preset=9),
}
