"""The weights of a live model: what the network computes with, whichever way it comes by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kcomplex.sources.state_dicts import Entry, collect, nested_entries
from kcomplex.weights import Weights


def module_weights(module: nn.Module) -> Weights:
    """Return the weights of a module; non-persistent buffers, which no checkpoint holds, have the role ``buffer``.

    Where a parametrisation, `torch.nn.utils.prune` or (in its older form) weight or spectral normalisation computes a
    tensor, that tensor is read as it is in evaluation, under its plain name and in place of its latent originals. It is
    trainable where one of them is.
    """
    entries: list[Entry] = []
    for prefix, part in module.named_modules(remove_duplicate=False):
        if "parametrizations" in prefix.split("."):
            continue
        dot = f"{prefix}." if prefix else ""
        computed = list(_computed(part))
        # What is computed may be the latent tensor of something else: a pruned direction of a normalised weight.
        latent = {name for _, _, originals, _ in computed for name in originals}
        for name, makers, originals, read in computed:
            if name in latent:
                continue
            trainable = any(original.requires_grad for original in originals.values())
            # Computed the same way from the same originals, it is the same tensor in every module that has it.
            key = tuple(map(id, (*makers, *originals.values())))
            entries.append(Entry(dot + name, read(), read, trainable, key))
        for name, parameter in part._parameters.items():
            if parameter is not None and name not in latent:
                entries.append(Entry(dot + name, parameter, None, parameter.requires_grad))
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in latent:
                role = "buffer" if name in part._non_persistent_buffers_set else "weight"
                entries.append(Entry(dot + name, buffer, None, False, role=role))
        entries += _packed(part, dot)
    return collect(entries, type(module).__name__)


def _packed(part: nn.Module, dot: str) -> Iterator[Entry]:
    """Yield what a module saves beside its parameters and buffers: quantised modules of torch.ao pack their weights."""
    if type(part)._save_to_state_dict is nn.Module._save_to_state_dict:
        return
    saved: dict[str, object] = {}
    part._save_to_state_dict(saved, dot, True)
    registered = {dot + name for name in (*part._parameters, *part._buffers)}
    hidden = {name: value for name, value in saved.items() if name not in registered}
    for name, value in nested_entries(hidden).items():
        yield Entry(name, value, None, isinstance(value, torch.Tensor) and value.requires_grad)


_Computed: TypeAlias = tuple[str, tuple[object, ...], dict[str, torch.Tensor], Callable[[], torch.Tensor]]


def _computed(part: nn.Module) -> Iterator[_Computed]:
    """Yield name, makers, latent originals and reader of each tensor that a module computes at every forward pass."""
    chains = getattr(part, "parametrizations", None)
    if isinstance(chains, nn.ModuleDict):
        for name, chain in chains.items():
            assert isinstance(chain, ParametrizationList)
            originals = {**dict(chain.named_parameters()), **dict(chain.named_buffers())}
            yield name, tuple(chain), originals, partial(_parametrised, part, name, chain)
    for hook in part._forward_pre_hooks.values():
        # These hooks leave the tensor behind as a plain attribute, stale until the next forward pass.
        if isinstance(hook, BasePruningMethod):
            name, ends, compute = hook._tensor_name, "orig mask", hook.apply_mask
        elif isinstance(hook, WeightNorm):
            name, ends, compute = hook.name, "g v", hook.compute_weight
        elif isinstance(hook, SpectralNorm):
            name, ends, compute = hook.name, "orig u v", partial(hook.compute_weight, do_power_iteration=False)
        else:
            continue
        latent = {f"{name}_{end}": getattr(part, f"{name}_{end}") for end in ends.split()}
        yield name, (hook,), latent, partial(_detached, compute, part)


def _detached(compute: Callable[[nn.Module], torch.Tensor], part: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return compute(part).detach()


# Layers may share a parametrisation, and threads may read several layers at once.
_EVALUATION = RLock()


def _parametrised(part: nn.Module, name: str, chain: ParametrizationList) -> torch.Tensor:
    with _EVALUATION, torch.no_grad(), _evaluating(chain):
        value: torch.Tensor = getattr(part, name).detach()
    return value


@contextmanager
def _evaluating(chain: nn.Module) -> Iterator[None]:
    """Hold parametrisations in evaluation: in training, some draw noise or update their state when they are read."""
    modes = [(part, part.training) for part in chain.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
