"""Removing dead units, which makes layers smaller and leaves what the network computes as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from kcomplex.training.shrinking.chain import BATCH_NORMS, BatchNorm, Link, links_of
from kcomplex.training.shrinking.reachability import by_unit, unused_units


@dataclass(frozen=True)
class Shrunk:
    """A plain copy of a network without its dead units: how many are left, and how many gone, by layer name."""

    model: nn.Module
    units: dict[str, int]
    removed: dict[str, int]


@torch.no_grad()
def remove_dead_units(model: nn.Module) -> Shrunk:
    """Return a copy without the units that nothing depends on and without those that don't depend on the inputs.

    The first ones have no way to the outputs. The others are constant: what they add to the next layer goes into its
    bias (which is made if there was none). A constant other than zero stays where the next convolution pads with zeros,
    since the sum isn't the same at the border. A layer keeps one unit at least.

    Parameters
    ----------
    model
        A chain without parametrisations; see `chain`. Batch norms count as in evaluation mode. An
        optimiser has to be made anew for the copy.

    Raises
    ------
    SpecError
        The model isn't a chain.
    """
    smaller = copy.deepcopy(model)
    links = links_of(smaller)
    before = {link.name: link.units for link in links}
    while _fold_constants(links) or _shrink(links):
        pass
    after = {link.name: link.units for link in links}
    return Shrunk(smaller, after, {name: before[name] - after[name] for name in after})


def _fold_constants(links: Sequence[Link]) -> bool:
    """Move what constant units add into the next layer's bias, and return whether there was anything to move."""
    folded = False
    for link, after in pairwise(links):
        constant = ~(link.layer.weight != 0).flatten(1).any(1)
        outputs = link.outputs(link.bias)
        weights = by_unit(after.layer.weight, link)
        leads_on = (weights != 0).any(2).any(0)
        # NaN isn't finite: a constant that differs from place to place stays.
        movable = constant & leads_on & outputs.isfinite()
        if _pads_with_zeros(after.layer):
            movable &= outputs == 0
        if not movable.any():
            continue
        added = (weights.sum(2) * torch.where(movable, outputs, 0)).sum(1)
        if after.layer.bias is not None:
            after.layer.bias.add_(added)
        elif added.any():
            after.layer.bias = nn.Parameter(added, requires_grad=after.layer.weight.requires_grad)
        weights = torch.where(movable.reshape(1, -1, 1), 0, weights)
        after.layer.weight.copy_(weights.reshape(after.layer.weight.shape))
        folded = True
    return folded


def _pads_with_zeros(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and layer.padding not in ((0, 0), "valid")


def _shrink(links: Sequence[Link]) -> bool:
    """Take units without a way to the outputs out of the layers, and return whether there were any."""
    shrunk = False
    for link, after, unused in zip(links, links[1:], unused_units(links), strict=False):
        if unused.all():
            unused[0] = False
        if not unused.any():
            continue
        kept = ~unused
        after_weights = by_unit(after.layer.weight, link)[:, kept]
        _set(link.layer, "weight", link.layer.weight[kept])
        if link.layer.bias is not None:
            _set(link.layer, "bias", link.layer.bias[kept])
        for _, module in link.between:
            if isinstance(module, BATCH_NORMS):
                _shrink_batch_norm(module, kept)
        _set(after.layer, "weight", after_weights.reshape(len(after_weights), -1, *after.layer.weight.shape[2:]))
        for layer in (link.layer, after.layer):
            if isinstance(layer, nn.Conv2d):
                layer.out_channels, layer.in_channels = layer.weight.shape[:2]
            else:
                layer.out_features, layer.in_features = layer.weight.shape
        shrunk = True
    return shrunk


def _shrink_batch_norm(norm: BatchNorm, kept: torch.Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]
    if norm.affine:
        _set(norm, "weight", norm.weight[kept])
        _set(norm, "bias", norm.bias[kept])
    norm.num_features = len(norm.running_mean)


def _set(module: nn.Module, name: str, values: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(values.clone(), requires_grad=module.get_parameter(name).requires_grad))
