"""The shortest of several codes for every tensor, the choice paid for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import ClassVar, Literal, cast

import torch

from kcomplex.errors import StreamError
from kcomplex.estimators.description import STRUCTURE
from kcomplex.estimators.estimator import Code, EncodedTensor, Part, Shape, word_shape
from kcomplex.estimators.given import RelativeCode, from_word_differences, word_differences
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.weights import DTYPES, TensorHandle, Weights, tensor_from_words, word_dtype, words_of

from .race import Entrant, View, promising

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
# Added to the choice of a member that codes a tensor given another: in its own way, or by differences of words.
_RELATIVE = 128
_FAST = ("raw", "entropy", "palette|context", "planes|entropy", "planes|context", "planes|zstd", "mosaic|entropy")
_TIERS = {
    "fast": tuple(map(_MEMBERS.index, _FAST)),
    "tight": tuple(range(len(_MEMBERS))),
}
_RAW = _MEMBERS.index("raw")
# What a mosaic must be shorter than, with its motifs.
_RIVALS = tuple(map(_MEMBERS.index, ("palette|entropy", "planes|zstd", "palette|context")))


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
    Members that count words are measured by the tensor's histogram, and only coded if they win. The others code tensors
    of up to 32768 weights whole. Longer ones they are first tried on a sixteenth of, then on a quarter, and only those
    that may still become the shortest go on. A mosaic is tried whole wherever the network has repeated blocks, and left
    out where its motifs take more than it saves.

    Given other weights, every member but the mosaic codes differences of words, too; `lin` codes differences in its own
    way, or none.
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

    def fresh(self) -> _Search:
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

    def takes_given(self) -> bool:
        """Return True; see `RelativeCode`."""
        return True

    def encode_given(self, handle: TensorHandle, known: torch.Tensor, shared: bytes) -> EncodedTensor:
        """Return one tensor's stream given another as if it were the first; see `RelativeCode.encode_given`."""
        return self.fresh().encode_given(handle, known, shared)

    def decode_given(
        self, data: bytes, dtype: torch.dtype, shape: Shape, known: torch.Tensor, shared: bytes
    ) -> torch.Tensor:
        """Return the tensor of a stream's first given another; see `RelativeCode.decode_given`."""
        return self.fresh().decode_given(data, dtype, shape, known, shared)


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
        return self._shortest(promising(self._entrants(View(handle))), handle, shared)

    def _entrants(self, view: View, added: int = 0) -> list[Entrant]:
        """Return the members that see a view, mosaics aside; with a known tensor, those that have a use for it."""
        members = [place for place in _TIERS[self.best.tier] if place != _MOSAIC]
        if view.known is not None:
            members = list(filter(_is_relative, members))
        return [Entrant(place + added, view, _member(place), partial(self._trial, place)) for place in members]

    def takes_given(self) -> bool:
        """Return True; see `RelativeCode`."""
        return True

    def encode_given(self, handle: TensorHandle, known: torch.Tensor, shared: bytes) -> EncodedTensor:
        """Return the shortest stream, alone or given another tensor; see `RelativeCode.encode_given`."""
        if not handle.elements:
            return EncodedTensor([Part(STRUCTURE, bytes([_RAW]))])
        # What learns from tensor to tensor decides by itself whether the other is of use.
        entrants = [entrant for entrant in self._entrants(View(handle)) if not _is_relative(entrant.choice)]
        entrants += self._entrants(View(handle, known), _RELATIVE)
        if known.dtype == handle.dtype:
            steps = View(_differences(handle, known))
            entrants += [
                entrant for entrant in self._entrants(steps, _RELATIVE) if not _is_relative(entrant.choice - _RELATIVE)
            ]
        return self._shortest(promising(entrants), handle, shared)

    def _shortest(self, promised: list[tuple[float, Entrant]], handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the shortest stream of some entrants, or of a mosaic; what promises no less than one isn't coded."""
        if shared:
            mosaic = Entrant(_MOSAIC, View(handle), _member(_MOSAIC), partial(self._trial, _MOSAIC))
            promised = [*promised, (0.0, mosaic)]
        found: tuple[Entrant, EncodedTensor, Code] | None = None
        for promise, entrant in promised:
            if found is not None and promise >= _size(found[1]):
                continue
            coder = entrant.trial()
            encoded = entrant.view.encode(coder, shared if entrant.choice == _MOSAIC else b"")
            if found is None or _size(encoded) < _size(found[1]):
                found = entrant, encoded, coder
        assert found is not None
        entrant, encoded, coder = found
        if coder.sequential:
            self.learning[entrant.choice % _RELATIVE] = coder
        return EncodedTensor([Part(STRUCTURE, bytes([entrant.choice])), *encoded.parts])

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

    def decode_given(
        self, data: bytes, dtype: torch.dtype, shape: Shape, known: torch.Tensor, shared: bytes
    ) -> torch.Tensor:
        """Return the tensor, decoded by the member that coded it; see `RelativeCode.decode_given`."""
        if 0 in shape and data == bytes([_RAW]):
            return torch.zeros(shape, dtype=dtype)
        if 0 in shape or not data or data[0] < _RELATIVE:
            return self.decode_tensor(data, dtype, shape, shared)
        place = data[0] - _RELATIVE
        if place not in _TIERS[self.best.tier] or place == _MOSAIC:
            raise StreamError("best: the stream names a member that the portfolio hasn't")
        coder = self._coder(place)
        if isinstance(coder, RelativeCode):
            return coder.decode_given(data[1:], dtype, shape, known, b"")
        if known.dtype != dtype:
            raise StreamError(f"best: differences from {known.dtype} give no {dtype}")
        steps = coder.decode_tensor(data[1:], _step_dtype(dtype), _step_shape(dtype, shape), b"")
        return from_word_differences(words_of(steps), known)

    def _coder(self, place: int) -> Code:
        member = _member(place)
        return self.learning.setdefault(place, member.fresh()) if member.sequential else member

    def _trial(self, place: int) -> Code:
        """Return a coder that may learn from a tensor without consequences."""
        member = _member(place)
        if not member.sequential:
            return member
        return copy.deepcopy(self.learning[place]) if place in self.learning else member.fresh()


@cache
def _member(place: int) -> Code:
    return cast(Code, build_estimator(_MEMBERS[place]))


@cache
def _is_relative(place: int) -> bool:
    """Return whether a member has a use of its own for given weights."""
    return isinstance(_member(place).fresh(), RelativeCode)


def _differences(handle: TensorHandle, known: torch.Tensor) -> TensorHandle:
    """Return the differences of words as a tensor of unsigned integers."""
    steps = word_differences(handle.read(), known)
    shape = _step_shape(handle.dtype, handle.shape)
    return TensorHandle.of(handle.name, tensor_from_words(steps, _step_dtype(handle.dtype), shape))


def _step_dtype(dtype: torch.dtype) -> torch.dtype:
    return DTYPES[word_dtype(dtype).name]


def _step_shape(dtype: torch.dtype, shape: Shape) -> Shape:
    return tuple(word_shape(dtype, shape))


def _length(code: Code, handle: TensorHandle, shared: bytes) -> int:
    return _size(code.encode_tensor(handle, shared))


def _size(encoded: EncodedTensor) -> int:
    return sum(len(part.data) for part in encoded.parts)
