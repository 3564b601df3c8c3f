"""Which codes may be the shortest of a tensor: told from histograms and from samples, before it is coded whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.estimators.code import Code, CoderCode, EncodedTensor, Memory
from kcomplex.estimators.coder import Coder, Transform
from kcomplex.estimators.symbols import Shape, Symbols, symbols_of
from kcomplex.estimators.transformed import TransformedCode
from kcomplex.weights import TensorHandle, tensor_from_words, words_of

from ..context.context import Context
from ..entropy.entropy import Entropy
from ..general.raw import Raw
from ..tables.alphabet import histogram
from ..tables.block_labels import block_keys
from ..tables.numbers import folded
from ..transforms.palette import Palette
from ..transforms.planes import Planes

Places: TypeAlias = NDArray[np.int64]

# Added to the choice of a member that codes a tensor given another: in its own way, or by differences of words.
RELATIVE = 128

# Long tensors are tried on such shares of them, if these are so many weights. A sample is of so many runs of rows and
# of columns, so that all their scales are in it.
_SHARES, _FEWEST, _RUNS = (1 / 16, 1 / 4), 1 << 13, 3
# How many times shorter than a sample promises a code may end: one that searches for repeats, and one that learns from
# tensor to tensor.
_REPEATS, _SEQUENTIAL = (1.25, 1.01), (1.5, 1.1)
# What `context` may take less, or more, than a sample promises: this share of what isn't noise, and so many bits for
# each sample that would fit in the tensor, as if it learned anew in each.
_LEARNING, _LEARNED = 0.04, 500
# Bits of entropy from which bytes are noise.
_NOISE = 7.9
# The share of a span of bytes that distinct ones have at most, where there are gaps.
_FEW_OF_SPAN = 0.5
# What a weight is taken to cost at least, in bits, so that a constant sample promises something, too.
_LEAST = 2.0**-10
# Wider words are counted in samples only; of how many differ, an estimate is made in a table of so many slots.
_COUNTED_BYTES = 2
_SLOTS_LOG = 18


@dataclass(frozen=True)
class View:
    """A tensor as some codes see it.

    Attributes
    ----------
    handle
        The tensor, or its differences from another as unsigned integers.
    known
        What is given, for codes with a use of their own for it; None for the others.
    """

    handle: TensorHandle
    known: torch.Tensor | None = None

    def encode(self, code: Code, memory: Memory) -> EncodedTensor:
        """Return the tensor's stream under a code, whose memory learns from it."""
        return code.encode(self.handle, memory, self.known)

    def sample(self, rows: Places, columns: Places) -> View:
        """Return some rows and columns of the tensor as a matrix."""
        handle = TensorHandle.of(self.handle.name, _entries(self.handle.read(), rows, columns))
        return View(handle, None if self.known is None else _entries(self.known, rows, columns))

    @cached_property
    def words(self) -> Symbols:
        """The integers that coders see, in their shape."""
        return symbols_of(self.handle.read())

    @cached_property
    def distinct(self) -> float:
        """How many words differ; about, of wide ones."""
        if self.words.itemsize <= _COUNTED_BYTES:
            return float(np.count_nonzero(histogram(self.words)))
        # Linear counting (Whang and others, "A linear-time probabilistic counting algorithm", 1990).
        used = np.zeros(1 << _SLOTS_LOG, np.bool_)
        used[block_keys(words_of(self.handle.read())[:, None]) >> np.uint64(64 - _SLOTS_LOG)] = True
        empty = max(used.size - int(np.count_nonzero(used)), 1)
        return used.size * math.log(used.size / empty)

    @cached_property
    def planes(self) -> list[Symbols]:
        """The planes of the words' bytes."""
        return Planes().split(self.words)[1]

    @cached_property
    def counts(self) -> list[NDArray[np.int64]]:
        """How often each byte occurs, for every plane."""
        return [histogram(plane) for plane in self.planes]

    @cached_property
    def prices(self) -> list[NDArray[np.float64]]:
        """Bits of each byte by how often it occurs, for every plane."""
        return [math.log2(counts.sum()) - np.log2(np.maximum(counts, 1)) + _LEAST for counts in self.counts]

    @cached_property
    def total(self) -> float:
        """The price of all rows."""
        return sum(float(counts @ prices) for counts, prices in zip(self.counts, self.prices, strict=True))

    @cached_property
    def noise(self) -> int:
        """Bytes of planes in which all bytes occur about equally often."""
        planes = zip(self.counts, self.prices, self.planes, strict=True)
        return sum(plane.size for counts, prices, plane in planes if float(counts @ prices) >= _NOISE * plane.size)

    def price(self, rows: Places, columns: Places) -> float:
        """Return the bits of some rows and columns, by how often their bytes occur in the whole."""
        shape = (*folded(self.handle.shape), -1)
        bits = 0.0
        for prices, plane in zip(self.prices, self.planes, strict=True):
            bits += float(prices[plane.reshape(shape)[np.ix_(rows, columns)].reshape(-1).view(np.uint8)].sum())
        return bits


