"""Batch normalisation: its statistics, re-estimated after weights were changed by other means than training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kcomplex.errors import SpecError


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor | tuple[torch.Tensor, ...]]) -> int:
    """Return the number of normalisations whose running statistics were estimated anew, in place, from batches.

    A projection or pruning changes what reaches a normalisation; its running mean and variance still describe what
    reached it before. The new ones are averages over all batches alike, whatever the momentum. Nothing else changes:
    in training as in evaluation everything else, such as dropout, acts as in evaluation.

    Parameters
    ----------
    model
        A network that a mode is attached to, or what `Mode.convert` returned.
    batches
        Inputs of training data, or tuples whose first entry is one, such as a loader's; some hundred images do.

    Raises
    ------
    SpecError
        There are normalisations with running statistics, but no batches.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            # None: the cumulative average.
            norm.momentum = None
            norm.train()
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            seen += 1
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum, buffers in zip(norms, momenta, kept, strict=True):
            norm.momentum = momentum
            if seen:
                continue
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
    if not seen:
        raise SpecError("batch normalisation can't be re-estimated without batches of training data")
    return len(norms)
