"""RGP: random gradients tell which parameters have no influence, in any network that can be differentiated."""

from __future__ import annotations

import copy

import torch
from torch import nn

from kcomplex.errors import SpecError


def without_gradient(
    model: nn.Module, shape: tuple[int, ...], draws: int = 8, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return masks by full parameter name, True where the gradient is exactly zero in every draw.

    In each draw the inputs and the wanted outputs are standard normal, and the gradient is that of the squared error of
    a copy in float64 and evaluation mode. Parameters without influence are always among them; so may be others, such as
    those of a unit that is dead for these inputs and alive for real ones. Where the network is a chain,
    `kcomplex.training.shrinking.reachability.unreachable` makes no such mistakes.

    Parameters
    ----------
    model
        Returns one tensor of floats. It isn't changed.
    shape
        Of a batch of inputs.
    draws
        The more, the rarer are mistakes.
    seed
        Of the draws; no other generator is touched.

    Raises
    ------
    SpecError
        There is no draw, or the model doesn't take floats of this shape or doesn't return a tensor.

    References
    ----------
    L. S. Barth, P. von Petersenn: Efficient compression of neural networks and datasets. arXiv:2505.17469, 2025 (random
    gradient pruning, with one draw in the network's own precision).
    """
    if draws < 1:
        raise SpecError(f"random gradients need a draw or more, not {draws}")
    twin = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(twin.named_parameters())
    device = next(twin.parameters()).device
    masks: dict[str, torch.Tensor] = {}
    for parameter in parameters.values():
        parameter.requires_grad_()
    for _ in range(draws):
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        try:
            outputs = twin(inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise SpecError(f"{type(model).__name__} doesn't take random floats of shape {shape}: {error}") from error
        if not isinstance(outputs, torch.Tensor):
            raise SpecError(f"{type(model).__name__} returns {type(outputs).__name__}, not a tensor")
        wanted = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(device)
        gradients = torch.autograd.grad(
            (outputs - wanted).square().sum(), list(parameters.values()), materialize_grads=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            masks[name] = masks.get(name, torch.ones_like(gradient, dtype=torch.bool)) & (gradient == 0)
    return masks
