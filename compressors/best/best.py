"""The shortest of several codes for every tensor, the choice paid for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal, cast

import torch

from kcomplex.errors import StreamError
from kcomplex.estimators.code import Code, EncodedTensor, Memory, OtherEncoder, Outcome, SymbolCode
from kcomplex.estimators.differences import from_word_differences, word_differences
from kcomplex.estimators.pieces import handles_of, piece_limit
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.structure import TensorEntry
from kcomplex.estimators.symbols import Shape, symbol_shape
from kcomplex.weights import DTYPES, TensorHandle, Weights, tensor_from_words, word_dtype, words_of

from .race import RELATIVE, Entrant, View, promising

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
_RAW, _ENTROPY, _MOSAIC = map(_MEMBERS.index, ("raw", "entropy", "mosaic|entropy"))
# The share of a stream that its structure takes from which one member for all is tried, of the commonest so many.
_TOLD, _MOST_RIVALS = 1e-3, 2
_FAST = ("raw", "entropy", "palette|context", "planes|entropy", "planes|context", "planes|zstd", "mosaic|entropy")
_TIERS: dict[Literal["fast", "tight"], tuple[int, ...]] = {
    "fast": tuple(map(_MEMBERS.index, _FAST)),
    "tight": tuple(range(len(_MEMBERS))),
}
# What a mosaic must be shorter than, with its motifs.
_RIVALS = tuple(map(_MEMBERS.index, ("palette|entropy", "planes|zstd", "palette|context")))


class BestMemory(Memory):
    """The memories of a portfolio's members, by their place in it.

    Attributes
    ----------
    used
        Places of the members that code a tensor.
    """

    def __init__(self, shared: bytes = b"") -> None:
        super().__init__(shared)
        self._members: dict[int, Memory] = {}
        self.used: set[int] = set()

    def member(self, place: int) -> Memory:
        """Return the memory of a member; made when it is first asked for."""
        if place not in self._members:
            self._members[place] = _member(place).memory(self.shared if place == _MOSAIC else b"")
        return self._members[place]

    def trial(self, place: int) -> Memory:
        """Return a memory of a member that may learn from a tensor without consequences."""
        return self.member(place).copy()

    def keep(self, place: int, learned: Memory) -> None:
        """Keep what a member has learned from a tensor that it codes."""
        self._members[place] = learned
        self.used.add(place)

    def copy(self) -> BestMemory:
        """Return a memory that knows the same and learns for itself."""
        copy = BestMemory(self.shared)
        copy._members = {place: memory.copy() for place, memory in self._members.items()}
        copy.used = set(self.used)
        return copy


@dataclass(frozen=True)
class Best(Code):
    """Codes every tensor by whichever member of a portfolio is shortest, and says by which.

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

    def divides(self, shared: bytes) -> bool:
        """Return True: pieces of a tensor may have members of their own."""
        return True

    @property
    def takes_known(self) -> bool:
        """True: see the notes."""
        return True

    def prepare(self, weights: Weights) -> bytes:
        """Return the motifs of a mosaic, where it saves more than they take."""
        mosaic = _member(_MOSAIC)
        shared = mosaic.prepare(weights)
        if not shared:
            return b""
        saved = 0
        for piece in (piece for handle in weights.values() for piece in handles_of(handle, piece_limit(True))):
            length = mosaic.encode(piece, mosaic.memory(shared)).size
            if length < piece.nbytes:
                rivals = (_member(rival) for rival in _RIVALS)
                saved += max(0, min(rival.encode(piece, rival.memory(b"")).size for rival in rivals) - length)
        return shared if saved > len(shared) else b""

    def memory(self, shared: bytes = b"") -> BestMemory:
        """Return the memory of a new stream."""
        return BestMemory(shared)

    def stream_spec(self, memory: Memory) -> str:
        """Return the first tier that has all members that were used."""
        assert isinstance(memory, BestMemory)
        return next(Best(tier).full_spec for tier, places in _TIERS.items() if memory.used <= set(places))

    def rivals(self, outcome: Outcome) -> tuple[Code, ...]:
        """Return one member for all tensors, of those by which the stream may be shorter on the whole.

        A member that learns may learn more from all tensors than it loses with some; and choices of their own may cost
        small tensors more than they save.
        """
        used = {choice % RELATIVE for choice in outcome.choices}
        places = {place for place in _TIERS[self.tier] if _member(place).sequential}
        if outcome.structure_bits > _TOLD * outcome.bits:
            counts = Counter(choice % RELATIVE for choice in outcome.choices)
            commonest = sorted(counts, key=lambda place: (-counts[place], place))[:_MOST_RIVALS]
            places |= {_RAW, _ENTROPY, *commonest} - {_MOSAIC}
        return tuple(_OneForAll(self, place) for place in sorted(places) if used != {place})

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return the shortest stream, alone or given another tensor; nothing of a tensor without weights."""
        assert isinstance(memory, BestMemory)
        if not handle.elements:
            return EncodedTensor([])
        promised = promising(list(self._entrants(handle, memory, known)))
        if memory.shared:
            promised.append((0.0, Entrant(_MOSAIC, View(handle), _member(_MOSAIC), memory.trial)))
        found: tuple[Entrant, EncodedTensor, Memory] | None = None
        for promise, entrant in promised:
            if found is not None and promise >= _cost(found[1].size, found[0]):
                continue
            learned = entrant.trial()
            encoded = entrant.view.encode(entrant.code, learned)
            if found is None or _cost(encoded.size, entrant) < _cost(found[1].size, found[0]):
                found = entrant, encoded, learned
        assert found is not None
        entrant, encoded, learned = found
        memory.keep(entrant.place, learned)
        return EncodedTensor(encoded.parts, choice=entrant.choice)

    def _entrants(self, handle: TensorHandle, memory: BestMemory, known: torch.Tensor | None) -> Iterator[Entrant]:
        """Yield the members, mosaics aside, with each of the views that they have a use for."""
        plain = View(handle)
        given = None if known is None else View(handle, known)
        steps = View(_differences(handle, known)) if known is not None and known.dtype == handle.dtype else None
        for place in _TIERS[self.tier]:
            if place == _MOSAIC:
                continue
            code = _member(place)
            # What predicts decides by itself whether the given tensor is of use.
            if given is None or not _predicts(place):
                yield Entrant(place, plain, code, memory.trial)
            if given is not None and _predicts(place):
                yield Entrant(place + RELATIVE, given, code, memory.trial)
            elif steps is not None:
                yield Entrant(place + RELATIVE, steps, code, memory.trial)

    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tensor, decoded by the member that coded it."""
        assert isinstance(memory, BestMemory)
        if 0 in entry.shape:
            if data:
                raise StreamError(f"best: {len(data)} bytes of a tensor without weights")
            return torch.zeros(entry.shape, dtype=entry.dtype)
        relative, place = divmod(entry.choice, RELATIVE)
        if place not in _TIERS[self.tier] or (relative and (known is None or place == _MOSAIC)):
            raise StreamError("best: the stream names a member that the portfolio hasn't")
        code, learned = _member(place), memory.member(place)
        # The choice is the portfolio's, not the member's.
        entry = replace(entry, choices=(0,))
        if not relative:
            return code.decode(entry, data, learned)
        assert known is not None
        if _predicts(place):
            return code.decode(entry, data, learned, known)
        if known.dtype != entry.dtype:
            raise StreamError(f"best: differences from {known.dtype} give no {entry.dtype}")
        steps = TensorEntry(entry.names, _step_dtype(entry.dtype), _step_shape(entry.dtype, entry.shape))
        return from_word_differences(words_of(code.decode(steps, data, learned)), known)