class Entrant(NamedTuple):
    """A code of a view, under the choice that a stream names it by.

    Attributes
    ----------
    memories
        Returns a memory, which may learn without consequences, of the member of a place.
    """

    choice: int
    view: View
    code: Code
    memories: Callable[[int], Memory]

    @property
    def place(self) -> int:
        """The member's place in the portfolio."""
        return self.choice % RELATIVE

    def trial(self) -> Memory:
        """Return a memory of the code's that may learn without consequences."""
        return self.memories(self.place)


def promising(entrants: Sequence[Entrant]) -> list[tuple[float, Entrant]]:
    """Return the entrants that may be shortest, with the fewest bytes that they may take, likeliest first.

    Codes that count words, and plain words, are measured by the histogram of the whole tensor; a promise of theirs is
    no more than they take. Of those, only the shortest stays. The others are tried on samples. How long they end up
    follows from how the price of the sample, by the frequencies of its bytes in the whole tensor, is to the whole's;
    tables grow with the number of distinct words. A longer sample is only tried with those that are behind and may
    still win.
    """
    known = {entrant.choice: length for entrant in entrants if (length := _counted(entrant)) is not None}
    racing = [entrant for entrant in entrants if entrant.choice not in known and _may_pay(entrant)]
    ends, lowest = dict(known), dict(known)
    earlier: dict[int, tuple[float, float]] = {}
    for place in range(len(_SHARES)):
        leader = min(ends, key=ends.__getitem__, default=None)
        samples = {
            id(view): (view.sample(*places), view.price(*places))
            for view in _views(racing)
            if (places := _places(view.handle.shape, place)) is not None
        }
        for entrant in racing:
            # Of the shortest so far, no more needs to be known, but for its rivals'.
            if entrant.choice == leader or id(entrant.view) not in samples:
                continue
            view, (sample, price) = entrant.view, samples[id(entrant.view)]
            tables, payload = _tried(entrant, sample)
            payload_before, price_before = earlier.get(entrant.choice, (0.0, 0.0))
            # What stands before the weights doesn't grow with them: the end follows from two lengths.
            slope = (payload - payload_before) / max(price - price_before, _LEAST)
            growth = max(view.distinct / max(sample.distinct, 1.0), 1.0) if tables else 1.0
            end = ends[entrant.choice] = payload + slope * (view.total - price) + tables * growth
            lowest[entrant.choice] = _lowest(entrant, end, place, sample.handle.elements)
            earlier[entrant.choice] = payload, price
        if not samples:
            continue
        learning = {entrant.choice for entrant in racing if _learns(entrant.code)}
        most = min(end + (end - lowest[choice] if choice in learning else 0.0) for choice, end in ends.items())
        racing = _distinct([entrant for entrant in racing if lowest.get(entrant.choice, 0.0) <= most], ends)
        ends = known | {entrant.choice: ends[entrant.choice] for entrant in racing if entrant.choice in ends}
        if len(racing) < 2 and all(ends.get(entrant.choice) == min(ends.values()) for entrant in racing):
            break
    counted = min(
        (entrant for entrant in entrants if entrant.choice in known), key=lambda entrant: known[entrant.choice]
    )
    found = sorted([*racing, counted], key=lambda entrant: ends.get(entrant.choice, 0.0))
    return [(lowest.get(entrant.choice, 0.0), entrant) for entrant in found]


def _views(entrants: Sequence[Entrant]) -> list[View]:
    return list({id(entrant.view): entrant.view for entrant in entrants}.values())


def _counted(entrant: Entrant) -> float | None:
    """Return the bytes of a code that follow from a histogram of the whole; None of any other."""
    view, coder, transform = entrant.view, _coder(entrant.code), _transform(entrant.code)
    if isinstance(coder, Raw):
        return view.handle.nbytes
    if isinstance(coder, Entropy) and transform is None and view.words.itemsize <= _COUNTED_BYTES:
        return sum(coder.estimate(view.words))
    if isinstance(coder, Entropy) and isinstance(transform, Planes):
        # Bytes are their own planes.
        single = len(view.planes) == 1
        return math.inf if single else sum(sum(coder.estimate(plane)) for plane in view.planes)
    return None


