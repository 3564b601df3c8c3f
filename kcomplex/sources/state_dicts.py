"""State dicts: which of their entries are weights, and which of those share memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from kcomplex.errors import WeightsError
from kcomplex.weights import DTYPES, SkippedTensor, TensorHandle, Weights, dtype_name


def state_dict_weights(tensors: Mapping[str, Any], source: str = "state dict", root: str = "") -> Weights:
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
        reason = _unreadable(value)
        if reason:
            known = isinstance(value, torch.Tensor) and not is_lazy(value) and not value.is_nested
            shape, dtype = (tuple(value.shape), dtype_name(value.dtype)) if known else (None, "")
            left_out.append(SkippedTensor(name, reason, shape, dtype))
            continue
        handle = TensorHandle(
            name, tuple(value.shape), value.dtype, _gathered(load or value.detach), trainable=trainable, role=role
        )
        keyed.append((key or _memory(value) or name, handle))
    return Weights(merge_shared(keyed), left_out, source)


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
    if value.dtype not in DTYPES.values():
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
