"""Mosaic files: what MoMos trained as motifs and indices of the nominal width, k s q + m ceil(log2 k) bits."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from kcomplex.errors import SpecError
from kcomplex.machine.files import replacing
from kcomplex.motifs.blocks import split_rows
from kcomplex.training.protocol.mode import Mode
from kcomplex.training.quantising.dead_zone import DeadZoneQuantiser
from kcomplex.training.quantising.integers import read_own
from kcomplex.training.quantising.uniform_qat import UniformQuantiser
from kcomplex.training.sharing.momos import MoMos
from kcomplex.training.sharing.mosaics import Group, Mosaic
from kcomplex.weights import DTYPES, dtype_name

_FORMAT = "kcomplex mosaic 1"


def save_mosaics(path: str | os.PathLike[str], mode: Mode) -> int:
    """Write what `MoMos.convert` makes of a model; return the bits of motifs and indices.

    The file is a safetensors file. Of each mosaic it holds the motifs that are used, entry by entry in the q bits of a
    symbol (or the bits of the weights' dtype, where nothing is quantised), and the index of every block in
    ``ceil(log2 k)`` bits, each of the two padded to whole bytes; step and shift of each quantised tensor; and every
    other tensor as it is.

    Parameters
    ----------
    path
        Where to write.
    mode
        A `MoMos` that is attached to a model.

    Raises
    ------
    SpecError
        The mode isn't a MoMos.
    """
    if not isinstance(mode, MoMos):
        raise SpecError(f"a mosaic file holds what momos made, not {mode.name}")
    tensors: dict[str, torch.Tensor] = {}
    told, bits = [], 0
    for number, (group, mosaic) in enumerate(mode.mosaics()):
        motifs, indices, description = _packed(group, mosaic)
        tensors[f"mosaic{number}/motifs"], tensors[f"mosaic{number}/indices"] = motifs, indices
        for position, member in enumerate(group.members):
            if member.quantiser is not None:
                tensors[f"mosaic{number}/levels{position}"] = _levels(member.quantiser, member.parameter.detach())
        bits += 8 * (motifs.numel() + indices.numel())
        told.append(description)
    plain = mode.convert(mode.model)
    on_mosaics = {name for description in told for name in description["names"]}
    # Tied weights are one parameter under several names.
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    keepers = {id(parameters[name]): name for name in on_mosaics}
    aliases = {}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        if name in on_mosaics:
            continue
        if id(tensor) in keepers:
            aliases[name] = keepers[id(tensor)]
            continue
        keepers[id(tensor)] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {"format": _FORMAT, "mosaics": json.dumps(told), "aliases": json.dumps(aliases)}
    with replacing(path, failures=(SafetensorError,)) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return bits


def load_mosaics(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain module that `save_mosaics` wrote, bit for bit.

    Raises
    ------
    SourceNotFoundError, FormatError
        There is no such file, or it isn't one of `save_mosaics`.
    """
    return read_own(path, _FORMAT, "save_mosaics", _unpacked)


def _packed(group: Group, mosaic: Mosaic) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return motifs and indices as bytes, and what it takes to read them."""
    assert mosaic.motifs is not None
    assert mosaic.assignment is not None
    used, indices = np.unique(mosaic.assignment, return_inverse=True)
    motifs = mosaic.motifs[used]
    dtypes = [parameter.dtype for parameter in group.parameters]
    description = {
        "names": [member.name for member in group.members],
        "shapes": [list(parameter.shape) for parameter in group.parameters],
        "dtypes": [dtype_name(dtype) for dtype in dtypes],
        "block_size": group.block_size,
        "motifs": len(used),
        "bits": group.bits,
    }
    if group.bits is None:
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        stored = torch.from_numpy(motifs).to(widest).contiguous().view(torch.uint8).reshape(-1)
        description["stored"] = dtype_name(widest)
    else:
        top = 2 ** (group.bits - 1) - 1
        stored = _pack(motifs.astype(np.int64).reshape(-1) + top, group.bits)
    return stored, _pack(indices.reshape(-1).astype(np.int64), _width(len(used))), description


def _levels(quantiser: torch.nn.Module, weights: torch.Tensor) -> torch.Tensor:
    """Return step and shift of a tensor's levels, of shape (2, rows)."""
    if isinstance(quantiser, UniformQuantiser):
        assert quantiser.held is not None
        step = quantiser.held.reshape(-1).cpu()
        return torch.stack([step, torch.zeros_like(step)])
    assert isinstance(quantiser, DeadZoneQuantiser)
    grid = quantiser.grid(weights)
    return torch.stack([grid.step.reshape(-1).cpu(), grid.shift.reshape(-1).cpu()])


def _unpacked(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {}
    for number, told in enumerate(json.loads(metadata["mosaics"])):
        size, count, bits = int(told["block_size"]), int(told["motifs"]), told["bits"]
        shapes = [tuple(map(int, shape)) for shape in told["shapes"]]
        if min(size, count) < 1:
            raise ValueError(f"{count} motifs of {size} weights")
        stored, packed = (tensors.pop(f"mosaic{number}/{part}") for part in ("motifs", "indices"))
        if bits is None:
            motifs = stored.view(DTYPES[told["stored"]]).to(torch.float64).reshape(count, size).numpy()
        else:
            motifs = _unpack(stored, int(bits), count * size).reshape(count, size) - float(2 ** (int(bits) - 1) - 1)
        sizes = [math.prod(shape) for shape in shapes]
        indices = _unpack(packed, _width(count), sum(-(-entries // size) for entries in sizes))
        for position, (name, shape, dtype, flat) in enumerate(
            zip(told["names"], shapes, told["dtypes"], split_rows(motifs[indices], sizes), strict=True)
        ):
            levels = tensors.pop(f"mosaic{number}/levels{position}") if bits is not None else None
            state[name] = _restored(torch.from_numpy(flat), levels, DTYPES[dtype]).reshape(shape)
    state |= tensors
    return state | {alias: state[name] for alias, name in json.loads(metadata["aliases"]).items()}


def _restored(flat: torch.Tensor, levels: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if levels is None:
        return flat.to(dtype)
    step, shift = levels[:, :, None]
    symbols = flat.to(step.dtype).reshape(len(step), -1)
    values: torch.Tensor = (symbols * step).add_(symbols.sign() * shift).to(dtype)
    return values.add_(0.0)


def _width(count: int) -> int:
    return (count - 1).bit_length()


def _pack(values: NDArray[np.int64], width: int) -> torch.Tensor:
    """Return non-negative integers in ``width`` bits each, most significant first, as bytes."""
    shifts = np.arange(width - 1, -1, -1)
    bits = (values[:, None] >> shifts & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(bits.reshape(-1)))


def _unpack(data: torch.Tensor, width: int, count: int) -> NDArray[np.int64]:
    """Return the ``count`` integers that `_pack` made bytes of."""
    if data.dtype != torch.uint8 or data.numel() != -(-count * width // 8):
        raise ValueError(f"{data.numel()} bytes for {count} integers of {width} bits")
    bits = np.unpackbits(data.numpy(), count=count * width).reshape(count, width)
    values: NDArray[np.int64] = (bits.astype(np.int64) << np.arange(width - 1, -1, -1)).sum(axis=1)
    return values
