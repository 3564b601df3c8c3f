"""Where the network is in what a checkpoint holds: among optimiser states, copies and counters, at any depth."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from kcomplex.sources.formats.guard import Refused
from kcomplex.weights import SkippedTensor

# What a checkpoint's parts are called.
_NETWORK = re.compile(
    r"(.*[_-])?(model|net|network|module|params|parameters|weights|generator|discriminator|actor|critic|student"
    r"|state_dict)([_-]?(state|state_?dict|dict|weights|params|sd))?|state",
    re.IGNORECASE,
)
_OPTIMISER = re.compile(r"optim|(^|_)opts?($|_)", re.IGNORECASE)
_TRAINING = re.compile(
    r"sched|scaler|(^|_)amp($|_)|rng|random_state|callback|loops|hyper_?param|^args$|^config|^cfg|trainer|sampler|loader"
    r"|metric|history|^meta(data)?$",
    re.IGNORECASE,
)
_LOSS = re.compile(r"loss|criterion", re.IGNORECASE)
_FIGURE = re.compile(r"loss|acc(uracy)?($|_)|iou|score|(^|_)(train|val|valid|test|eval)_|epoch|step", re.IGNORECASE)
_COPY = re.compile(r"(^|_)(\w*ema|swa|teacher|shadow|polyak|averaged?|avg|running)(_|$)", re.IGNORECASE)
# What is called so is a copy where it has the shapes of what stands beside it.
_MAYBE_COPY = re.compile(r"(^|_)(target|best|init|initial|old|previous|last|backup)(_|$)", re.IGNORECASE)
# The same part may be nested many times: a few bytes of a hostile file could name tensors without end.
_MAX_ENTRIES = 300_000
_MAX_LETTERS = 100_000_000
_ROOTS_TOLD = 8


class Size(NamedTuple):
    """How many tensors a part of a checkpoint holds outside of optimiser states, and their elements."""

    tensors: int
    elements: int


class Tree(ABC):
    """A way to look at the nested parts of a checkpoint, in memory or as a pickle describes them."""

    def __init__(self) -> None:
        self._sizes: dict[int, Size] = {}

    @abstractmethod
    def parts(self, value: Any) -> Mapping[Any, Any] | None:
        """Return what a container holds, by its keys; None for anything else."""

    @abstractmethod
    def shape(self, value: Any) -> tuple[int, ...] | None:
        """Return the shape of a tensor, () where it isn't known; None for anything else."""

    def is_module(self, value: Any) -> bool:
        """Return whether a container is one network, whatever its parts are called."""
        return False

    @abstractmethod
    def kind(self, value: Any) -> str:
        """Return the dtype of a tensor, or what else a value is."""

    def size(self, value: Any) -> Size:
        """Return how much a part holds; what is nested several times counts several times."""
        shape = self.shape(value)
        if shape is not None:
            return Size(1, math.prod(shape))
        if id(value) not in self._sizes:
            # A part may hold itself.
            self._sizes[id(value)] = Size(0, 0)
            parts = self.parts(value)
            if parts is not None and not _is_optimiser(parts):
                self._sizes[id(value)] = _sum(self.size(part) for part in parts.values())
        return self._sizes[id(value)]


class Network(NamedTuple):
    """A network's entries by their names, and what of the checkpoint was left out."""

    entries: dict[str, Any]
    skipped: list[SkippedTensor]


def find_network(tree: Tree, value: Any, root: str = "") -> Network:
    """Return the network of a checkpoint, its nested names joined with dots.

    Parameters
    ----------
    tree, value
        How to look at the checkpoint, and the checkpoint: a mapping, a list, or a tensor (then called ``tensor``).
    root
        The way to a part of it, keys joined with dots. With a dot at the end, or for a dot alone, all that is below
        belongs to one network.

    Raises
    ------
    Refused
        There is no network, or there are several; nothing is at the root; a name isn't valid Unicode.
    """
    return _Finder(tree).find({"tensor": value} if tree.parts(value) is None else value, root)


