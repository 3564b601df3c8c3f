"""Chains: networks whose linear and convolution layers follow one another, so that units can be told apart."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from kcomplex.errors import SpecError

Layer: TypeAlias = nn.Linear | nn.Conv2d
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d

_LAYERS = (nn.Linear, nn.Conv2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.AlphaDropout,
)
# What they make of a constant map is the constant; of an average that counts padding only if that is zero.
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Link:
    """A layer of a chain.

    Attributes
    ----------
    name
        Of the layer in the model.
    layer
        Linear or convolution; a unit is a row of its weight.
    between
        What its outputs go through on their way to the next layer, by name, in order.
    spread
        How many consecutive inputs of the next layer come from one unit: more than one where maps are flattened.
    """

    name: str
    layer: Layer
    between: tuple[tuple[str, nn.Module], ...]
    spread: int

    @property
    def units(self) -> int:
        """Number of units."""
        return self.layer.weight.shape[0]

    @property
    def bias(self) -> torch.Tensor:
        """The bias, zeros if the layer has none; shape (units,)."""
        weight, bias = self.layer.weight, self.layer.bias
        return weight.new_zeros(self.units) if bias is None else bias.detach()

    def outputs(self, constants: torch.Tensor) -> torch.Tensor:
        """Return what reaches the next layer from units that are constant before whatever is between, in evaluation.

        Parameters
        ----------
        constants
            One value a unit, shape (units,).

        Returns
        -------
        Shape (units,); NaN where it isn't the same at all places of the map.
        """
        maps = constants.detach().reshape(1, -1, *[1] * (self.layer.weight.ndim - 2))
        for _, module in self.between:
            if isinstance(module, nn.AvgPool2d) and module.padding not in (0, (0, 0)) and module.count_include_pad:
                maps = torch.where(maps == 0, maps, torch.nan)
            elif isinstance(module, nn.Flatten):
                maps = maps.flatten(1)
            elif not isinstance(module, _POOLING):
                with torch.no_grad():
                    maps = copy.deepcopy(module).eval()(maps)
        return maps.flatten()


def links_of(model: nn.Module) -> list[Link]:
    """Return the layers of a chain, from the inputs on.

    A chain is an `nn.Sequential`, also a nested one, of `nn.Linear` and ungrouped `nn.Conv2d` with elementwise
    activations, batch norms, dropout, pooling and flattening between them; before the first and after the last layer
    anything may stand.

    Raises
    ------
    SpecError
        The model isn't a chain; the message names the module that doesn't fit.
    """
    modules = _in_order(model, "")
    places = [place for place, (_, module) in enumerate(modules) if type(module) in _LAYERS]
    if not places:
        raise _refusal(model, "it has no nn.Linear or nn.Conv2d in a row of modules")
    for name, module in modules[places[0] : places[-1]]:
        if type(module) not in (*_LAYERS, *BATCH_NORMS, *_ELEMENTWISE, *_POOLING, nn.Flatten):
            raise _refusal(model, f"{name!r} is {type(module).__name__}")
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
            raise _refusal(model, f"{name!r} doesn't flatten from the second axis to the last")
        if type(module) in BATCH_NORMS and module.running_mean is None:
            raise _refusal(model, f"{name!r} keeps no running statistics")
    links: list[Link] = []
    for here, (place, after) in enumerate(zip(places, [*places[1:], None], strict=True)):
        name, layer = modules[place]
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or (here and isinstance(links[-1].layer, nn.Linear))):
            raise _refusal(model, f"{name!r} is a grouped convolution, or follows a linear layer")
        between = () if after is None else tuple(modules[place + 1 : after])
        for its_name, module in between:
            if isinstance(module, BATCH_NORMS) and module.num_features != layer.weight.shape[0]:
                raise _refusal(model, f"{its_name!r} doesn't norm the units of {name!r} one by one")
        spread = 1 if after is None else _spread(model, name, layer, between, modules[after])
        links.append(Link(name, layer, between, spread))
    parameters = [id(parameter) for _, module in modules for parameter in module.parameters()]
    if len(set(parameters)) != len(parameters):
        raise _refusal(model, "some of its modules share parameters")
    return links


def is_chain(model: nn.Module) -> bool:
    """Return whether `links_of` takes the model."""
    try:
        links_of(model)
    except SpecError:
        return False
    return True


def _spread(
    model: nn.Module,
    name: str,
    layer: Layer,
    between: tuple[tuple[str, nn.Module], ...],
    following: tuple[str, nn.Module],
) -> int:
    its_name, after = following
    units = layer.weight.shape[0]
    flattened = any(isinstance(module, nn.Flatten) for _, module in between)
    inputs = after.in_channels if isinstance(after, nn.Conv2d) else after.in_features
    assert isinstance(inputs, int)
    maps = isinstance(layer, nn.Conv2d) and isinstance(after, nn.Linear)
    if maps != flattened or inputs % units or (inputs != units and not maps):
        raise _refusal(model, f"the {units} units of {name!r} aren't the {inputs} inputs of {its_name!r}")
    return inputs // units


def _in_order(model: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    if type(model) is not nn.Sequential:
        return [(prefix, model)]
    children = [(f"{prefix}.{name}" if prefix else name, child) for name, child in model._modules.items()]
    return [module for name, child in children if child is not None for module in _in_order(child, name)]


def _refusal(model: nn.Module, reason: str) -> SpecError:
    return SpecError(
        f"{type(model).__name__} isn't a chain of linear and convolution layers: {reason}. Only for an nn.Sequential "
        "of nn.Linear, ungrouped nn.Conv2d, elementwise activations, batch norms, dropout, pooling and nn.Flatten is "
        "it known which weights belong to a unit"
    )
