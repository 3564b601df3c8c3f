"""Where the network is in what a checkpoint holds: among optimiser states, copies and counters, at any depth."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from os.path import commonprefix
from typing import Any, NamedTuple

from kcomplex.sources.formats.guard import Refused
from kcomplex.weights import ROLES, SkippedTensor, is_unicode

# What a checkpoint's parts are called.
_NETWORK = re.compile(
    r"(.*[_-])?(model|net|network|module|params|parameters|weights|generator|discriminator|actor|critic|student"
    r"|state_dict)([_-]?(state|state_?dict|dict|weights|params|sd))?|state",
    re.IGNORECASE,
)
# What a copy of the network is called that is averaged while it trains, or lags behind it.
COPY = re.compile(
    r"((model|net|network|params|state_dict|swa)_(ema|swa)|ema(_(model|net|params))?|swa(_model)?|shadow(_params)?"
    r"|averaged_model|teacher|momentum_encoder|encoder_k|target_(net|network))(_state(_dict)?)?",
    re.IGNORECASE,
)
# What else is called so is a copy, as a whole part of a checkpoint: the names and shapes of a network are asked too.
_NESTED_COPY = re.compile(
    r"ema_.+|.+_ema|(best|old|previous|backup)(_(model|net|network|params|weights|state|dict))*|hyper_?param(eter)?s",
    re.IGNORECASE,
)
# What may hold weights of its own beside its state, where it trains in another precision.
_OPTIMISER = re.compile(r"optim(i[sz]er)?s?(_states?(_dict)?)?|opts?", re.IGNORECASE)
# What the figures of training are called, among them states of what draws numbers.
_FIGURE = re.compile(
    r"((train|training|val|valid|validation|test|eval|best|min|max|global|running)_)*(loss(es)?|criterion|acc(uracy)?\d*"
    r"|prec(ision)?\d*|recall|m?iou|m?ap|f1|auc|psnr|scores?|metrics?|fitness|epochs?|(global_?)?steps?|iter(ation)?s?"
    r"|history|lr|learning_rate|(lr_?)?sched(uler)?s?|(grad_?|loss_?)?scaler|amp|rng|random|hyper_?param(eter)?s"
    r"|args|config|cfg|meta(data)?|callbacks|loops|trainer|(data_?)?(sampler|loader))(_(states?|dict|history))*",
    re.IGNORECASE,
)
_LOSS = re.compile(r"(.*_)?(loss(es)?|criterion)(_.*)?", re.IGNORECASE)
# The state of torch's random numbers has about five thousand bytes.
_FIGURE_ELEMENTS = 10_000
# The same part may be nested many times: a few bytes of a hostile file could name tensors without end.
_MAX_ENTRIES = 300_000
_MAX_LETTERS = 100_000_000
_ROOTS_TOLD = 8
_NamedShapes = frozenset[tuple[str, tuple[int, ...]]]


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

    @abstractmethod
    def is_tensor(self, value: Any) -> bool:
        """Return whether a value is one tensor, even one that is looked at as its parts."""

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
    """A network's entries, and what of the checkpoint was left out.

    Attributes
    ----------
    entries
        Value and role by name: what the network holds has the role ``weight``; copies of it and states of optimisers
        have theirs, and names that begin with their place.
    skipped
        Whatever else was left out.
    """

    entries: dict[str, tuple[Any, str]]
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
        self._beside: dict[str, tuple[Any, str]] = {}
        self._optimisers: dict[int, bool] = {}
        self._named: dict[int, tuple[_NamedShapes, _NamedShapes]] = {}
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
            aside = {} if module or root.endswith(".") else self._aside(parts, trusted)
            inner = "" if module or root.endswith(".") else self._inner(path, parts, aside, trusted)
            for name in [other for other in parts if other != inner] if inner else aside:
                self._leave(_join(path, name), name, parts[name], aside.get(name))
            if not inner:
                break
            trusted = trusted or _NETWORK.fullmatch(inner) is not None
            path, node = _join(path, inner), parts[inner]
            parts = self._parts(node)
        entries: dict[str, tuple[Any, str]] = {}
        for name, part in parts.items():
            for full, leaf in () if name in aside else self._leaves(name, part):
                if full in entries:
                    raise Refused(f"two entries have the name {full!r:.100}")
                entries[full] = leaf, "weight"
        # A name of the network may look like the place of a copy.
        for name in self._beside.keys() & entries:
            value, role = self._beside[name]
            reason = "beside the network, which has its name too"
            self._skipped.append(SkippedTensor(name, reason, self._tree.shape(value), self._tree.kind(value), role))
        return Network(self._beside | entries, self._skipped)

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

    def _aside(self, parts: Mapping[str, Any], trusted: bool) -> dict[str, str]:
        """Return the role of each part that isn't of the network: what it holds says so, and mostly its name, too."""
        aside = {}
        for name, part in parts.items():
            if self._is_layer(part):
                continue
            if self._holds_optimiser(part) and (not self._tree.size(part).tensors or _OPTIMISER.fullmatch(name)):
                aside[name] = "optimiser"
            elif not trusted and self._is_figure(name, part):
                aside[name] = "other"
        return aside if trusted else dict.fromkeys(self._copies(parts), "copy") | aside

    def _copies(self, parts: Mapping[str, Any]) -> list[str]:
        """Return the parts that are called copies, and have the names and shapes of what is called a network."""
        nested = {name: part for name, part in parts.items() if not self._is_layer(part)}
        called = [name for name in nested if COPY.fullmatch(name) or _NESTED_COPY.fullmatch(name)]
        networks = [nested[name] for name in nested.keys() - called if self._is_network(name, nested[name])]
        # A hostile file may nest one part under many names.
        held = _NamedShapes().union(
            *(named for part in {id(part): part for part in networks}.values() for named in self._named_shapes(part))
        )
        same = {
            key
            for key, part in {id(nested[name]): nested[name] for name in called}.items()
            if any(named and named <= held for named in self._named_shapes(part))
        }
        return [name for name in called if id(nested[name]) in same]

    def _is_layer(self, part: Any) -> bool:
        """Return whether a part is a tensor, or the pair of a quantised tensor and its bias that torch.ao keeps."""
        if self._tree.is_tensor(part):
            return True
        inner = part if isinstance(part, (list, tuple)) else ()
        return any(self._tree.is_tensor(one) and self._tree.shape(one) is None for one in inner[:2])

    def _holds_optimiser(self, value: Any) -> bool:
        if self._tree.is_tensor(value):
            return False
        if id(value) not in self._optimisers:
            # A part may hold itself.
            self._optimisers[id(value)] = False
            parts = self._tree.parts(value) or {}
            self._optimisers[id(value)] = _is_optimiser(parts) or any(map(self._holds_optimiser, parts.values()))
        return self._optimisers[id(value)]

    def _named_shapes(self, value: Any) -> tuple[_NamedShapes, _NamedShapes]:
        """Return names and shapes of a part's tensors with dimensions, and these without what all names begin with."""
        if id(value) not in self._named:
            leaves = [(name, shape) for name, leaf in self._leaves("", value) if (shape := self._tree.shape(leaf))]
            start = commonprefix([name for name, _ in leaves]).rfind(".") + 1  # noqa: RUF071 - names, and no paths
            self._named[id(value)] = frozenset(leaves), frozenset((name[start:], shape) for name, shape in leaves)
        return self._named[id(value)]

    def _is_figure(self, name: str, part: Any) -> bool:
        """Return whether a part is called a figure of training, and holds nothing but numbers and short vectors."""
        size = self._tree.size(part)
        if not size.tensors or size.elements > _FIGURE_ELEMENTS or not _FIGURE.fullmatch(name):
            return False
        return all(len(self._tree.shape(leaf) or ()) <= 1 for _, leaf in self._leaves("", part))

    def _counts(self, name: str, part: Any) -> bool:
        """Return whether an entry may be of the network: it holds tensors, and is no figure of the training."""
        return self._tree.size(part).tensors > 0 and not self._is_figure(name, part)

    def _inner(self, path: str, parts: Mapping[str, Any], aside: Mapping[str, Any], trusted: bool) -> str:
        """Return the name of the part that is the network, or of the way to it; empty where these parts are it."""
        counted = {name: part for name, part in parts.items() if name not in aside and self._counts(name, part)}
        nested = [name for name, part in counted.items() if not self._is_layer(part)]
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
            rivals = [name for name in nested if name != known[0] and not _LOSS.fullmatch(name)]
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
        return plain and _NETWORK.fullmatch(name) is not None and _LOSS.fullmatch(name) is None

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

    def _leave(self, path: str, name: str, value: Any, role: str | None) -> None:
        """Keep or list a part that isn't of the network, tensor by tensor where it holds some."""
        if role is None:
            role = "" if self._counts(name, value) else "other"
        reason = "beside the network" if role else "beside the network: --root reads it"
        leaves = [(full, leaf) for full, leaf in self._leaves(path, value) if self._tree.shape(leaf) is not None]
        for full, leaf in leaves:
            if role in ROLES and full not in self._beside:
                self._beside[full] = leaf, role
            else:
                self._skipped.append(SkippedTensor(full, reason, self._tree.shape(leaf), self._tree.kind(leaf), role))
        if not leaves:
            self._skipped.append(SkippedTensor(path, f"beside the network: {self._tree.kind(value)}", role="other"))

    def _leaves(self, path: str, value: Any, above: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
        """Yield names and values of what isn't a container, and of containers without tensors."""
        self._entries += 1
        self._letters += len(path)
        if self._entries > _MAX_ENTRIES or self._letters > _MAX_LETTERS:
            raise Refused("more entries, or longer names, than any checkpoint has")
        if self._tree.shape(value) is not None or id(value) in above or not self._holds_tensors(value):
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
    if not is_unicode(name):
        raise Refused(f"the name {name!r:.100} isn't valid Unicode: rename it")
    return name