class _Finder:
    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._skipped: list[SkippedTensor] = []
        self._entries = self._letters = 0

    def find(self, value: Any, root: str) -> Network:
        path = root.rstrip(".")
        node = self._at(value, path)
        if node is None:
            raise Refused(f"nothing is at the root {path!r:.100}. {self._roots('', self._parts(value))}")
        parts, trusted = self._parts(node), bool(root)
        if _is_optimiser(parts) and not root:
            raise Refused("the state of an optimiser, and no network: give the file of the network beside it")
        while True:
            module = self._tree.is_module(node)
            aside = {} if module else self._aside(parts)
            inner = "" if module or root.endswith(".") else self._inner(path, parts, aside, trusted)
            for name in [other for other in parts if other != inner] if inner else aside:
                self._leave(_join(path, name), name, parts[name], aside.get(name))
            if not inner:
                break
            trusted = trusted or _NETWORK.fullmatch(inner) is not None
            path, node = _join(path, inner), parts[inner]
            parts = self._parts(node)
        entries: dict[str, Any] = {}
        for name, part in parts.items():
            for full, leaf in () if name in aside else self._leaves(name, part):
                if full in entries:
                    raise Refused(f"two entries have the name {full!r:.100}")
                entries[full] = leaf
        return Network(entries, self._skipped)

    def _at(self, value: Any, path: str) -> Any:
        """Return what is at a path below a container, whose keys may hold dots too; None if there is nothing."""
        if not path:
            return value
        parts = self._parts(value)
        for end in sorted((end for end in range(len(path) + 1) if path[end : end + 1] in ("", ".")), reverse=True):
            if path[:end] in parts:
                found = self._at(parts[path[:end]], path[end + 1 :])
                if found is not None:
                    return found
        return {
            name.removeprefix(f"{path}."): part for name, part in parts.items() if name.startswith(f"{path}.")
        } or None

    def _parts(self, value: Any) -> dict[str, Any]:
        if self._tree.shape(value) is not None:
            return {"tensor": value}
        parts = self._tree.parts(value) or {}
        named = {_text(key): part for key, part in parts.items()}
        if len(named) < len(parts):
            raise Refused("two entries have one name")
        return named

    def _aside(self, parts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Return role and reason of each container that isn't the network, where something else may be."""
        aside = {}
        for name, part in parts.items():
            if self._tree.shape(part) is not None or self._tree.parts(part) is None:
                continue
            if _OPTIMISER.search(name) or (not self._tree.size(part).tensors and self._holds_optimiser(part)):
                aside[name] = "optimiser", "state of an optimiser"
            elif _TRAINING.search(name):
                aside[name] = "other", "state of training"
        others = [name for name, part in parts.items() if name not in aside and self._counts(name, part)]
        copies = [name for name in others if self._is_copy(name, parts, others)]
        if len(copies) < len(others):
            aside |= dict.fromkeys(copies, ("copy", "a copy of the network"))
        return aside

    def _holds_optimiser(self, part: Any) -> bool:
        parts = self._tree.parts(part) or {}
        return _is_optimiser(parts) or any(_is_optimiser(self._tree.parts(inner) or {}) for inner in parts.values())

    def _is_copy(self, name: str, parts: Mapping[str, Any], others: list[str]) -> bool:
        if self._tree.shape(parts[name]) is not None:
            return False
        if _COPY.search(name):
            return True
        if not _MAYBE_COPY.search(name):
            return False
        shapes = self._shapes(parts[name])
        return any(other != name and shapes <= self._shapes(parts[other]) for other in others)

    def _shapes(self, value: Any) -> set[tuple[int, ...]]:
        found, seen, waiting = set(), set(), [value]
        while waiting:
            part = waiting.pop()
            shape = self._tree.shape(part)
            if shape is not None:
                found.add(shape)
            elif id(part) not in seen:
                seen.add(id(part))
                waiting += (self._tree.parts(part) or {}).values()
        return found

    def _counts(self, name: str, part: Any) -> bool:
        """Return whether an entry may be of the network: it holds tensors, and isn't one number of the training."""
        shape = self._tree.shape(part)
        if shape is not None:
            return math.prod(shape) > 1 and not (_TRAINING.search(name) or _FIGURE.search(name))
        return self._tree.size(part).tensors > 0

    def _inner(self, path: str, parts: Mapping[str, Any], aside: Mapping[str, Any], trusted: bool) -> str:
        """Return the name of the part that is the network, or of the way to it; empty where these parts are it."""
        counted = {name: part for name, part in parts.items() if name not in aside and self._counts(name, part)}
        nested = [name for name, part in counted.items() if self._tree.shape(part) is None]
        loose = _sum(self._tree.size(part) for name, part in counted.items() if name not in nested)
        whole = _sum(self._tree.size(parts[name]) for name in nested)
        known = [name for name in nested if self._is_network(name, parts[name])]
        if nested and not trusted and (empty := [name for name, part in parts.items() if self._is_empty(name, part)]):
            raise Refused(f"{empty[0]!r:.100} is empty, where the network should be. {self._roots(path, parts)}")
        if not nested:
            if parts and not any(self._tree.size(part).tensors for name, part in parts.items() if name not in aside):
                raise Refused(f"no tensor is in it that could be of a network. {self._roots(path, parts)}")
            return ""
        if len(known) > 1:
            raise Refused(f"there are several networks. {self._roots(path, parts)}")
        if trusted:
            return nested[0] if known == nested and not loose.tensors else ""
        if known and loose.elements < self._tree.size(parts[known[0]]).elements:
            rivals = [name for name in nested if name != known[0] and not _LOSS.search(name)]
            if any(self._has_layers(parts[name]) for name in rivals) or (
                2 * self._tree.size(parts[known[0]]).elements < whole.elements
            ):
                raise Refused(f"there are several networks. {self._roots(path, parts)}")
            return known[0]
        if len(nested) == 1 and not loose.tensors:
            return nested[0]
        if loose.tensors and (len(nested) == 1 or loose.elements >= whole.elements):
            return ""
        raise Refused(f"there are several networks. {self._roots(path, parts)}")

    def _is_network(self, name: str, part: Any) -> bool:
        plain = not isinstance(part, (list, tuple))
        return plain and _NETWORK.fullmatch(name) is not None and _LOSS.search(name) is None

    def _is_empty(self, name: str, part: Any) -> bool:
        empty = not isinstance(part, (list, tuple)) and self._tree.parts(part) == {}
        return empty and _NETWORK.fullmatch(name) is not None

    def _has_layers(self, value: Any) -> bool:
        """Return whether a matrix is in a part that is called as layers of torch call theirs."""
        return any(
            name.endswith("weight") and len(self._tree.shape(leaf) or ()) > 1 for name, leaf in self._leaves("", value)
        )

    def _roots(self, path: str, parts: Mapping[str, Any]) -> str:
        """Return what there is, and how to say which of it is meant."""
        sizes = {_join(path, name): self._tree.size(part) for name, part in parts.items()}
        roots = {name: size for name, size in sizes.items() if size.tensors}
        if not roots:
            listed = ", ".join(f"{name!r:.50} ({self._tree.kind(part):.60})" for name, part in list(parts.items())[:8])
            return f"There are {listed or 'no entries'}"
        largest = sorted(roots, key=lambda name: -roots[name].elements)[:_ROOTS_TOLD]
        listed = ", ".join(
            f"{name!r:.50} ({roots[name].tensors:,} tensors, {roots[name].elements:,} weights)" for name in largest
        )
        more = f" and {len(roots) - len(largest)} more" if len(roots) > len(largest) else ""
        whole = f"{path}." if path else "."
        return f"Say which with --root KEY (in Python root=): {listed}{more}; or {whole!r:.100} for all as one"

    def _leave(self, path: str, name: str, value: Any, why: tuple[str, str] | None) -> None:
        """List a part that isn't of the network, tensor by tensor where it holds some."""
        if why is None and not self._counts(name, value):
            why = "other", "beside the network"
        role, reason = why or ("", "beside the network: --root reads it")
        leaves = [(full, leaf) for full, leaf in self._leaves(path, value) if self._tree.shape(leaf) is not None]
        for full, leaf in leaves:
            shape = self._tree.shape(leaf)
            self._skipped.append(SkippedTensor(full, reason, shape, self._tree.kind(leaf), role))
        if not leaves:
            self._skipped.append(SkippedTensor(path, f"beside the network: {self._tree.kind(value)}", role="other"))

    def _leaves(self, path: str, value: Any, above: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
        """Yield names and values of what isn't a container, and of containers without tensors."""
        self._entries += 1
        self._letters += len(path)
        if self._entries > _MAX_ENTRIES or self._letters > _MAX_LETTERS:
            raise Refused("more entries, or longer names, than any checkpoint has")
        parts = None if self._tree.shape(value) is not None else self._tree.parts(value)
        if not parts or id(value) in above or not (_is_optimiser(parts) or self._holds_tensors(value)):
            yield path, value
            return
        for name, part in self._parts(value).items():
            yield from self._leaves(_join(path, name), part, above | {id(value)})

    def _holds_tensors(self, value: Any) -> bool:
        return self._tree.size(value).tensors > 0 or self._holds_optimiser(value)


def _is_optimiser(parts: Mapping[Any, Any]) -> bool:
    return "state" in parts and "param_groups" in parts


def _sum(sizes: Iterable[Size]) -> Size:
    tensors = elements = 0
    for size in sizes:
        tensors, elements = tensors + size.tensors, elements + size.elements
    return Size(tensors, elements)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _text(key: Any) -> str:
    name = str(key)
    # Pickles write surrogates as they are, and a name with one can be neither printed nor stored.
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise Refused(f"the name {name!r:.100} isn't valid Unicode: rename it")
    return name
