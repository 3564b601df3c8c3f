"""State dicts: which of their entries are weights, and which of those share memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from kcomplex.errors import FormatError, WeightsError
from kcomplex.sources.formats.guard import Refused, brief
from kcomplex.sources.networks import Tree, find_network
from kcomplex.weights import DTYPES, SkippedTensor, TensorHandle, Weights, dtype_name

_PACKED = "its weights are packed, and not measured"


def state_dict_weights(tensors: Mapping[str, Any], source: str = "state dict", root: str = "") -> Weights:
    """Return the weights of a mapping from names to tensors; entries that aren't tensors are skipped with a reason.

    Tensors that share storage, shape and layout count once, under all their names. A mapping may hold the network at
    any depth, among other things; names of nested mappings are joined with dots.

    Parameters
    ----------
    tensors
        A state dict, or what holds one.
    source
        What the weights came from, for messages.
    root
        The way to the network, keys joined with dots; see `find_network`.

    Raises
    ------
    FormatError
        There are entries, but no tensor among them, or several networks; a name isn't valid Unicode.
    """
    if not tensors:
        return collect((), source)
    try:
        entries, skipped = find_network(_StateDicts(), tensors, root)
    except Refused as error:
        raise FormatError(f"{source}: {brief(str(error), 700)}") from error
    return collect([Entry(name, value, role=role) for name, (value, role) in entries.items()], source, skipped)


def nested_entries(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a mapping holds at any depth, names joined with dots; quantised tensors as their integers."""
    return {name: value for name, (value, _) in find_network(_StateDicts(), tensors, ".").entries.items()}


