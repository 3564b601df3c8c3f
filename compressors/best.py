"""The shortest of several codes for every tensor, the choice paid for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import ClassVar, Literal, cast

import torch

from kcomplex.description import STRUCTURE
from kcomplex.errors import StreamError
from kcomplex.estimator import Code, EncodedTensor, Part, Shape
from kcomplex.pipeline import build_estimator
from kcomplex.weights import TensorHandle, Weights

# The position is the choice in streams: only ever append.
_MEMBERS = (
    "raw",
    "entropy",
    "palette|entropy",
    "planes|entropy",
    "planes|zstd",
    "mosaic|entropy",
    "planes|zstd:level=19",
    "lzma",
    "palette|lzma",
    "lin",
    "palette|context",
    "planes|context",
)
_MOSAIC = _MEMBERS.index("mosaic|entropy")
_FAST = ("raw", "entropy", "palette|context", "planes|entropy", "planes|context", "planes|zstd", "mosaic|entropy")
_TIERS = {
    "fast": tuple(map(_MEMBERS.index, _FAST)),
    "tight": tuple(range(len(_MEMBERS))),
}
# What a mosaic must be shorter than, with its motifs.
_RIVALS = tuple(map(_MEMBERS.index, ("palette|entropy", "planes|zstd", "palette|context")))

# Long tensors are tried on about so many weights, then on more. Members stay in the race while they may end within the
# given factor of the shortest; one that learns as it goes gets better than its beginning tells.
_ROUNDS = ((1 << 13, 1.25, 1.5), (1 << 15, 1.01, 1.1), (1 << 17, 1.002, 1.03))
# A round is worth its time on tensors of at least so many times its weights.
_WORTH = 4


@dataclass(frozen=True)
class Best(Code):
    """Codes every tensor by whichever member of a portfolio is shortest, and says by which in one byte.

    Parameters
    ----------
    tier
        ``fast``: raw, entropy, palette|context, planes|entropy, planes|context, planes|zstd and mosaic|entropy;
        ``tight``: also palette|entropy, planes|zstd:level=19, lzma, palette|lzma and lin.

    Notes
    -----
    Tensors of up to 32768 weights are coded by every member. Longer ones are first tried on 8192 weights from their
    middle, then on 32768 and 131072, and only members that may still become the shortest go on to the next. A
    mosaic is tried whole wherever the network has repeated blocks, and left out where its motifs take more than it
    saves.
    """

    tier: Literal["fast", "tight"] = "fast"
    name: ClassVar[str] = "best"

    @property
    def sequential(self) -> bool:
        """Whether a member of the portfolio learns from tensor to tensor."""
        return any(_member(place).sequential for place in _TIERS[self.tier])

    @property
    def divisible(self) -> bool:
        """True: pieces of a tensor may have members of their own."""
        return True

    def fresh(self) -> Code:
        """Return the search of one stream; see `TensorwiseEstimator.fresh`."""
        return _Search(self)

    def prepare(self, weights: Weights) -> bytes:
        """Return the motifs of a mosaic, where it saves more than they take."""
        mosaic = _member(_MOSAIC)
        shared = mosaic.prepare(weights)
        if not shared:
            return b""
        saved = 0
        for handle in weights.values():
            length = _length(mosaic, handle, shared)
            if length < handle.nbytes:
                saved += max(0, min(_length(_member(rival), handle, b"") for rival in _RIVALS) - length)
        return shared if saved > len(shared) else b""

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return one tensor's stream as if it were the first; see `Code.encode_tensor`."""
        return self.fresh().encode_tensor(handle, shared)

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor of a stream's first; see `Code.decode_tensor`."""
        return self.fresh().decode_tensor(data, dtype, shape, shared)


@dataclass(frozen=True)
class _Search(Code):
    """Codes or decodes the tensors of one stream."""

    best: Best
    learning: dict[int, Code] = field(default_factory=dict)
    name: ClassVar[str] = "best_search"

    @property
    def sequential(self) -> bool:
        """See `Best.sequential`."""
        return self.best.sequential

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the shortest stream with its choice before it; nothing of a tensor without weights."""
        if not handle.elements:
            return EncodedTensor([])
        racing = [place for place in _TIERS[self.best.tier] if place != _MOSAIC]
        members = [*self._race(handle, racing), *([_MOSAIC] if shared else [])]
        found: tuple[int, EncodedTensor, Code] | None = None
        for place in members:
            coder = self._trial(place)
            encoded = coder.encode_tensor(handle, shared if place == _MOSAIC else b"")
            if found is None or _size(encoded) < _size(found[1]):
                found = place, encoded, coder
        assert found is not None
        place, encoded, coder = found
        if coder.sequential:
            self.learning[place] = coder
        return EncodedTensor([Part(STRUCTURE, bytes([place])), *encoded.parts])

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor, decoded by the member that coded it."""
        if 0 in shape:
            if data:
                raise StreamError(f"best: {len(data)} bytes of a tensor without weights")
            return torch.zeros(shape, dtype=dtype)
        if not data or data[0] not in _TIERS[self.best.tier]:
            raise StreamError("best: the stream names a member that the portfolio hasn't")
        place = data[0]
        return self._coder(place).decode_tensor(data[1:], dtype, shape, shared if place == _MOSAIC else b"")

    def _coder(self, place: int) -> Code:
        member = _member(place)
        return self.learning.setdefault(place, member.fresh()) if member.sequential else member

    def _trial(self, place: int) -> Code:
        """Return a coder that may learn from a tensor without consequences."""
        member = _member(place)
        if not member.sequential:
            return member
        return copy.deepcopy(self.learning[place]) if place in self.learning else member.fresh()

    def _race(self, handle: TensorHandle, members: list[int]) -> list[int]:
        """Return the members that code the whole tensor."""
        earlier: dict[int, int] = {}
        before = 0
        for sample, margins in _samples(handle):
            lengths = {place: _length(self._trial(place), sample, b"") for place in members}
            # What stands before the weights (tables) doesn't grow with them: the end follows from two lengths.
            ends = {
                place: length
                + (length - earlier.get(place, 0)) / (sample.elements - before) * (handle.elements - sample.elements)
                for place, length in lengths.items()
            }
            least = min(ends.values())
            members = [place for place in members if ends[place] <= least * margins[_member(place).sequential]]
            if len(members) == 1:
                break
            earlier, before = lengths, sample.elements
        return members


def _samples(handle: TensorHandle) -> Iterator[tuple[TensorHandle, tuple[float, float]]]:
    """Yield longer and longer pieces from the middle of a long tensor with the margins that members have on them."""
    if not handle.shape:
        return
    row = max(handle.elements // handle.shape[0], 1)
    before = 0
    for size, margin, learning in _ROUNDS:
        rows = max(1, size // row)
        if rows <= before or handle.elements < _WORTH * rows * row:
            continue
        start = (handle.shape[0] - rows) // 2
        part = handle.read()[start : start + rows]
        yield replace(handle, shape=tuple(part.shape), load=partial(_itself, part)), (margin, learning)
        before = rows


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@cache
def _member(place: int) -> Code:
    return cast(Code, build_estimator(_MEMBERS[place]))


def _length(code: Code, handle: TensorHandle, shared: bytes) -> int:
    return _size(code.encode_tensor(handle, shared))


def _size(encoded: EncodedTensor) -> int:
    return sum(len(part.data) for part in encoded.parts)
