"""The mosaics of a model's parameters: members, which may be quantised, and their projection on a mosaic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize

from kcomplex.errors import SpecError
from kcomplex.motifs.blocks import Blocks, blocks_of, mean_motifs, mosaic_bits, split_rows
from kcomplex.motifs.nearest import Indices, Rows
from kcomplex.training.protocol.mode import latent
from kcomplex.training.protocol.parametrised import HoldingQuantiser


@dataclass
class Mosaic:
    """The mosaic of some parameters: their names, and what the last projection left."""

    names: tuple[str, ...]
    motifs: Rows | None = None
    assignment: Indices | None = None
    report: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Projection:
    """Tensors on a mosaic.

    Attributes
    ----------
    tensors
        In the shapes and dtypes of what was projected.
    assignment, counts
        The motif of every block, of shape (m,); how many blocks use each motif, of shape (k,).
    distortion
        Sum of squared changes, in float64.
    changed
        Number of weights whose value changed.
    """

    tensors: list[torch.Tensor]
    assignment: Indices
    counts: NDArray[np.intp]
    distortion: float
    changed: int


@dataclass(frozen=True)
class Member:
    """A parameter on a mosaic, by its full name.

    Where a quantiser stands before it, the weights are latent ones, and motifs are made of the quantiser's symbols.
    """

    name: str
    parameter: nn.Parameter
    quantiser: HoldingQuantiser | None

    def values(self) -> Rows:
        """Return the weights as float64, or the coordinates of quantised ones among their levels, clipped to them."""
        if self.quantiser is None:
            return array_of(self.parameter)
        top = 2 ** (self.quantiser.bits - 1) - 1
        return np.clip(array_of(self.quantiser.coordinates(self.parameter)), -top, top)

    def tensor_of(self, values: NDArray[np.float64]) -> torch.Tensor:
        """Return flat values, of the kind that `values` returns, as weights of the parameter's shape and dtype."""
        tensor = torch.from_numpy(values).reshape(self.parameter.shape)
        if self.quantiser is None:
            return tensor.to(self.parameter.dtype)
        return self.quantiser.weights_at(tensor.to(self.parameter.device), self.parameter.detach()).cpu()


class Group:
    """The members of one mosaic in one model.

    Parameters
    ----------
    model
        Whose parameters they are.
    names
        Full names, plain ones for quantised parameters.
    block_size
        Weights a block.
    latents
        Take quantised parameters for plain ones.

    Raises
    ------
    SpecError
        A parameter has another parametrisation than a quantiser, or quantisers have different numbers of bits.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], block_size: int, *, latents: bool = False) -> None:
        self.block_size = block_size
        self.members = [_member(model, name, latents) for name in names]
        bits = {None if member.quantiser is None else member.quantiser.bits for member in self.members}
        if len(bits) > 1:
            raise SpecError(
                f"{', '.join(names[:3])} ... have different bits ({', '.join(map(str, bits))}) and can't share motifs: "
                "give each tensor its own (scope=tensor)"
            )
        self.bits: int | None = bits.pop()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The members' weights."""
        return [member.parameter for member in self.members]

    @property
    def word_bits(self) -> int:
        """Bits of a motif's entry."""
        return 8 * self._widest.itemsize if self.bits is None else self.bits

    @property
    def _widest(self) -> torch.dtype:
        return reduce(torch.promote_types, (parameter.dtype for parameter in self.parameters))

    def hold(self) -> None:
        """Let quantisers take the scales of the weights as they are now, and hold them."""
        for member in self.members:
            if member.quantiser is not None:
                member.quantiser.hold(member.parameter.detach())

    def blocks(self) -> Blocks:
        """Return the blocks of all members."""
        return blocks_of([member.values() for member in self.members], self.block_size, [m.name for m in self.members])

    def exact(self, motifs: Rows) -> Rows:
        """Return motifs that the members can hold: whole symbols, or values of the widest dtype."""
        if self.bits is not None:
            return np.rint(motifs) + 0.0
        stored: Rows = torch.from_numpy(motifs).to(self._widest).to(torch.float64).numpy()
        return stored

    @torch.no_grad()
    def place(self, motifs: Rows, assignment: Indices) -> Projection:
        """Put every block's assigned motif in its place, in the model; return what that changed."""
        projection = replaced(self.parameters, motifs, assignment, [member.tensor_of for member in self.members])
        if projection.changed:
            for parameter, tensor in zip(self.parameters, projection.tensors, strict=True):
                parameter.copy_(tensor)
        return projection

    def tie(self, mosaic: Mosaic, *, force_zero: bool, exact: bool) -> Projection:
        """Make every motif the mean of its blocks, so that they are equal again; the assignment stays."""
        assert mosaic.motifs is not None
        assert mosaic.assignment is not None
        motifs = mean_motifs(self.blocks(), mosaic.motifs, mosaic.assignment, force_zero=force_zero)
        mosaic.motifs = self.exact(motifs) if exact or self.bits is None else motifs
        return self.place(mosaic.motifs, mosaic.assignment)

    def figures(self, projection: Projection) -> dict[str, float]:
        """Return what `MoMos.report` tells of a projection."""
        used = int(np.count_nonzero(projection.counts))
        weights = sum(parameter.numel() for parameter in self.parameters)
        return {
            "motifs": float(len(projection.counts)),
            "motifs_used": float(used),
            "distortion": projection.distortion,
            "changed": float(projection.changed),
            "nominal_bits": float(mosaic_bits(used, self.block_size, self.word_bits, len(projection.assignment))),
            "raw_bits": float(8 * self._widest.itemsize * weights),
        }