class _StateDicts(Tree):
    """The nested parts of a checkpoint in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._quantised: dict[int, dict[str, Any]] = {}

    def parts(self, value: Any) -> Mapping[Any, Any] | None:
        """Return what a container holds, by its keys; None for anything else."""
        if isinstance(value, torch.Tensor):
            if not _keeps_integers(value):
                return None
            if id(value) not in self._quantised:
                self._quantised[id(value)] = _integers(value)
            return self._quantised[id(value)]
        if isinstance(value, Mapping):
            return value
        return dict(enumerate(value)) if isinstance(value, (list, tuple)) else None

    def shape(self, value: Any) -> tuple[int, ...] | None:
        """Return the shape of a tensor, () where it isn't known; None for anything else."""
        if isinstance(value, torch.ScriptObject):
            return ()
        if isinstance(value, np.ndarray):
            return tuple(map(int, value.shape))
        if not isinstance(value, torch.Tensor) or _keeps_integers(value):
            return None
        return () if is_lazy(value) or value.is_nested else tuple(value.shape)

    def is_tensor(self, value: Any) -> bool:
        """Return whether a value is one tensor, even one that is looked at as its parts."""
        return isinstance(value, (torch.Tensor, np.ndarray, torch.ScriptObject))

    def kind(self, value: Any) -> str:
        """Return the dtype of a tensor, or what else a value is."""
        return dtype_name(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


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


def beside(handle: TensorHandle, key: Hashable) -> Hashable:
    """Return a key that what isn't of the network doesn't share with it, whose names it would change."""
    return (handle.role, key) if handle.role in ("copy", "optimiser") else key


def _keeps_integers(value: torch.Tensor) -> bool:
    """Return whether a tensor is a quantised one of torch.ao that keeps one integer an element."""
    return value.is_quantized and value.dtype in (torch.qint8, torch.quint8, torch.qint32)


def _integers(value: torch.Tensor) -> dict[str, Any]:
    """Return integers, scales and zero points of a quantised tensor."""
    integers = value.int_repr()
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return {"int_repr": integers, "scale": value.q_scale(), "zero_point": value.q_zero_point()}
    scales, zero_points = value.q_per_channel_scales(), value.q_per_channel_zero_points()
    return {"int_repr": integers, "scale": scales, "zero_point": zero_points}


def below(weights: Weights, root: str) -> Weights:
    """Return the weights whose names begin with a root and a dot, without these; all for no root.

    This is how a root is looked for in formats that nest nothing: their names stand for the nesting.

    Raises
    ------
    FormatError
        There are none.
    """
    path = root.rstrip(".")
    if not path:
        return weights
    kept = []
    for handle in weights.values():
        names = [
            name.removeprefix(f"{path}.") for name in (handle.name, *handle.aliases) if name.startswith(f"{path}.")
        ]
        if names:
            kept.append(replace(handle, name=names[0], aliases=tuple(names[1:])))
    if not kept:
        there = brief(", ".join(weights))
        weights.close()
        raise FormatError(f"{weights.source}: no name begins with the root {path!r:.100}; there are {there}")
    return weights.with_tensors(kept, weights.skipped)


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
    role
        What it is to the network where the source knows that.
    """

    name: str
    value: Any
    load: Callable[[], torch.Tensor] | None = None
    trainable: bool | None = None
    key: Hashable = None
    role: str = "weight"


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
    for name, value, load, trainable, key, role in entries:
        reason, unread = _unreadable(value)
        if reason:
            unknown = isinstance(value, torch.Tensor) and (is_lazy(value) or value.is_nested)
            known = isinstance(value, (torch.Tensor, np.ndarray)) and not unknown
            shape, dtype = (tuple(value.shape), str(value.dtype).removeprefix("torch.")) if known else (None, "")
            left_out.append(SkippedTensor(name, reason, shape, dtype, unread if role == "weight" else role))
            continue
        handle = TensorHandle(
            name, tuple(value.shape), value.dtype, _gathered(name, load or value.detach), trainable=trainable, role=role
        )
        keyed.append((beside(handle, key or _memory(value) or name), handle))
    return Weights(merge_shared(keyed), left_out, source)


def _memory(value: torch.Tensor) -> Hashable:
    """Return what tensors of the same memory, read the same way, have in common; None where that isn't known."""
    # A sharded tensor or a wrapper has no memory of its own.
    if not value.numel() or hasattr(value, "full_tensor") or not value.data_ptr():
        return None
    views = value.is_conj(), value.is_neg()
    return value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, views


def _unreadable(value: Any) -> tuple[str, str]:
    """Return why a state dict's entry can't be measured, and its role; two empty texts where it can."""
    if not isinstance(value, torch.Tensor):
        if isinstance(value, np.ndarray):
            return "array of NumPy: make it a tensor with torch.from_numpy", ""
        packs = isinstance(value, torch.ScriptObject)
        return (_PACKED, "packed") if packs else (f"not a tensor but {type(value).__name__}", "other")
    if is_lazy(value):
        return "not initialised: run the model once", ""
    if value.is_nested:
        return "nested tensors aren't supported", ""
    if value.layout is not torch.strided:
        return f"layout {str(value.layout).removeprefix('torch.')} isn't supported", ""
    if value.is_meta:
        return "meta tensor: it has no data", ""
    # A sharded tensor is gathered; other classes that act for themselves keep their weights in tensors of their own.
    acts = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if (acts and not hasattr(value, "full_tensor")) or getattr(value, "quant_state", None) is not None:
        return f"{type(value).__name__}: {_PACKED}", "packed"
    if value.dtype not in DTYPES.values():
        return f"dtype {dtype_name(value.dtype)} isn't supported", "packed" if value.is_quantized else ""
    return "", ""


def _gathered(name: str, load: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a reader that gathers a sharded tensor (DTensor) whole; a shard is never measured in silence."""

    def read() -> torch.Tensor:
        try:
            tensor = load()
            gather = getattr(tensor, "full_tensor", None)
            whole: torch.Tensor = gather() if gather is not None else tensor
        # Whatever a tensor's class, or a parametrisation of the user's, raises.
        except Exception as error:
            raise WeightsError(
                f"the tensor {name!r} can't be read: {brief(str(error)) or type(error).__name__}"
            ) from error
        return whole

    return read