@dataclass(frozen=True)
class _OneForAll(OtherEncoder):
    """Encodes every tensor by one member of the portfolio."""

    best: Best
    place: int
    name: ClassVar[str] = "one_for_all"

    @property
    def decoder(self) -> Code:
        """The portfolio."""
        return self.best

    @property
    def sequential(self) -> bool:
        """Whether the member is."""
        return _member(self.place).sequential

    def prepare(self, weights: Weights) -> bytes:
        """Return nothing: motifs are for those who use them."""
        return b""

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return the member's stream; nothing of a tensor without weights."""
        assert isinstance(memory, BestMemory)
        if not handle.elements:
            return EncodedTensor([])
        code, learned = _member(self.place), memory.member(self.place)
        memory.keep(self.place, learned)
        if known is None or _predicts(self.place):
            encoded = code.encode(handle, learned, known)
            return replace(encoded, choice=self.place + (0 if known is None else RELATIVE))
        alone = replace(code.encode(handle, learned), choice=self.place)
        if known.dtype != handle.dtype:
            return alone
        steps = replace(code.encode(_differences(handle, known), learned), choice=self.place + RELATIVE)
        return min(alone, steps, key=lambda encoded: encoded.size)


def _cost(size: int, entrant: Entrant) -> int:
    """Return the bytes of a stream and of saying that it isn't of plain words, whose length goes without saying."""
    return size + (entrant.choice != _RAW)


@cache
def _member(place: int) -> Code:
    return cast(Code, build_estimator(_MEMBERS[place]))


@cache
def _predicts(place: int) -> bool:
    """Return whether a member has a use of its own for given weights."""
    code = _member(place)
    return isinstance(code, SymbolCode) and code.predicts


def _differences(handle: TensorHandle, known: torch.Tensor) -> TensorHandle:
    """Return the differences of words as a tensor of unsigned integers."""
    steps = word_differences(handle.read(), known)
    shape = _step_shape(handle.dtype, handle.shape)
    return TensorHandle.of(handle.name, tensor_from_words(steps, _step_dtype(handle.dtype), shape))


def _step_dtype(dtype: torch.dtype) -> torch.dtype:
    return DTYPES[word_dtype(dtype).name]


def _step_shape(dtype: torch.dtype, shape: Shape) -> Shape:
    return tuple(symbol_shape(dtype, shape))
