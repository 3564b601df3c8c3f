"""Weights that are packed into words, several in each: listed, for their words aren't the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from kcomplex.weights import SkippedTensor, TensorHandle, Weights, dtype_name

# How quantising libraries call what belongs to one packed tensor: the words, what must stand beside them, what may, and
# the library. A name ends so, after the same beginning.
_SCHEMES = (
    ("qweight", ("scales",), ("qzeros", "g_idx", "channel_scales", "wf_unpacked"), "GPTQ or AWQ"),
    ("weight_packed", ("weight_scale",), ("weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
     "input_global_scale"), "compressed-tensors"),
    ("W_q", ("scale",), ("zero", "meta", "nbits", "group_size", "shape", "axis", "packing"), "HQQ"),
    ("codes", ("codebooks",), ("scales",), "AQLM"),
    ("Qidxs", ("SU", "SV"), ("Wscale", "codebook_id"), "QuIP#"),
    ("_blocks", ("_scales",), (), "MXFP4"),
    ("weight", ("weight_scale_2",), ("weight_scale", "input_scale"), "NVFP4"),
    ("B", ("s",), ("workspace",), "Marlin"),
)  # fmt: skip
_BITSANDBYTES = re.compile(r"(.+)\.quant_state\.bitsandbytes__\w+", re.DOTALL)
_WORDS = {torch.int32, torch.uint32, torch.uint8, torch.int8, torch.int16, torch.int64}


def without_packed(weights: Weights) -> Weights:
    """Return weights without those that are packed, recognised by their names and dtypes; these are skipped."""
    packed: dict[str, str] = {}
    for name in weights:
        packed |= _bitsandbytes(name, weights) or _scheme(name, weights)
    if not packed:
        return weights
    skipped = [
        SkippedTensor(name, reason, weights[name].shape, dtype_name(weights[name].dtype), "packed")
        for name, reason in packed.items()
    ]
    kept = [handle for name, handle in weights.items() if name not in packed]
    return weights.with_tensors(kept, (*weights.skipped, *skipped))


def _scheme(name: str, weights: Mapping[str, TensorHandle]) -> dict[str, str]:
    """Return the tensors that belong to packed words, with the reason; none if the name isn't that of such words."""
    if weights[name].dtype not in _WORDS:
        return {}
    for words, needed, possible, library in _SCHEMES:
        start = name.removesuffix(words)
        if start != name and all(start + other in weights for other in needed):
            return _told([name, *(start + other for other in (*needed, *possible))], library, weights)
    return {}


def _bitsandbytes(name: str, weights: Mapping[str, TensorHandle]) -> dict[str, str]:
    state = _BITSANDBYTES.fullmatch(name)
    if not state:
        return {}
    base = state[1]
    others = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    return _told([base, name, *(f"{base}.{other}" for other in others)], "bitsandbytes", weights)


def _told(names: Iterable[str], library: str, weights: Mapping[str, TensorHandle]) -> dict[str, str]:
    reason = f"packed weights of {library}: not measured, for their words aren't the weights"
    return {name: reason for name in names if name in weights}
