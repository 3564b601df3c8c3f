"""Which parameters have no influence on a network's outputs, told from its zeros alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from kcomplex.training.shrinking.chain import BATCH_NORMS, Link, links_of


@torch.no_grad()
def unreachable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return masks by full parameter name, True where no output depends on the parameter, whatever the inputs.

    Those are the weights from units that are zero for every input, and the weights, biases and batch norms of units
    from which only zero weights lead on. It is exact: setting them to zero changes no output, in evaluation mode.

    Parameters
    ----------
    model
        A chain; see `kcomplex.training.shrinking.chain`.

    Raises
    ------
    SpecError
        The model isn't a chain.
    """
    links = links_of(model)
    masks = {}
    unused, zero = unused_units(links), _zero_units(links)
    inputs = None
    for link, without_use, always_zero in zip(links, unused, zero, strict=True):
        weight = link.layer.weight
        mask = without_use.reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape).clone()
        if inputs is not None:
            mask |= inputs.reshape(1, -1, *[1] * (weight.ndim - 2))
        masks[f"{link.name}.weight"] = mask
        if link.layer.bias is not None:
            masks[f"{link.name}.bias"] = without_use
        for name, module in link.between:
            if isinstance(module, BATCH_NORMS) and module.affine:
                masks[f"{name}.weight"], masks[f"{name}.bias"] = without_use.clone(), without_use.clone()
        inputs = always_zero.repeat_interleave(link.spread)
    return masks


def unused_units(links: Sequence[Link]) -> list[torch.Tensor]:
    """Return a mask a layer, shape (units,): True where only zero weights lead from a unit to the outputs."""
    masks = [torch.zeros(links[-1].units, dtype=torch.bool, device=links[-1].layer.weight.device)]
    for link, after in zip(links[-2::-1], links[:0:-1], strict=True):
        used = after.layer.weight[~masks[0]] != 0
        masks.insert(0, ~by_unit(used, link).any(2).any(0))
    return masks


def _zero_units(links: Sequence[Link]) -> list[torch.Tensor]:
    masks: list[torch.Tensor] = []
    for place, link in enumerate(links):
        incoming = link.layer.weight != 0
        if place:
            incoming = by_unit(incoming, links[place - 1])[:, ~masks[-1]]
        silent = ~incoming.flatten(1).any(1)
        bias = link.bias
        masks.append(silent & (bias == 0) & (link.outputs(bias) == 0))
    return masks


def by_unit(weights: torch.Tensor, before: Link) -> torch.Tensor:
    """Return a layer's weights, shape (outputs, inputs, ...), as (outputs, units before, weights of a unit)."""
    return weights.reshape(len(weights), before.units, before.spread * math.prod(weights.shape[2:]))
