"""Weights of a few bits that quantising libraries pack into words: unpacked, or listed where the packing isn't known.

What a packed tensor is to its network is told by its name and by the tensors beside it, which hold scales and zero
points and stay as they are. Unpacked, it has one element a weight: the code that the library computes the weight from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from kcomplex.errors import KComplexError
from kcomplex.weights import TensorHandle, Weights

_WORDS = {torch.int32, torch.uint32, torch.uint8, torch.int8, torch.int16, torch.int64}
_BITS = (2, 4, 8)
# AutoAWQ packs the columns 0, 2, 4, 6, 1, 3, 5 and 7 of every eight into a word, in this order.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
_HIGH_FIRST = (1, 0)
_BITSANDBYTES = re.compile(r"(.+)\.quant_state\.bitsandbytes__\w+", re.DOTALL)
# More than any description of one tensor takes.
_MAX_DESCRIPTION = 1 << 16

_All = Mapping[str, TensorHandle]


def unpacked(weights: Weights) -> Weights:
    """Return weights with packed ones unpacked to unsigned 8-bit codes, or of role ``packed`` if that can't be done."""
    codes: dict[str, TensorHandle] = {}
    packed: set[str] = set()
    for name, handle in weights.items():
        if handle.role != "weight":
            continue
        state = _BITSANDBYTES.fullmatch(name)
        if state and state[1] in weights:
            base, found = state[1], _bitsandbytes(weights[state[1]], handle)
        else:
            scheme = next((scheme for scheme in _SCHEMES if scheme.fits(handle, weights)), None)
            if scheme is None:
                continue
            base = name
            found = scheme.unpack(name.removesuffix(scheme.words), weights) if scheme.unpack else None
        if found is None:
            packed.add(base)
        else:
            codes |= found
    told = [
        replace(handle, role="packed") if name in packed else codes.get(name, handle)
        for name, handle in weights.items()
    ]
    return weights.with_tensors(told, weights.skipped) if codes or packed else weights


_Unpacked = dict[str, TensorHandle] | None


class _Scheme(NamedTuple):
    """How packed words are called and what must stand beside them, and what unpacks them (None: nothing here)."""

    words: str
    beside: tuple[str, ...]
    unpack: Callable[[str, _All], _Unpacked] | None = None

    def fits(self, handle: TensorHandle, weights: _All) -> bool:
        base = handle.name.removesuffix(self.words)
        return (
            base != handle.name and handle.dtype in _WORDS and all(f"{base}{other}" in weights for other in self.beside)
        )


def _gptq(base: str, weights: _All) -> _Unpacked:
    """GPTQ packs along the rows, AWQ along the columns; zero points tell how many bits a code has."""
    words, zeros, scales = (weights[f"{base}{part}"] for part in ("qweight", "qzeros", "scales"))
    if {len(handle.shape) for handle in (words, zeros, scales)} != {2} or {words.dtype, zeros.dtype} != {torch.int32}:
        return None
    columns = scales.shape[1]
    bits = next((bits for bits in _BITS if zeros.shape[1] * 32 == columns * bits), 0)
    if bits and words.shape[1] == columns:
        return _told(_codes(words, bits, 0), _codes(zeros, bits, 1))
    if bits == 4 and words.shape[1] == zeros.shape[1]:
        return _told(_codes(words, bits, 1, _AWQ), _codes(zeros, bits, 1, _AWQ))
    return None


def _compressed_tensors(base: str, weights: _All) -> _Unpacked:
    words, shape = weights[f"{base}weight_packed"], weights[f"{base}weight_shape"]
    if len(words.shape) != 2 or words.dtype != torch.int32 or shape.shape != (2,):
        return None
    if shape.dtype not in (torch.int32, torch.int64):
        return None
    rows, columns = shape.read().tolist()
    # Few columns may fit into as many words at several widths.
    fitting = [bits for bits in _BITS if -(-columns * bits // 32) == words.shape[1]]
    if len(fitting) != 1 or rows != words.shape[0]:
        return None
    return _told(_codes(words, fitting[0], 1, shape=(rows, columns)))


def _bitsandbytes(words: TensorHandle, state: TensorHandle) -> _Unpacked:
    if words.dtype != torch.uint8 or state.nbytes > _MAX_DESCRIPTION:
        return None
    try:
        described = json.loads(state.words().tobytes())
        shape = tuple(described["shape"])
        whole = math.prod(shape)
    # A hostile description.
    except (KComplexError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not all(type(size) is int and size >= 0 for size in shape) or -(-whole // 2) != words.elements:
        return None
    return _told(_codes(words, 4, len(words.shape) - 1, _HIGH_FIRST, shape))


def _halves(suffix: str) -> Callable[[str, _All], _Unpacked]:
    """Return what unpacks two codes a byte along the last axis, the lower half first."""

    def unpack(base: str, weights: _All) -> _Unpacked:
        words = weights[f"{base}{suffix}"]
        return _told(_codes(words, 4, len(words.shape) - 1)) if words.dtype == torch.uint8 and words.shape else None

    return unpack


_SCHEMES = (
    _Scheme("qweight", ("qzeros", "scales"), _gptq),  # GPTQ or AWQ
    _Scheme("weight_packed", ("weight_scale", "weight_shape"), _compressed_tensors),  # compressed-tensors
    _Scheme("_blocks", ("_scales",), _halves("_blocks")),  # MXFP4
    _Scheme("weight", ("weight_scale", "weight_scale_2"), _halves("weight")),  # NVFP4
    _Scheme("weight_packed", ("weight_scale",), _halves("weight_packed")),  # compressed-tensors
    _Scheme("qweight", ("scales",)),  # GPTQ or AWQ
    _Scheme("W_q", ("scale",)),  # HQQ
    _Scheme("codes", ("codebooks",)),  # AQLM
    _Scheme("Qidxs", ("SU",)),  # QuIP#
    _Scheme("B", ("s",)),  # Marlin
)


def _told(*handles: TensorHandle) -> dict[str, TensorHandle]:
    return {handle.name: handle for handle in handles}


def _codes(
    words: TensorHandle, bits: int, axis: int, order: Sequence[int] = (), shape: tuple[int, ...] | None = None
) -> TensorHandle:
    """Return the codes in words of a tensor, each word spread along an axis.

    Parameters
    ----------
    order
        Where the codes of a word stand in the tensor, from the lowest bits up; as they come if it is empty.
    shape
        Of what is packed, which may be shorter than the words, or shaped otherwise.
    """
    count = 8 * words.dtype.itemsize // bits
    spread = tuple(size * count if place == axis else size for place, size in enumerate(words.shape))
    load = partial(_spread, words, bits, axis, tuple(order) or tuple(range(count)), spread, shape or spread)
    return replace(words, shape=shape or spread, dtype=torch.uint8, load=load, load_range=None)


def _spread(
    handle: TensorHandle,
    bits: int,
    axis: int,
    order: tuple[int, ...],
    spread: tuple[int, ...],
    shape: tuple[int, ...],
) -> torch.Tensor:
    words = handle.read()
    codes = torch.empty((*words.shape[: axis + 1], len(order), *words.shape[axis + 1 :]), dtype=torch.uint8)
    for position, place in enumerate(order):
        codes.select(axis + 1, place).copy_((words >> bits * position) & (2**bits - 1))
    codes = codes.reshape(spread)
    if len(shape) == len(spread) == 2 and shape[0] == spread[0]:
        return codes[:, : shape[1]]
    return codes.reshape(-1)[: math.prod(shape)].reshape(shape)
