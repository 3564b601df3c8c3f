"""Weights: the named tensors of one checkpoint, or of a model at one moment, read tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import WeightsError
from kcomplex.machine.closing import Closing

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

# Width of a word in bytes, and words an element: a complex number is two words, its real and its imaginary part.
_LAYOUT: dict[torch.dtype, tuple[int, int]] = {
    torch.float64: (8, 1),
    torch.float32: (4, 1),
    torch.float16: (2, 1),
    torch.bfloat16: (2, 1),
    torch.float8_e4m3fn: (1, 1),
    torch.float8_e4m3fnuz: (1, 1),
    torch.float8_e5m2: (1, 1),
    torch.float8_e5m2fnuz: (1, 1),
    torch.float8_e8m0fnu: (1, 1),
    torch.int8: (1, 1),
    torch.int16: (2, 1),
    torch.int32: (4, 1),
    torch.int64: (8, 1),
    torch.uint8: (1, 1),
    torch.uint16: (2, 1),
    torch.uint32: (4, 1),
    torch.uint64: (8, 1),
    torch.bool: (1, 1),
    torch.complex32: (2, 2),
    torch.complex64: (4, 2),
    torch.complex128: (8, 2),
}
DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in _LAYOUT}
# Bits of the dtypes that files have and torch has none for.
OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

# What a tensor is to the network. The first are counted unless somebody says otherwise, the others are not.
COUNTED = ("weight", "bias", "norm", "statistic")
LEFT_OUT = ("buffer", "mask", "constant", "latent", "copy", "optimiser", "packed")
ROLES = (*COUNTED, *LEFT_OUT)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the plain name of a torch dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def word_dtype(dtype: torch.dtype) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the NumPy unsigned integer that holds one word of a torch dtype."""
    return np.dtype(f"u{_LAYOUT[dtype][0]}")


def words_an_element(dtype: torch.dtype) -> int:
    """Return how many words one element takes: 2 for complex dtypes, 1 for all others."""
    return _LAYOUT[dtype][1]


def words_of(tensor: torch.Tensor) -> Words:
    """Return the bit patterns of a tensor, flat in C order, zero-copy where the tensor is contiguous on the CPU.

    Returns
    -------
    ndarray of shape (elements * words_an_element,)
        Unsigned integers of the dtype's width; a complex element gives its real, then its imaginary part.
    """
    if not tensor.numel():
        # An empty tensor may have a stride of zero, which no view takes.
        return np.empty(0, word_dtype(tensor.dtype))
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu")
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    plain = plain.contiguous()
    # A single element counts as contiguous whatever its stride, and no view takes that stride.
    plain = plain.as_strided((plain.numel(),), (1,))
    words: Words = plain.view(torch.uint8).numpy().view(word_dtype(tensor.dtype))
    return words