def _transform(code: Code) -> Transform | None:
    """Return the first stage of a code behind a transform; None of any other."""
    return code.transform if isinstance(code, TransformedCode) else None


def _coder(code: Code) -> Coder | None:
    """Return the coder at a code's end; None where it ends in what learns from tensor to tensor."""
    while isinstance(code, TransformedCode):
        code = code.code
    return code.coder if isinstance(code, CoderCode) else None


def _may_pay(entrant: Entrant) -> bool:
    """Return whether a table of the distinct words may pay, for codes that have one."""
    view = entrant.view
    if not _has_table(entrant.code):
        return True
    if view.words.itemsize > _COUNTED_BYTES:
        # Integers may be numbers for what follows the table; the words of floats aren't.
        floats = view.handle.dtype.is_floating_point or view.handle.dtype.is_complex
        return not (floats and 2 * view.distinct > view.words.size)
    # Bytes with few gaps between them are as good as their places.
    span = int(view.words.max()) - int(view.words.min()) + 1
    return view.words.itemsize > 1 or view.distinct <= _FEW_OF_SPAN * span


def _tried(entrant: Entrant, sample: View) -> tuple[float, float]:
    """Return the bytes of a sample: of tables, and of the rest."""
    coder = _coder(entrant.code)
    if isinstance(coder, Entropy) and _transform(entrant.code) is None:
        return coder.estimate(sample.words)
    parts = sample.encode(entrant.code, entrant.trial()).parts
    tables = sum(len(part.data) for part in parts if part.name == "tables")
    return tables, sum(len(part.data) for part in parts) - tables


def _lowest(entrant: Entrant, end: float, place: int, weights: int) -> float:
    """Return the fewest bytes that a code may end with after the sample of a place, of so many weights."""
    if entrant.code.sequential:
        return end / _SEQUENTIAL[place]
    if _learns(entrant.code):
        samples = entrant.view.handle.elements / weights
        return end - _LEARNING * max(end - entrant.view.noise, 0) - _LEARNED / 8 * samples
    return end / _REPEATS[place]


def _has_table(code: Code) -> bool:
    """Return whether a code tells the distinct words."""
    transform = _transform(code)
    return isinstance(transform, Palette) or (transform is None and isinstance(_coder(code), Entropy))


def _learns(code: Code) -> bool:
    return isinstance(_coder(code), Context)


def _distinct(racing: Sequence[Entrant], ends: dict[int, float]) -> list[Entrant]:
    """Return entrants without those that see the same numbers as a shorter one: bytes are their own planes."""
    best: dict[int, Entrant] = {}
    for entrant in racing:
        if _learns(entrant.code) and entrant.view.words.itemsize == 1 and entrant.choice in ends:
            rival = best.setdefault(id(entrant.view), entrant)
            if ends[entrant.choice] < ends[rival.choice]:
                best[id(entrant.view)] = entrant
    return [
        entrant for entrant in racing if best.get(id(entrant.view), entrant) is entrant or not _learns(entrant.code)
    ]


def _places(shape: Shape, place: int) -> tuple[Places, Places] | None:
    """Return rows and columns of the first or second sample of a tensor; None where it isn't worth its time.

    It is higher than wide, as what is to be learned of a column shows only in many rows.
    """
    height, width = folded(shape)
    size, before = (max(int(share * height * width), _FEWEST) for share in (_SHARES[place], _SHARES[max(place - 1, 0)]))
    if size > _SHARES[-1] * height * width or (place and size < 2 * before):
        return None
    rows = min(max(math.isqrt(2 * size), size // width), height)
    return _runs(height, rows), _runs(width, size // rows)


def _runs(length: int, count: int) -> Places:
    """Return about so many places: some runs from all over a length."""
    runs = min(_RUNS, count)
    begins = np.arange(1, 2 * runs, 2) * length // (2 * runs) - count // runs // 2
    return (begins[:, None] + np.arange(count // runs)).reshape(-1)


def _entries(tensor: torch.Tensor, rows: Places, columns: Places) -> torch.Tensor:
    words = words_of(tensor).reshape(*folded(tuple(tensor.shape)), -1)[np.ix_(rows, columns)]
    return tensor_from_words(words.reshape(-1), tensor.dtype, (rows.size, columns.size))
