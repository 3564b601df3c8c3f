"""Snapshots: the weights of a model at one moment, in memory and as a safetensors file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from kcomplex.errors import FormatError, WeightsError
from kcomplex.machine.files import replacing
from kcomplex.sources.open import open_weights
from kcomplex.weights import DTYPES, SkippedTensor, TensorHandle, Weights, dtype_name, tensor_from_words, words_of

# The names of safetensors' dtypes.
_STORED_AS: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# What safetensors has no name for is stored as words: dtype of the words, and words an element.
_WORDS: dict[int, str] = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}
_METADATA_KEY = "kcomplex"


@dataclass(frozen=True)
class Selection:
    """Which tensors of a model are captured; see `Weights.select`."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    trainable: bool | None = None


@dataclass(frozen=True)
class CapturedTensor:
    """A copy of one tensor on the CPU, contiguous; the other names and the role of what it was copied from."""

    tensor: torch.Tensor
    aliases: tuple[str, ...] = ()
    role: str = "weight"


@dataclass(frozen=True)
class CapturedWeights:
    """Copies of a model's effective weights by name, what was left out, and by which choice of the caller's."""

    tensors: Mapping[str, CapturedTensor]
    skipped: tuple[SkippedTensor, ...] = ()
    selection: str = ""

    @property
    def nbytes(self) -> int:
        """Raw size of all copies in bytes."""
        return sum(item.tensor.nbytes for item in self.tensors.values())


def copy_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's buffers by all their names."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers(remove_duplicate=False)}


def capture_weights(
    model: nn.Module, selection: Selection, buffers: Mapping[str, torch.Tensor] | None = None
) -> CapturedWeights:
    """Return copies of what the network computes with now.

    Reading a parametrised weight may draw random numbers or change state (a power iteration): both are put back, so
    that a training run is the same with and without captures.

    Parameters
    ----------
    buffers
        Earlier copies of buffers, to be used in place of the model's own.

    Raises
    ------
    WeightsError
        The selection is empty or can't be made.
    """
    earlier = buffers or {}
    with _undisturbed(model):
        weights = open_weights(model, selection.include, selection.exclude, trainable=selection.trainable)
        tensors = {
            name: CapturedTensor(
                _copy(earlier[name] if name in earlier else handle.read()), handle.aliases, handle.role
            )
            for name, handle in weights.items()
        }
    return CapturedWeights(tensors, weights.skipped, weights.selection)


def not_finite(captured: CapturedWeights) -> list[str]:
    """Return the names of captured tensors that hold NaN or infinity."""
    return [name for name, item in captured.tensors.items() if not _is_finite(item.tensor)]


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Floats of eight bits can do nothing but become others.
    ends = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return bool(torch.isfinite(ends.min) and torch.isfinite(ends.max))


def write_snapshot(captured: CapturedWeights, path: Path) -> None:
    """Write captured weights as a safetensors file: to a temporary name, then renamed.

    The file is a plain safetensors file for every reader. Its metadata tell what that format can't: aliases, skipped
    tensors, and the dtypes of tensors that stand in it as words.
    """
    # Widest words first, as the safetensors library does it, keeps every tensor aligned without padding.
    order = sorted(captured.tensors.items(), key=lambda item: (-item[1].tensor.element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _METADATA_KEY: json.dumps(_metadata(captured))}}
    position = 0
    for name, item in order:
        stored, shape = _layout(item.tensor)
        end = position + item.tensor.nbytes
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # The library's writer holds the interpreter's lock while it copies every tensor into bytes, which would stall the
    # training loop; writing from the tensors' own memory doesn't.
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, item in order:
            file.write(words_of(item.tensor).data)


def open_snapshot(path: Path) -> Weights:
    """Return the weights of a snapshot file, exactly as `open_weights` gave them for the model.

    Raises
    ------
    FormatError
        The file is missing, truncated, corrupted, or not a snapshot.
    """
    from safetensors import SafetensorError, safe_open

    stack = contextlib.ExitStack()
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        metadata = json.loads((file.metadata() or {})[_METADATA_KEY])
        aliases, dtypes, roles = metadata["aliases"], metadata["dtypes"], metadata["roles"]
        handles = []
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            load = partial(file.get_tensor, name)
            shape = tuple(file.get_slice(name).get_shape())
            if name in dtypes:
                dtype, shape = DTYPES[dtypes[name]["dtype"]], tuple(dtypes[name]["shape"])
                load = partial(_from_words, load, dtype, shape)
            else:
                dtype = _DTYPES[file.get_slice(name).get_dtype()]
            also = tuple(aliases.get(name, ()))
            handles.append(TensorHandle(name, shape, dtype, load, aliases=also, role=roles.get(name, "weight")))
        skipped = [
            SkippedTensor(name, reason, _tuple(shape), *more) for name, reason, shape, *more in metadata["skipped"]
        ]
        return Weights(handles, skipped, str(path), stack, metadata["selection"])
    except (OSError, SafetensorError, WeightsError, KeyError, TypeError, ValueError, AttributeError) as error:
        stack.close()
        raise FormatError(f"{path}: not a readable snapshot: {type(error).__name__}: {error}") from error


_DTYPES = {stored: dtype for dtype, stored in _STORED_AS.items()}


def _metadata(captured: CapturedWeights) -> dict[str, Any]:
    return {
        "selection": captured.selection,
        "roles": {name: item.role for name, item in captured.tensors.items() if item.role != "weight"},
        "aliases": {name: item.aliases for name, item in captured.tensors.items() if item.aliases},
        "dtypes": {
            name: {"dtype": dtype_name(item.tensor.dtype), "shape": tuple(item.tensor.shape)}
            for name, item in captured.tensors.items()
            if item.tensor.dtype not in _STORED_AS
        },
        "skipped": skipped_rows(captured.skipped),
    }


def skipped_rows(skipped: Iterable[SkippedTensor]) -> list[tuple[Any, ...]]:
    """Return name, reason, shape, dtype, role and other tensor of skipped tensors, as the run store keeps them."""
    return [astuple(item) for item in skipped]


def _layout(tensor: torch.Tensor) -> tuple[str, list[int]]:
    """Return dtype and shape under which a tensor stands in the file."""
    if tensor.dtype in _STORED_AS:
        return _STORED_AS[tensor.dtype], list(tensor.shape)
    words = words_of(tensor)
    return _WORDS[words.itemsize], [words.size]


def _from_words(load: Callable[[], torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return tensor_from_words(words_of(load()), dtype, shape)


def _tuple(shape: list[int] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True, memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back random states, and buffers inside parametrisations, that reading effective weights changes."""
    parametrisations = [module for module in model.modules() if isinstance(module, ParametrizationList)]
    if not parametrisations:
        yield
        return
    before = [
        (part, name, buffer, buffer._version, buffer.detach().clone())
        for module in parametrisations
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        try:
            yield
        finally:
            for part, name, buffer, version, copy in before:
                part._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(copy)
