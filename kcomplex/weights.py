"""Weights: the named tensors of one checkpoint, or of a model at one moment, read tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.parameter import is_lazy

from kcomplex.errors import WeightsError

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
Source: TypeAlias = "str | PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module | Weights"

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


@dataclass(frozen=True)
class TensorHandle:
    """One named tensor that reads itself on demand.

    Attributes
    ----------
    name, shape, dtype
        As stored.
    load
        Returns the tensor; called anew at every read, so that nothing is kept in memory.
    aliases
        Other names of the same storage. The tensor counts once.
    trainable
        Whether it is a parameter with ``requires_grad``; None where the source doesn't say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    aliases: tuple[str, ...] = ()
    trainable: bool | None = None

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

    def words(self) -> Words:
        """Return the flat bit patterns; see `words_of`."""
        return words_of(self.read())

    def values(self) -> NDArray[np.floating[Any]]:
        """Return the values as floats in the tensor's shape; see `values_of`."""
        return values_of(self.read())


@dataclass(frozen=True)
class SkippedTensor:
    """A tensor that was left out, and why."""

    name: str
    reason: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""


class Weights(Mapping[str, TensorHandle]):
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
    ) -> None:
        self.source = source
        self.skipped = tuple(sorted(skipped, key=lambda item: item.name))
        self._resources = resources or ExitStack()
        self._tensors: dict[str, TensorHandle] = {}
        for handle in sorted(tensors, key=lambda item: item.name):
            for name in (handle.name, *handle.aliases):
                if not name.isascii() and not _is_unicode(name):
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
                skipped.append(SkippedTensor(handle.name, reason, handle.shape, dtype_name(handle.dtype)))
            else:
                kept.append(handle)
        if self and not kept:
            raise WeightsError(f"{self.source}: the selection leaves no tensor of {self._some_names()}")
        return Weights(kept, skipped, self.source, self._resources)

    def close(self) -> None:
        """Close the files behind the weights; reading a tensor afterwards is an error."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _some_names(self) -> str:
        names = list(self._tensors)
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def open_weights(
    source: Source,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    *,
    trainable: bool | None = None,
) -> Weights:
    """Return the weights of a file, a folder, a state dict or a live model.

    Parameters
    ----------
    source
        Path of any known format, mapping of names to tensors, `torch.nn.Module`, or Weights. For a module, what is
        read is what the network computes with in evaluation: the output of a parametrisation, of pruning or of
        weight normalisation, never its latent original.
    include, exclude, trainable
        Selection; see `Weights.select`.

    Raises
    ------
    SourceNotFoundError
        The path doesn't exist.
    FormatError
        The file is truncated, corrupted, or of no known format.
    WeightsError
        The selection is empty or can't be made.
    """
    if isinstance(source, Weights):
        weights = source
    elif isinstance(source, torch.nn.Module):
        from kcomplex.sources.modules import module_weights

        weights = module_weights(source)
    elif isinstance(source, Mapping):
        weights = state_dict_weights(source)
    elif isinstance(source, (str, PathLike)):
        from kcomplex.sources.files import open_path

        weights = open_path(fspath(source))
    else:
        raise WeightsError(
            f"can't take weights from a {type(source).__name__}: give a path, a state dict, a module or Weights"
        )
    if include or exclude or trainable is not None:
        try:
            return weights.select(include, exclude, trainable=trainable)
        except WeightsError:
            if weights is not source:
                weights.close()
            raise
    return weights


def state_dict_weights(tensors: Mapping[str, Any], source: str = "state dict") -> Weights:
    """Return the weights of a mapping from names to tensors; entries that aren't tensors are skipped with a reason.

    Tensors that share storage, shape and layout count once, under all their names.

    Raises
    ------
    WeightsError
        There are entries, but no tensor among them; or a name isn't text.
    """
    weights = collect([Entry(str(name), value) for name, value in tensors.items()], source)
    if tensors and not any(isinstance(value, torch.Tensor) for value in tensors.values()):
        some = ", ".join(f"{item.name!r} ({item.reason})" for item in weights.skipped[:5])
        raise WeightsError(f"{source}: no tensor among its {len(tensors)} entries: {some}")
    return weights


def merge_shared(keyed: Iterable[tuple[Hashable, TensorHandle]]) -> list[TensorHandle]:
    """Return one handle a key, with the names of all handles of that key.

    The alphabetically first name becomes the tensor's own, so that the choice doesn't depend on the source's order. It
    is trainable where one of them is.
    """
    groups: dict[Hashable, list[TensorHandle]] = {}
    for key, handle in keyed:
        groups.setdefault(key, []).append(handle)
    merged = []
    for group in groups.values():
        first, *others = sorted({name for handle in group for name in (handle.name, *handle.aliases)})
        trainable = True if any(handle.trainable for handle in group) else group[0].trainable
        merged.append(replace(group[0], name=first, aliases=tuple(others), trainable=trainable))
    return merged


class Entry(NamedTuple):
    """A candidate for `collect`.

    Attributes
    ----------
    name, value
        As the source has them; the value tells shape, dtype and whether it can be measured.
    load
        Returns the tensor anew; None for the value itself.
    trainable
        Whether it is a parameter with ``requires_grad``; None where the source doesn't say.
    key
        What the names of one tensor have in common; None for the memory that it lies in.
    """

    name: str
    value: Any
    load: Callable[[], torch.Tensor] | None = None
    trainable: bool | None = None
    key: Hashable = None


def collect(
    entries: Iterable[Entry],
    source: str,
    skipped: Iterable[SkippedTensor] = (),
) -> Weights:
    """Return the weights of entries: shared tensors once, under all their names; the unreadable skipped."""
    # The values of all entries stay alive until the end, so that equal addresses mean shared memory.
    entries = list(entries)
    keyed: list[tuple[Hashable, TensorHandle]] = []
    left_out = list(skipped)
    for name, value, load, trainable, key in entries:
        reason = _unreadable(value)
        if reason:
            known = isinstance(value, torch.Tensor) and not is_lazy(value) and not value.is_nested
            shape, dtype = (tuple(value.shape), dtype_name(value.dtype)) if known else (None, "")
            left_out.append(SkippedTensor(name, reason, shape, dtype))
            continue
        handle = TensorHandle(
            name, tuple(value.shape), value.dtype, _gathered(load or value.detach), trainable=trainable
        )
        keyed.append((key or _memory(value) or name, handle))
    return Weights(merge_shared(keyed), left_out, source)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _memory(value: torch.Tensor) -> Hashable:
    """Return what tensors of the same memory, read the same way, have in common; None where that isn't known."""
    # A sharded tensor or a wrapper has no memory of its own.
    if not value.numel() or hasattr(value, "full_tensor") or not value.data_ptr():
        return None
    views = value.is_conj(), value.is_neg()
    return value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, views


def _unreadable(value: Any) -> str:
    """Return why a state dict's entry can't be measured; empty where it can."""
    if not isinstance(value, torch.Tensor):
        return f"not a tensor but {type(value).__name__}"
    if is_lazy(value):
        return "not initialised: run the model once"
    if value.is_nested:
        return "nested tensors aren't supported"
    if value.layout is not torch.strided:
        return f"layout {str(value.layout).removeprefix('torch.')} isn't supported"
    if value.is_meta:
        return "meta tensor: it has no data"
    if value.dtype not in _LAYOUT:
        return f"dtype {dtype_name(value.dtype)} isn't supported"
    return ""


def _gathered(load: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a reader that gathers a sharded tensor (DTensor) whole; a shard is never measured in silence."""

    def read() -> torch.Tensor:
        tensor = load()
        gather = getattr(tensor, "full_tensor", None)
        whole: torch.Tensor = gather() if gather is not None else tensor
        return whole

    return read


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Return patterns as a tuple; a string is one pattern, not its letters."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: names from a pickle may hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _matches(handle: TensorHandle, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (handle.name, *handle.aliases))
