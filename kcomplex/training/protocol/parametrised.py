"""Parametrisations on chosen parameters, and the arithmetic that quantising and pruning modes have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from kcomplex.training.protocol.mode import WEIGHT_LAYERS, chosen_parameters

Parametrisation = TypeVar("Parametrisation", bound=nn.Module)

# These have too few significant bits for the arithmetic of a quantiser; it's done in float32 for them.
_SHORT = (torch.float16, torch.bfloat16)


class HoldingQuantiser(nn.Module, ABC):
    """A quantiser whose scale may be held, so that levels stay where they are while the weights move.

    What is held is None where the scale is computed anew from the weights.
    """

    held: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.held = None

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits a code."""

    @abstractmethod
    def hold(self, weights: torch.Tensor) -> None:
        """Keep the scale that these weights have."""

    @abstractmethod
    def coordinates(self, weights: torch.Tensor) -> torch.Tensor:
        """Return where weights lie among the levels: continuous, increasing, integers at the levels, 0 at 0."""

    @abstractmethod
    def weights_at(self, coordinates: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the weights at coordinates, in the dtype of ``like``, whose scale it is if none is held."""


def parametrise(
    model: nn.Module,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    make: Callable[[nn.Parameter], Parametrisation],
    *,
    reshaping: bool = False,
) -> dict[str, Parametrisation]:
    """Return the parametrisations by full parameter name, after registering one on each chosen parameter.

    A parameter that several modules share gets one parametrisation in all of them, so that it stays shared.

    Parameters
    ----------
    model, include, exclude
        What is changed in place, and the choice of its parameters; see `Mode`.
    make
        Returns the parametrisation of a parameter, on the parameter's device.
    reshaping
        Whether latent parameters have other shapes than the weights.

    Raises
    ------
    SpecError
        See `chosen_parameters`; nothing is changed then.
    """
    sharers: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            sharers.setdefault(id(parameter), []).append((module, name))
    made = {}
    for module, name, full in chosen_parameters(model, WEIGHT_LAYERS, include, exclude):
        parameter = module.get_parameter(name)
        made[full] = make(parameter)
        for sharer, its_name in sharers[id(parameter)]:
            parametrize.register_parametrization(sharer, its_name, made[full], unsafe=reshaping)
    return made


def effective(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and the tensors that the network computes with, detached, one at a time."""
    for full in names:
        path, _, name = full.rpartition(".")
        with torch.no_grad():
            tensor: torch.Tensor = getattr(model.get_submodule(path), name).detach()
        yield full, tensor


def share_of_zeros(model: nn.Module, names: Iterable[str]) -> float:
    """Return the share of exact zeros in the named effective tensors."""
    zeros = elements = 0
    for _, tensor in effective(model, names):
        zeros += tensor.numel() - int(torch.count_nonzero(tensor))
        elements += tensor.numel()
    return zeros / elements


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a quantiser computes in: float32 for the shorter ones, else the tensor's own."""
    return torch.float32 if dtype in _SHORT else dtype


def compiled_loops_serve(tensor: torch.Tensor) -> bool:
    """Return whether a compiled loop can take a tensor: on the CPU, and not while PyTorch traces the operations."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
