"""Integer files: a quantised network as symbols and steps, which reloads into the plain module bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kcomplex.errors import FormatError, SourceNotFoundError, WeightsError
from kcomplex.machine.files import replacing
from kcomplex.training.quantising.dead_zone import IntegerTensor
from kcomplex.weights import DTYPES, dtype_name

Parsed = TypeVar("Parsed")

_FORMAT = "kcomplex integers 1"
# What a part is called in a file, and in an `IntegerTensor`.
_PARTS = {"codes": "symbols", "dead_zone": "dead_zone", "step": "step", "shift": "shift"}


def save_integers(path: str | os.PathLike[str], plain: nn.Module, integers: Mapping[str, IntegerTensor]) -> None:
    """Write a network with its quantised tensors as integers.

    The file is a safetensors file: ``NAME/codes``, ``NAME/dead_zone``, ``NAME/step`` and ``NAME/shift`` for a quantised
    tensor, the tensor itself for every other one; bits, dtypes and second names of shared tensors are in the metadata.

    Parameters
    ----------
    plain, integers
        What `Mode.convert` and `CoDeQ.integers` returned.

    Raises
    ------
    WeightsError
        A tensor isn't bit for bit what its integers stand for, or something isn't a tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    quantised: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    state = plain.state_dict(keep_vars=True)
    for name in sorted(state, key=lambda name: name not in integers):
        if not isinstance(state[name], torch.Tensor):
            raise WeightsError(f"{name!r} in the state of {type(plain).__name__} isn't a tensor and can't be saved")
        tensor = state[name].detach()
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        if name in integers:
            item = integers[name]
            if not torch.equal(item.values().cpu(), tensor.cpu()):
                raise WeightsError(f"{name!r} isn't what its integers stand for: save what mode.convert just returned")
            parts = {f"{name}/{part}": getattr(item, own).detach().cpu().contiguous() for part, own in _PARTS.items()}
            tensors |= parts
            quantised[name] = {"bits": item.bits, "dtype": dtype_name(item.dtype)}
        else:
            tensors[name] = tensor.cpu().contiguous()
    metadata = {"format": _FORMAT, "quantised": json.dumps(quantised), "aliases": json.dumps(aliases)}
    with replacing(path, failures=(SafetensorError,)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_integers(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain module that `save_integers` wrote: ``module.load_state_dict`` takes it.

    Raises
    ------
    SourceNotFoundError, FormatError
        There is no such file, or it isn't one of `save_integers`.
    """
    integers, state, aliases = _read(path)
    state |= {name: item.values() for name, item in integers.items()}
    return state | {alias: state[name] for alias, name in aliases.items()}


def read_integers(path: str | os.PathLike[str]) -> dict[str, IntegerTensor]:
    """Return the quantised tensors of a file of `save_integers`; see `load_integers`."""
    return _read(path)[0]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, IntegerTensor], dict[str, torch.Tensor], dict[str, str]]:
    return read_own(path, _FORMAT, "save_integers", _parsed)


def read_own(
    path: str | os.PathLike[str],
    format_: str,
    writer: str,
    parse: Callable[[dict[str, str], dict[str, torch.Tensor]], Parsed],
) -> Parsed:
    """Return what is made of the metadata and tensors of a safetensors file that a function here wrote.

    Raises
    ------
    SourceNotFoundError, FormatError
        There is no such file, or it isn't one of that function.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it isn't a mapping
        if metadata.get("format") == format_:
            return parse(metadata, tensors)
    except FileNotFoundError:
        raise SourceNotFoundError(f"{path}: no such file") from None
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: isn't a file that {writer} wrote, or is broken ({error!r})") from error
    raise FormatError(f"{path}: isn't a file that {writer} wrote: its format is {metadata.get('format')!r}")


def _parsed(
    metadata: dict[str, str], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, IntegerTensor], dict[str, torch.Tensor], dict[str, str]]:
    aliases = {str(alias): str(name) for alias, name in json.loads(metadata["aliases"]).items()}
    integers = {
        name: _checked(
            bits=int(told["bits"]),
            dtype=DTYPES[told["dtype"]],
            **{own: tensors.pop(f"{name}/{part}") for part, own in _PARTS.items()},
        )
        for name, told in json.loads(metadata["quantised"]).items()
    }
    missing = set(aliases.values()) - tensors.keys() - integers.keys()
    if missing:
        raise ValueError(f"it names tensors that it doesn't hold: {', '.join(sorted(missing))}")
    return integers, tensors, aliases


def _checked(bits: int, dtype: torch.dtype, symbols: torch.Tensor, **columns: torch.Tensor) -> IntegerTensor:
    rows = {(), symbols.shape[:1]}
    if symbols.dtype not in (torch.int8, torch.int16) or not dtype.is_floating_point or not 1 <= bits <= 16:
        raise ValueError(f"symbols of {symbols.dtype} with {bits} bits for {dtype}")
    if any(tuple(column.shape) not in rows or not column.is_floating_point() for column in columns.values()):
        raise ValueError(f"steps of shapes {[tuple(column.shape) for column in columns.values()]}")
    if symbols.numel() and int(symbols.to(torch.int32).abs().max()) >= 1 << (bits - 1):
        raise ValueError(f"symbols beyond {bits} bits")
    return IntegerTensor(bits=bits, dtype=dtype, symbols=symbols, **columns)
