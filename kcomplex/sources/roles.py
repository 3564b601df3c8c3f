"""What a tensor is to its network, told by its name, dtype and shape and by the tensors beside it.

A file knows no more than these; a live module is judged by them too, so that both give the same number.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from kcomplex.errors import SpecError
from kcomplex.sources.latents import fold
from kcomplex.sources.networks import COPY
from kcomplex.weights import COUNTED, ROLES, SkippedTensor, TensorHandle, Weights

# What `--count` and `--skip` take beside the roles.
EVERYTHING = "all"

_STATISTICS = {
    *("running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance", "moving_var"),
    *("n_averaged", "min_val", "max_val", "cluster_size"),
}
_CONSTANTS = {
    *("position_ids", "token_type_ids", "inv_freq", "original_inv_freq", "relative_position_index"),
    *("cos_cached", "sin_cached", "freqs_cis", "rotary_pos_emb_cache"),
}
_OPTIMISER_STATE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta", "grad_avg"),
}
_MASK = re.compile(r"((causal|attn|attention|padding|pruning)_?mask|masked_bias|tril)")
_NORM = re.compile(r"(.*_)?((layer|batch|group|instance|rms)?_?norm|ln|bn)(\d+|_.*)?", re.IGNORECASE)
# What a source tells of the tensors of the network itself; whatever stands beside it has other roles.
_UNTOLD = ("weight", "buffer")
# A single layer may be called so, too; a copy has the tensors of a network.
_FEWEST_COPIES = 4
# More aren't looked for: names of a hostile file could take hours.
_MOST_COPIES = 64


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
    network = weights.with_tensors((handle for handle in weights.values() if handle.role in _UNTOLD), ())
    folded = fold(network)
    copies = _copies(network.values())
    norms = _norm_modules(network.values())
    computed = () if "latent" in counted else folded.computed
    tensors: list[TensorHandle] = []
    skipped = list(weights.skipped)
    for handle in (*weights.values(), *computed):
        role, product = folded.stored.get(handle.name, ("", ""))
        if handle.role != "weight":
            role = handle.role
        elif handle.name in copies:
            role = "copy"
        told = replace(handle, role=role or _role(handle, norms))
        if told.role in counted:
            tensors.append(told)
        elif product and computed:
            skipped.append(SkippedTensor.of(told, "folded into", told.role, product))
        else:
            original = copies.get(handle.name, "the network") if told.role == "copy" else ""
            skipped.append(SkippedTensor.of(told, _WHY[told.role], told.role, original))
    wishes = [*(f"count={role}" for role in count), *(f"skip={role}" for role in skip)]
    return weights.with_tensors(tensors, skipped, ",".join(filter(None, (weights.selection, *wishes))))


_WHY = {
    "buffer": "non-persistent buffer",
    "mask": "of attention or of pruning",
    "latent": "what the network computes with is in its place",
    "packed": "packed in a way that isn't read",
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
    shape, dimensions = handle.shape, len(handle.shape)
    vector = dimensions <= 1
    if leaf in _STATISTICS or (not dimensions and not handle.dtype.is_floating_point):
        return "statistic"
    if not handle.trainable:
        # What is trained is no such thing, whatever it is called.
        if leaf in _OPTIMISER_STATE:
            return "optimiser"
        if leaf in _CONSTANTS:
            return "constant"
        # GPT-2 calls the mask of its attention a bias, others a mask: one square, alone or for all sequences and heads.
        square = dimensions >= 2 and shape[-2] == shape[-1] > 1 and set(shape[:-2]) <= {1}
        if _MASK.fullmatch(leaf) or (square and ((leaf == "mask" and path) or (leaf == "bias" and dimensions == 4))):
            return "mask"
    in_norm = ".".join(path) in norms or (path and vector and _NORM.fullmatch(path[-1]))
    if (in_norm and leaf in ("weight", "bias", "scale")) or (vector and leaf in ("gamma", "beta")):
        return "norm"
    return "bias" if vector and (leaf.startswith("bias") or leaf.endswith("bias")) else "weight"


def _norm_modules(handles: Iterable[TensorHandle]) -> set[str]:
    """Return the modules that normalise: their weight is a vector, or has the shape of their bias."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for handle in handles:
        for name in (handle.name, *handle.aliases):
            module, dot, leaf = name.rpartition(".")
            if dot and leaf in ("weight", "bias", "running_var"):
                shapes.setdefault(module, {})[leaf] = handle.shape
    return {
        module
        for module, held in shapes.items()
        if "running_var" in held
        or ("weight" in held and (len(held["weight"]) == 1 or held["weight"] == held.get("bias")))
    }


def _copies(handles: Iterable[TensorHandle]) -> dict[str, str]:
    """Return the tensors of copies of the network, and what they are copies of, where that stands beside them.

    What is called as a copy (``model_ema``, or ``generator_ema`` beside ``generator``) is one where most of its tensors
    have the names, but for the dots, and shapes of most tensors at one other place.
    """
    paths = [(handle, handle.name.split(".")) for handle in handles]
    parts = {tuple(path[: at + 1]) for _, path in paths for at in range(min(len(path) - 1, 2))}
    called = {part for part in parts if _is_called_copy(part, parts)}
    if not called:
        return {}
    groups: dict[tuple[str, ...], dict[tuple[str, tuple[int, ...]], TensorHandle]] = {}
    others: dict[tuple[str, ...], dict[tuple[str, tuple[int, ...]], str]] = {}
    for handle, path in paths:
        places = [tuple(path[:at]) for at in range(min(len(path), 4))]
        root = next((place for place in places if place in called), None)
        if root is not None:
            groups.setdefault(root, {})["".join(path[len(root) :]), handle.shape] = handle
            continue
        for place in places:
            others.setdefault(place, {})["".join(path[len(place) :]), handle.shape] = handle.name
    copies: dict[str, str] = {}
    for group in list(groups.values())[:_MOST_COPIES]:
        for other in others.values():
            if not len(group) < 2 * len(other) < 4 * len(group):
                continue
            pairs = {key: other[key] for key in group if key in other}
            if len(pairs) >= _FEWEST_COPIES and 2 * len(pairs) > max(len(group), len(other)):
                # Beside the copies there may be a few tensors of its own: how often it was averaged, and how.
                copies |= {handle.name: pairs.get(key, "the network") for key, handle in group.items()}
                break
    return copies


def _is_called_copy(place: tuple[str, ...], parts: Collection[tuple[str, ...]]) -> bool:
    *above, name = place
    if COPY.fullmatch(name):
        return True
    original = re.sub(r"^ema_|_ema$", "", name, flags=re.IGNORECASE)
    return original != name and (*above, original) in parts
