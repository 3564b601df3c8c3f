"""What a tensor is to its network, told by its name, dtype and shape and by the tensors beside it.

A file knows no more than these; a live module is judged by them too, so that both give the same number.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from kcomplex.errors import SpecError
from kcomplex.sources.latents import fold
from kcomplex.weights import COUNTED, ROLES, SkippedTensor, TensorHandle, Weights

# What `--count` and `--skip` take beside the roles.
EVERYTHING = "all"

_STATISTICS = {
    *("running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance", "moving_var"),
    *("n_averaged", "min_val", "max_val", "cluster_size", "initted", "num_updates", "decay"),
}
_CONSTANTS = {
    *("position_ids", "token_type_ids", "inv_freq", "original_inv_freq", "relative_position_index"),
    *("cos_cached", "sin_cached", "freqs_cis", "rotary_pos_emb_cache"),
}
_OPTIMISER_STATE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta", "grad_avg"),
}
_OPTIMISER = re.compile(r"(optim(i[sz]er)?(_state(_dict)?)?s?|lr_scheduler|grad_scaler)", re.IGNORECASE)
_MASK = re.compile(r"(.*[_.])?((causal|attn|attention|padding|pruning)_?mask|masked_bias|tril)", re.DOTALL)
_NORM = re.compile(r"((.*_)?(layer|batch|group|instance|rms)?_?norm(\d+|_.*)?|(.*_)?(ln|bn)(\d+|_.*)?)", re.IGNORECASE)
# A copy of the network that is averaged while it trains, or lags behind it.
_COPY = re.compile(
    r"(.*_)?ema(_.*)?|shadow(_.*)?|averaged_model|teacher|momentum_encoder|encoder_k|target_(net|network|encoder)"
)


def with_roles(weights: Weights, count: Collection[str] = (), skip: Collection[str] = ()) -> Weights:
    """Return the tensors of counted roles, each told its role; the others are listed as skipped.

    Products of latent tensors (masks of pruning, weight and spectral normalisation) take their place, unless latent
    tensors are counted: then what is stored is.

    Parameters
    ----------
    count, skip
        Roles to count beside `COUNTED`, and roles of these not to count; ``all`` stands for every role.

    Raises
    ------
    SpecError
        There is no such role, or a role is named in both.
    """
    counted = _counted(count, skip)
    folded = fold(weights)
    copies = _copies(weights.values())
    norms = _norm_modules(weights.values())
    tensors: list[TensorHandle] = []
    skipped = list(weights.skipped)
    computed = () if "latent" in counted else folded.computed
    for handle in (*weights.values(), *computed):
        role, other = folded.stored.get(handle.name, ("", ""))
        if handle.name in copies:
            role, other = "copy", copies[handle.name]
        elif handle.role != "weight":
            role = handle.role
        told = replace(handle, role=role or _role(handle, norms))
        if told.role in counted:
            tensors.append(told)
        else:
            reason = "folded into" if other and role != "copy" else _WHY[told.role]
            skipped.append(SkippedTensor.of(told, reason, told.role, other))
    wishes = [*(f"count={role}" for role in count), *(f"skip={role}" for role in skip)]
    return weights.with_tensors(tensors, skipped, ",".join(filter(None, (weights.selection, *wishes))))


_WHY = {
    "buffer": "non-persistent buffer",
    "mask": "of attention or of pruning",
    "latent": "what the network computes with is in its place",
    "packed": "packed",
    "constant": "its configuration gives it",
    "copy": "copy of",
    "optimiser": "state of the optimiser",
    **dict.fromkeys(COUNTED, "left out as asked"),
}


def _counted(count: Collection[str], skip: Collection[str]) -> set[str]:
    for role in (*count, *skip):
        if role not in (*ROLES, EVERYTHING):
            raise SpecError(f"there is no role {role!r}; roles are {', '.join(ROLES)}, and {EVERYTHING} is all of them")
    both = sorted(set(count) & set(skip))
    if both:
        raise SpecError(f"{both[0]!r} can't be counted and skipped")
    roles = set(ROLES) if EVERYTHING in count else {*COUNTED, *count}
    return roles & set(count) if EVERYTHING in skip else roles - set(skip)


def _role(handle: TensorHandle, norms: Collection[str]) -> str:
    """Return the role of a tensor that is neither latent nor a copy."""
    *path, leaf = handle.name.split(".")
    module = ".".join(path)
    dimensions = len(handle.shape)
    if leaf in _OPTIMISER_STATE or any(_OPTIMISER.fullmatch(part) for part in path[:1]):
        return "optimiser"
    if leaf in _STATISTICS or (not dimensions and not handle.dtype.is_floating_point):
        return "statistic"
    if leaf in _CONSTANTS:
        return "constant"
    # GPT-2 calls the mask of its attention a bias, others a mask: one square for all sequences and heads.
    square = dimensions == 4 and handle.shape[:2] == (1, 1) and handle.shape[2] == handle.shape[3] > 1
    if _MASK.fullmatch(leaf) or (square and leaf in ("bias", "mask")):
        return "mask"
    if (module in norms and dimensions == 1) or (path and _NORM.fullmatch(path[-1]) and leaf in ("weight", "bias")):
        return "norm"
    if leaf in ("gamma", "beta") and dimensions <= 1:
        return "norm"
    if dimensions <= 1 and (leaf.startswith("bias") or leaf.endswith("bias")):
        return "bias"
    return "weight"


def _norm_modules(handles: Iterable[TensorHandle]) -> set[str]:
    """Return the modules whose weight is a vector, as those that normalise have it, or that have running statistics."""
    found = set()
    for handle in handles:
        for name in (handle.name, *handle.aliases):
            module, dot, leaf = name.rpartition(".")
            if dot and ((leaf == "weight" and len(handle.shape) == 1) or leaf == "running_var"):
                found.add(module)
    return found


def _copies(handles: Iterable[TensorHandle]) -> dict[str, str]:
    """Return the tensors under a name of a copy, and what they are copies of, where the network stands beside."""
    own: dict[tuple[str, tuple[int, ...]], str] = {}
    groups: dict[str, list[tuple[TensorHandle, str]]] = {}
    for handle in handles:
        path = handle.name.split(".")
        at = next((at for at, part in enumerate(path[:3]) if _COPY.fullmatch(part)), None)
        if at is not None and len(path) > at + 1:
            groups.setdefault(".".join(path[: at + 1]), []).append((handle, "".join(path[at + 1 :])))
            continue
        for start in range(min(len(path), 4)):
            own.setdefault(("".join(path[start:]), handle.shape), handle.name)
    copies: dict[str, str] = {}
    for group in groups.values():
        pairs = [own.get((rest, handle.shape)) for handle, rest in group]
        # Beside the copies of tensors there may be a few of its own: how often it was averaged, and with what decay.
        if 2 * sum(pair is not None for pair in pairs) > len(pairs):
            copies |= {handle.name: pair or "the network" for (handle, _), pair in zip(group, pairs, strict=True)}
    return copies
