"""Which given tensor is known for which of one's own: by name, whatever wrapper or prefix stands in it.

An encoder looks at both sides and settles on one `Naming`. The stream tells it, so that a decoder finds the same given
tensor from a tensor's own names, dtype and shape, whatever else is in the stream.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from kcomplex.errors import StreamError, WeightsError
from kcomplex.estimators.description import GivenMatch, shape_text, some
from kcomplex.estimators.duplicates import Distinct
from kcomplex.estimators.structure import Reader, TensorEntry, text_bytes, varint
from kcomplex.weights import TensorHandle, Weights, tensor_from_words, words_an_element, words_of

# What torch.compile, DataParallel, FSDP, activation checkpointing, Fabric, Opacus and PEFT put around a module.
_WRAPPERS = (
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_module",
    "_orig_mod",
    "base_layer",
    "module",
)
# Beginnings of segments that only the names of an adapter's tensors have.
_ADAPTERS = ("lora", "dora", "loha", "hada_", "lokr_", "ia3_", "oft_", "boft_", "vera_", "prompt_")
# Segments of a prefix, at most.
_LONGEST_PREFIX = 8

Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Naming:
    """What is done to the name of a tensor that isn't given under it as it is.

    Attributes
    ----------
    wrappers
        Segments that are left out of it, and of given names, wherever they stand.
    removed, added
        A prefix that is then taken off it, and one that is put before it: one of them is empty.
    others
        One more name of a tensor, by its own: that of a later tensor which is the same.
    """

    wrappers: Names = ()
    removed: str = ""
    added: str = ""
    others: Mapping[str, str] = field(default_factory=dict, hash=False)

    def renamed(self, name: str) -> str | None:
        """Return the name that a tensor may be given under; None where it hasn't got the prefix."""
        bare = _without(name, self.wrappers)
        return self.added + bare.removeprefix(self.removed) if bare.startswith(self.removed) else None

    @property
    def text(self) -> str:
        """What is done, to be read; empty where names stay as they are."""
        changes = [f"wrapper {name!r}" for name in self.wrappers]
        if self.removed or self.added:
            changes.insert(0, f"prefix {self.removed + self.added!r}")
        return " and ".join(changes)

    def to_bytes(self) -> bytes:
        """Return what a stream tells: a length and so many bytes, none where names stay as they are."""
        body = b""
        if self.text or self.others:
            for texts in (self.wrappers, (self.removed, self.added), self.others, self.others.values()):
                body += varint(len(texts)) + b"".join(map(text_bytes, texts))
        return varint(len(body)) + body

    @staticmethod
    def read(reader: Reader) -> Naming:
        """Return what `to_bytes` made.

        Raises
        ------
        StreamError
            It isn't there, as in streams of earlier versions, or damaged.
        """
        if not reader.left:
            raise StreamError("the stream doesn't tell how given tensors are called: encode the weights anew")
        body = Reader(reader.take(reader.varint()))
        if not body.left:
            return Naming()
        wrappers, prefixes, own, others = ([body.text() for _ in range(body.count())] for _ in range(4))
        if len(prefixes) != 2 or len(own) != len(others) or body.left:
            raise StreamError("what the stream tells of the names of given tensors is corrupted")
        removed, added = prefixes
        return Naming(tuple(wrappers), removed, added, dict(zip(own, others, strict=True)))


class Found(NamedTuple):
    """A given tensor, and whether the name that it was found by was changed."""

    handle: TensorHandle
    renamed: bool


class GivenTensors:
    """Given weights, found by the names of others."""

    def __init__(self, weights: Weights, naming: Naming) -> None:
        self.naming = naming
        self._exact = _by_name(weights)
        self._bare = _by_name(weights, naming.wrappers)

    def named(self, names: Names) -> Iterator[Found]:
        """Yield the given tensors of names, of whatever shape."""
        names = (*names, *(self.naming.others[name] for name in names[:1] if name in self.naming.others))
        yield from (Found(self._exact[name], False) for name in names if name in self._exact)
        if self.naming.text:
            renamed = map(self.naming.renamed, names)
            yield from (Found(self._bare[name], True) for name in renamed if name is not None and name in self._bare)

    def find(self, names: Names, tensor: TensorHandle | TensorEntry) -> Found | None:
        """Return the first of them that is of use for a tensor of that dtype and shape; None where there is none."""
        return next((found for found in self.named(names) if _fits(found.handle, tensor)), None)

    def known(self, names: Names, tensor: TensorHandle | TensorEntry) -> torch.Tensor | None:
        """Return what is known of a tensor: one of its shape, of any dtype; None where there is none.

        Rows that the given one has too many are cut off, those that it lacks are zeros.
        """
        found = self.find(names, tensor)
        if found is None:
            return None
        known = found.handle.read()
        if found.handle.shape == tensor.shape:
            return known
        words = words_of(known)
        fitted = np.zeros(math.prod(tensor.shape) * words_an_element(known.dtype), words.dtype)
        fitted[: words.size] = words[: fitted.size]
        return tensor_from_words(fitted, known.dtype, tensor.shape)