def replaced(
    tensors: Sequence[torch.Tensor],
    motifs: Rows,
    assignment: Indices,
    tensors_of: Sequence[Callable[[Rows], torch.Tensor]],
) -> Projection:
    """Return tensors with the assigned motif in the place of every block; they themselves aren't changed.

    Parameters
    ----------
    tensors
        Cut in blocks as `kcomplex.motifs.blocks.blocks_of` does.
    motifs, assignment
        Of shapes (k, s) and (m,).
    tensors_of
        For each tensor, what makes one of its shape and dtype of flat entries of motifs.
    """
    projected, distortion, changed = [], 0.0, 0
    rows = split_rows(motifs[assignment], tuple(tensor.numel() for tensor in tensors))
    for tensor, flat, tensor_of in zip(tensors, rows, tensors_of, strict=True):
        after = tensor_of(flat)
        difference = array_of(after) - array_of(tensor)
        distortion += float(np.square(difference).sum())
        changed += int(np.count_nonzero(difference))
        projected.append(after)
    return Projection(projected, assignment, np.bincount(assignment, minlength=len(motifs)), distortion, changed)


def array_of(tensor: torch.Tensor) -> Rows:
    """Return a tensor as a float64 array."""
    array: Rows = tensor.detach().to("cpu", torch.float64).numpy()
    return array


def blocks_in(model: nn.Module, names: Sequence[str], block_size: int) -> int:
    """Return the number of blocks of the named parameters."""
    return sum(-(-_latent(model, name).numel() // block_size) for name in names)


def _latent(model: nn.Module, name: str) -> nn.Parameter:
    path, _, last = name.rpartition(".")
    return latent(model.get_submodule(path), last)


def _member(model: nn.Module, full: str, latents: bool) -> Member:
    path, _, name = full.rpartition(".")
    module = model.get_submodule(path)
    parameter = latent(module, name)
    if latents or not parametrize.is_parametrized(module, name):
        return Member(full, parameter, None)
    chain = list(module.get_submodule(f"parametrizations.{name}").children())
    if len(chain) != 1 or not isinstance(chain[0], HoldingQuantiser):
        raise SpecError(f"{full!r} is parametrised by something that doesn't quantise entry by entry: exclude it")
    return Member(full, parameter, chain[0])