def tensor_from_words(words: NDArray[np.integer[Any]], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor that `words_of` gave these words for (a copy)."""
    plain = np.ascontiguousarray(words.reshape(-1), word_dtype(dtype)).view(np.uint8)
    # By way of bytes, because making an empty complex32 tensor warns.
    data = torch.empty(plain.size, dtype=torch.uint8)
    data.numpy()[:] = plain
    return data.view(dtype).reshape(shape)


def values_of(tensor: torch.Tensor) -> NDArray[np.floating[Any]]:
    """Return the values of a tensor in its own shape: float64 for float64 and integers, float32 for shorter floats.

    A complex tensor gets a last axis of length 2 (real, imaginary).
    """
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu")
    if plain.is_complex():
        plain = torch.view_as_real(plain.to(torch.complex64) if plain.dtype == torch.complex32 else plain)
    wide = plain.dtype == torch.float64 or not plain.is_floating_point()
    values: NDArray[np.floating[Any]] = plain.to(torch.float64 if wide else torch.float32).numpy()
    return values


def squared_error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the sum of squared differences between two tensors' values, in double precision."""
    # In one order, whatever that of the memory is: sums in another differ in their last bits.
    difference = values_of(one).astype(np.float64, order="C")
    difference -= values_of(other)
    return float(np.square(difference, out=difference).sum())


@dataclass(frozen=True)
class TensorHandle:
    """One named tensor that reads itself on demand.

    Attributes
    ----------
    name, shape, dtype
        As stored.
    load
        Returns the tensor; called anew at every read, so that nothing is kept in memory.
    load_range
        Returns the elements from one place to another of the flat tensor; None where the source has no cheaper way to
        them than the whole.
    aliases
        Other names of the same storage. The tensor counts once.
    trainable
        Whether it is a parameter with ``requires_grad``; None where the source doesn't say.
    role
        What it is to the network, one of `ROLES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    load_range: Callable[[int, int], torch.Tensor] | None = field(default=None, repr=False, compare=False, kw_only=True)
    aliases: tuple[str, ...] = ()
    trainable: bool | None = None
    role: str = "weight"

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorHandle:
        """Return the handle of a tensor that is in memory."""
        return cls(name, tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))

    @property
    def elements(self) -> int:
        """Number of weights (a complex number is one weight)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Raw size in bytes."""
        width, words = _LAYOUT[self.dtype]
        return self.elements * width * words

    def read(self) -> torch.Tensor:
        """Return the tensor, on the CPU where its source keeps it there; it may share memory with the source.

        Raises
        ------
        FormatError
            The source turns out to be truncated or corrupted.
        """
        return self.load()

    def read_range(self, start: int, stop: int) -> torch.Tensor:
        """Return the elements from one place to another of the flat tensor; see `read`."""
        return self.read().reshape(-1)[start:stop] if self.load_range is None else self.load_range(start, stop)

    def words(self) -> Words:
        """Return the flat bit patterns; see `words_of`."""
        return words_of(self.read())

    def values(self) -> NDArray[np.floating[Any]]:
        """Return the values as floats in the tensor's shape; see `values_of`."""
        return values_of(self.read())


@dataclass(frozen=True)
class SkippedTensor:
    """Something that was left out, and why.

    Attributes
    ----------
    name, reason
        What it is called, and why it was left out.
    shape, dtype
        Of a tensor, where they are known; an entry of another kind has none.
    role
        What it is to the network, one of `ROLES`; ``selection`` where the caller left it out; empty where it could not
        be read, which may mean that weights are missing.
    other
        The tensor that it is folded into, and counted as, or a copy of; empty for most.
    """

    name: str
    reason: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    role: str = ""
    other: str = ""

    @classmethod
    def of(cls, handle: TensorHandle, reason: str, role: str, other: str = "") -> SkippedTensor:
        """Return that a tensor was left out."""
        return cls(handle.name, reason, handle.shape, dtype_name(handle.dtype), role, other)

    @property
    def why(self) -> str:
        """The reason, and the other tensor that it speaks of."""
        return f"{self.reason} {self.other}" if self.other else self.reason

    @property
    def folded(self) -> bool:
        """Whether it is counted as the tensor that it is folded into."""
        return bool(self.other) and self.role != "copy"

    @property
    def elements(self) -> int:
        """Number of its weights as far as that is known."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def nbytes(self) -> int:
        """Raw size in bytes as far as that is known."""
        bits = 8 * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else OTHER_BITS.get(self.dtype, 0)
        return -(-self.elements * bits // 8)


@dataclass(frozen=True)
class Coverage:
    """How much of its source a number is the number of.

    Attributes
    ----------
    tensors, of_tensors
        Tensors measured, and tensors that the source holds; what shares memory is one tensor, and so is what is folded
        into one.
    nbytes, of_bytes
        The same in bytes, as far as sizes are known.
    left_out
        How many tensors and other entries were left out, by reason.
    """

    tensors: int
    of_tensors: int
    nbytes: int
    of_bytes: int
    left_out: Mapping[str, int]

    @classmethod
    def of(cls, tensors: int, nbytes: int, skipped: Iterable[SkippedTensor]) -> Self:
        """Return the coverage of so many tensors and bytes beside what was left out."""
        skipped = list(skipped)
        others = [item for item in skipped if item.shape is not None and not item.folded]
        reasons = Counter(item.reason if item.role not in ROLES else item.role for item in skipped if not item.folded)
        of_bytes = nbytes + sum(item.nbytes for item in others)
        return cls(tensors, tensors + len(others), nbytes, of_bytes, dict(reasons))

    @property
    def share(self) -> float:
        """Share of the source's bytes that was measured, 0 to 1; NaN where there are none."""
        return self.nbytes / self.of_bytes if self.of_bytes else math.nan

    def __str__(self) -> str:
        told = f"{self.tensors:,} of {self.of_tensors:,} tensors"
        if self.of_bytes:
            told += f", {100 * self.share:.4g} % of {self.of_bytes:,} bytes"
        left_out = "; ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return f"{told}; left out: {left_out}" if left_out else told


class Weights(Closing, Mapping[str, TensorHandle]):
    """The named tensors of one source, sorted by name so that every format gives the same order.

    Parameters
    ----------
    tensors
        Handles with distinct names.
    skipped
        What was left out, with reasons.
    source
        What the weights came from, for messages and tables.
    resources
        Closed by `close`: open files and memory maps.
    selection
        What the caller chose of the source, as `select` was told; empty for what is chosen without a wish.

    Raises
    ------
    WeightsError
        Two tensors have one name, or a name isn't valid Unicode.
    """

    def __init__(
        self,
        tensors: Iterable[TensorHandle],
        skipped: Iterable[SkippedTensor] = (),
        source: str = "",
        resources: ExitStack | None = None,
        selection: str = "",
    ) -> None:
        self.source = source
        self.selection = selection
        self.skipped = tuple(sorted(skipped, key=lambda item: item.name))
        self._resources = resources or ExitStack()
        self._tensors: dict[str, TensorHandle] = {}
        for handle in sorted(tensors, key=lambda item: item.name):
            for name in (handle.name, *handle.aliases):
                if not is_unicode(name):
                    raise WeightsError(f"{source}: the tensor name {name!r} isn't valid Unicode: rename it")
            if handle.name in self._tensors:
                raise WeightsError(f"{source}: two tensors are called {handle.name!r}")
            self._tensors[handle.name] = handle

    def __getitem__(self, name: str) -> TensorHandle:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Weights {self.source}: {len(self)} tensors, {self.elements:,} weights, {self.nbytes:,} bytes>"

    @property
    def elements(self) -> int:
        """Number of weights in all tensors."""
        return sum(handle.elements for handle in self.values())

    @property
    def nbytes(self) -> int:
        """Raw size of all tensors in bytes."""
        return sum(handle.nbytes for handle in self.values())

    @property
    def coverage(self) -> Coverage:
        """How much of the source these weights are."""
        return Coverage.of(len(self), self.nbytes, self.skipped)

    def select(
        self, include: str | Iterable[str] = (), exclude: str | Iterable[str] = (), *, trainable: bool | None = None
    ) -> Weights:
        """Return the weights whose names match; what is left out is listed in `skipped`.

        Parameters
        ----------
        include, exclude
            Shell-style globs on names and aliases, case-sensitive; a string is one pattern. No include pattern means
            everything.
        trainable
            Keep only trainable (True) or only other (False) tensors.

        Raises
        ------
        WeightsError
            An include pattern matches nothing, nothing is left, or the source doesn't say what is trainable.
        """
        include, exclude = as_patterns(include), as_patterns(exclude)
        for pattern in include:
            if not any(_matches(handle, (pattern,)) for handle in self.values()):
                left_out = [item for item in self.skipped if item.role in ROLES and fnmatchcase(item.name, pattern)]
                if left_out:
                    raise WeightsError(
                        f"{self.source}: {pattern!r} matches {left_out[0].name!r}, which has the role "
                        f"{left_out[0].role!r} and is left out: count that too (--count {left_out[0].role})"
                    )
                raise WeightsError(f"{self.source}: no tensor matches {pattern!r}; there are {self._some_names()}")
        if trainable is not None and any(handle.trainable is None for handle in self.values()):
            raise WeightsError(f"{self.source}: a file doesn't say what is trainable; select by name instead")
        kept, skipped = [], list(self.skipped)
        for handle in self.values():
            reason = ""
            if include and not _matches(handle, include):
                reason = "not included"
            elif _matches(handle, exclude):
                reason = "excluded"
            elif trainable is not None and handle.trainable != trainable:
                reason = "not trainable" if trainable else "trainable"
            if reason:
                skipped.append(SkippedTensor.of(handle, reason, "selection"))
            else:
                kept.append(handle)
        if self and not kept:
            raise WeightsError(f"{self.source}: the selection leaves no tensor of {self._some_names()}")
        wishes = [f"include={pattern}" for pattern in include] + [f"exclude={pattern}" for pattern in exclude]
        if trainable is not None:
            wishes.append(f"trainable={trainable}")
        return self.with_tensors(kept, skipped, ",".join(filter(None, (self.selection, *wishes))))

    def with_tensors(
        self, tensors: Iterable[TensorHandle], skipped: Iterable[SkippedTensor], selection: str | None = None
    ) -> Weights:
        """Return other tensors of the same source, which share its open files."""
        chosen = self.selection if selection is None else selection
        return Weights(tensors, skipped, self.source, self._resources, chosen)

    def close(self) -> None:
        """Close the files behind the weights; reading a tensor afterwards is an error."""
        self._resources.close()

    def _some_names(self) -> str:
        names = list(self._tensors)
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Return patterns as a tuple; a string is one pattern, not its letters.

    Raises
    ------
    WeightsError
        They aren't texts.
    """
    if isinstance(patterns, str):
        return (patterns,)
    told = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in told):
        raise WeightsError(f"names, patterns and roles are texts, not {patterns!r:.80}")
    return told


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: names from a pickle may hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _matches(handle: TensorHandle, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (handle.name, *handle.aliases))
