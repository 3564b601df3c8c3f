"""The shortest of several codes for every tensor, the choice paid for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch

from kcomplex.description import STRUCTURE
from kcomplex.errors import StreamError
from kcomplex.estimator import Code, EncodedTensor, Part, Shape
from kcomplex.pipeline import build_estimator
from kcomplex.structure import join_lengths, split_lengths
from kcomplex.weights import TensorHandle, Weights

# The position is the choice in streams: only ever append, and only to the last tier.
_MOSAIC = "mosaic|entropy"
_FAST = ("raw", "entropy", "palette|entropy", "planes|entropy", "planes|zstd", _MOSAIC)
_PORTFOLIOS = {"fast": _FAST, "tight": (*_FAST, "planes|zstd:level=19", "lzma", "palette|lzma", "lin")}
# Long tensors are tried on their first rows of about so many weights; members that take at most so many times the
# bytes of the shortest code the whole. One that learns as it goes is worth more than its beginning tells.
_SAMPLE = 1 << 16
_CLOSE, _CLOSE_LEARNING = 1.02, 1.1
_CLOSE_BYTES = 64


@dataclass(frozen=True)
class Best(Code):
    """Codes every tensor by whichever member of a portfolio is shortest, and says by which in one byte.

    Parameters
    ----------
    tier
        ``fast``: raw, entropy, palette|entropy, planes|entropy, planes|zstd and mosaic|entropy; ``tight``: also
        planes|zstd:level=19, lzma, palette|lzma and lin.

    Notes
    -----
    Long tensors are coded whole only by those members that are close to the shortest on the tensor's first rows.
    """

    tier: Literal["fast", "tight"] = "fast"
    name: ClassVar[str] = "best"

    @property
    def sequential(self) -> bool:
        """Whether a member of the portfolio learns from tensor to tensor."""
        return any(member.sequential for member in self._members())

    @property
    def divisible(self) -> bool:
        """True: pieces of a tensor may have members of their own."""
        return True

    def fresh(self) -> Code:
        """Return the search of one stream; see `TensorwiseEstimator.fresh`."""
        return _Search(self, [member.fresh() for member in self._members()])

    def prepare(self, weights: Weights) -> bytes:
        """Return what members need for all tensors: a mosaic's codebook, where it saves more than it takes."""
        pieces = self._shared(weights)
        return join_lengths(map(len, pieces)) + b"".join(pieces)

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return one tensor's stream as if it were the first; see `Code.encode_tensor`."""
        return self.fresh().encode_tensor(handle, shared)

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor of a stream's first; see `Code.decode_tensor`."""
        return self.fresh().decode_tensor(data, dtype, shape, shared)

    def _members(self) -> list[Code]:
        return [cast(Code, build_estimator(spec)) for spec in _PORTFOLIOS[self.tier]]

    def _shared(self, weights: Weights) -> list[bytes]:
        members = self._members()
        pieces = [member.prepare(weights) for member in members]
        place = _PORTFOLIOS[self.tier].index(_MOSAIC)
        mosaic, others = members[place], members[place - 3 : place - 1]
        saved = 0
        for handle in weights.values():
            length = _length(mosaic, handle, pieces[place])
            if length < handle.nbytes:
                saved += max(0, min(_length(other, handle, b"") for other in others) - length)
        if saved <= len(pieces[place]):
            pieces[place] = b""
        return pieces


@dataclass(frozen=True)
class _Search(Code):
    """Codes or decodes the tensors of one stream."""

    best: Best
    coders: list[Code]
    name: ClassVar[str] = "best_search"

    @property
    def sequential(self) -> bool:
        """See `Best.sequential`."""
        return self.best.sequential

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the shortest stream with its choice before it."""
        pieces = split_lengths(shared, len(self.coders) + 1)[:-1]
        usable = [
            choice for choice, spec in enumerate(_PORTFOLIOS[self.best.tier]) if spec != _MOSAIC or pieces[choice]
        ]
        found: tuple[int, EncodedTensor, Code] | None = None
        for choice in self._promising(handle, usable, pieces):
            coder = self.coders[choice]
            trial = copy.deepcopy(coder) if coder.sequential else coder
            encoded = trial.encode_tensor(handle, pieces[choice])
            if found is None or _size(encoded) < _size(found[1]):
                found = choice, encoded, trial
        assert found is not None
        choice, encoded, self.coders[choice] = found
        return EncodedTensor([Part(STRUCTURE, bytes([choice])), *encoded.parts])

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor, decoded by the member that coded it."""
        pieces = split_lengths(shared, len(self.coders) + 1)[:-1]
        if not data or data[0] >= len(self.coders):
            raise StreamError("best: the stream names a member that the portfolio hasn't")
        return self.coders[data[0]].decode_tensor(data[1:], dtype, shape, pieces[data[0]])

    def _promising(self, handle: TensorHandle, usable: Sequence[int], pieces: Sequence[bytes]) -> list[int]:
        """Return the members that code the whole tensor."""
        row = handle.elements // max(handle.shape[0], 1) if handle.shape else 1
        rows = max(1, _SAMPLE // max(row, 1))
        if handle.elements <= 2 * _SAMPLE or rows >= handle.shape[0]:
            return list(usable)
        beginning = handle.read()[:rows]
        sample = TensorHandle(handle.name, tuple(beginning.shape), handle.dtype, lambda: beginning)
        lengths = {}
        for choice in usable:
            coder = self.coders[choice]
            trial = copy.deepcopy(coder) if coder.sequential else coder
            lengths[choice] = _length(trial, sample, pieces[choice])
        least = min(lengths.values())
        return [
            choice
            for choice, length in lengths.items()
            if length <= least * (_CLOSE_LEARNING if self.coders[choice].sequential else _CLOSE) + _CLOSE_BYTES
        ]


def _length(code: Code, handle: TensorHandle, shared: bytes) -> int:
    return _size(code.encode_tensor(handle, shared))


def _size(encoded: EncodedTensor) -> int:
    return sum(len(part.data) for part in encoded.parts)