def match(weights: Weights, distinct: Distinct, given: Weights) -> tuple[Naming, GivenMatch]:
    """Return the naming by which most tensors find a given one, and which do.

    Parameters
    ----------
    weights, distinct
        What is to be coded, with and without tensors that are the same as an earlier one.
    given
        What is known.

    Raises
    ------
    WeightsError
        There are tensors, and none of them is given.
    """
    coded = distinct.weights
    same: dict[str, Names] = dict.fromkeys(coded, ())
    for name, original in distinct.originals.items():
        if not original.transposed and weights[name].shape == weights[original.name].shape:
            same[original.name] += _names(weights[name])
    naming = _most_matching(coded, same, given)
    tensors = GivenTensors(given, naming)
    others = {}
    for name, handle in coded.items():
        found_by = [other for other in same[name] if tensors.find((other,), handle) is not None]
        if found_by and tensors.find(_names(handle), handle) is None:
            others[name] = found_by[0]
    tensors = GivenTensors(given, replace(naming, others=others))
    found = {name: tensors.find(_names(handle), handle) for name, handle in coded.items()}
    unmatched = tuple(_unmatched(handle, tensors) for name, handle in coded.items() if found[name] is None)
    if weights and len(unmatched) == len(coded):
        raise WeightsError(_none_matched(weights, given, unmatched))
    # What is the same as an earlier tensor is given where that one is.
    hits = [(name, found[distinct.originals[name].name if name in distinct.originals else name]) for name in weights]
    matched = [name for name, hit in hits if hit is not None]
    told = GivenMatch(
        tensors=len(weights),
        matched=len(matched),
        raw_bytes=weights.nbytes,
        matched_bytes=sum(weights[name].nbytes for name in matched),
        renamed=sum(hit is not None and hit.renamed for _, hit in hits),
        naming=naming.text,
        resized=sum(hit is not None and hit.handle.shape != coded[name].shape for name, hit in found.items()),
        unmatched=unmatched,
    )
    return tensors.naming, told


def _most_matching(coded: Weights, same: Mapping[str, Names], given: Weights) -> Naming:
    """Return the naming by which most of the tensors that aren't given under a name of theirs find one.

    Of several, the simplest is taken.
    """
    exact = GivenTensors(given, Naming())
    called = {name: (*_names(handle), *same[name]) for name, handle in coded.items()}
    missing = [handle for name, handle in coded.items() if exact.find(called[name], handle) is None]
    names = [*_by_name(given), *(name for handle in missing for name in called[handle.name])]
    segments = {segment for name in names for segment in name.split(".")}
    votes: Counter[Naming] = Counter()
    for wrappers in {(), tuple(name for name in _WRAPPERS if name in segments)}:
        bare = _by_name(given, wrappers)
        longer: dict[str, list[tuple[str, TensorHandle]]] = {}
        for name, there in bare.items():
            for prefix, rest in _split(name):
                longer.setdefault(rest, []).append((prefix, there))
        for handle in missing:
            fitting: set[Naming] = set()
            for name in (_without(name, wrappers) for name in called[handle.name]):
                found = [(Naming(wrappers, "", prefix), there) for prefix, there in longer.get(name, ())]
                found += [(Naming(wrappers, prefix), bare[rest]) for prefix, rest in _split(name) if rest in bare]
                fitting |= {naming for naming, there in found if _fits(there, handle)}
            votes.update(fitting)

    def preference(naming: Naming) -> tuple[int, bool, int, str, str]:
        length = -len(naming.removed + naming.added)
        return votes[naming], not naming.wrappers, length, naming.removed, naming.added

    return max(votes, key=preference, default=Naming())


def _fits(there: TensorHandle, tensor: TensorHandle | TensorEntry) -> bool:
    """Return whether a given tensor is of use: it has the same shape, or a few more or fewer rows."""
    if there.shape == tensor.shape:
        return bool(there.elements) or there.dtype == tensor.dtype
    if not (there.elements and there.shape and tensor.shape) or there.shape[1:] != tensor.shape[1:]:
        return False
    fewer, more = sorted((there.shape[0], tensor.shape[0]))
    return 2 * fewer >= more


def _names(handle: TensorHandle) -> Names:
    return (handle.name, *handle.aliases)


def _by_name(weights: Weights, wrappers: Names = ()) -> dict[str, TensorHandle]:
    """Return tensors by all their names without wrappers; of several, the one whose name is shortest."""
    named = {name: handle for handle in weights.values() for name in _names(handle)}
    return {_without(name, wrappers): named[name] for name in sorted(named, key=len, reverse=True)}


def _without(name: str, wrappers: Names) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in wrappers) if wrappers else name


def _split(name: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to split a name into a prefix, empty or with its dot, and a rest."""
    rest = name
    for _ in range(_LONGEST_PREFIX + 1):
        yield name[: len(name) - len(rest)], rest
        _, _, rest = rest.partition(".")
        if not rest:
            return


def _unmatched(handle: TensorHandle, tensors: GivenTensors) -> str:
    """Return the name of a tensor that isn't given; where one of its name is, with both shapes."""
    there = next(tensors.named(_names(handle)), None)
    shapes = "" if there is None else f" ({shape_text(handle.shape)}, given as {shape_text(there.handle.shape)})"
    return handle.name + shapes


def _none_matched(weights: Weights, given: Weights, unmatched: Names) -> str:
    adapter = any(segment.startswith(_ADAPTERS) for name in weights for segment in name.split("."))
    advice = (
        "these are an adapter's: merge it into its base (merge_and_unload in PEFT) and take the outcome, or take the "
        "adapter alone"
        if adapter
        else "give the weights that these were made from, or leave them out"
    )
    return (
        f"{weights.source}: none of its {len(weights)} tensors is given by {given.source}: here {some(unmatched)}; "
        f"there {some(tuple(given))}; {advice}"
    )
