"""Hashed weight sharing: all weights are read from one small bank, at places that a hash function tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from kcomplex.estimators.spec import refuse_outside
from kcomplex.training.protocol.mode import Mode, chosen_weights
from kcomplex.training.protocol.parametrised import parametrise, share_of_zeros

# A prime just below 2**31: products of two residues fit in 64 bits.
_PRIME = 2**31 - 1


@dataclass(frozen=True)
class HashedSharing(Mode):
    """Trains one bank of parameters for the whole network; chunks of weights are chunks of the bank, hashed.

    A weight tensor is cut in chunks of consecutive weights. A chunk is read from the bank at a place, and with a sign,
    that a universal hash function gives for its number; a fixed scale gives every tensor its initial standard
    deviation. Only the bank and the scales need to be stored: the hash is a seed.

    Parameters
    ----------
    share
        Size of the bank as a share of the weights, in (0, 1].
    chunk
        Consecutive weights that stay together.
    include, exclude
        See `Mode`.
    seed
        Of the bank and the hash.

    Notes
    -----
    From ROAST (A. Desai, K. Zhou, A. Shrivastava: Hardware-aware compression with random operation access specific
    tile hashing, ICML 2023), without its hardware-aware tiles. The weights that the model had are lost.
    """

    share: float = 0.1
    chunk: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    name: ClassVar[str] = "hashed_sharing"

    def __post_init__(self) -> None:
        refuse_outside(self, share="(0, 1]", chunk="[1, inf)")

    def attach(self, model: nn.Module) -> tuple[tuple[str, ...], int, int]:
        """Return the names of the chosen weights, which are read from a bank from now on, its size and their number."""
        chosen = list(chosen_weights(model, self.include, self.exclude).values())
        weights = sum(parameter.numel() for parameter in chosen)
        entries = max(self.chunk, math.ceil(self.share * weights))
        generator = torch.Generator().manual_seed(self.seed)
        bank = nn.Parameter(torch.randn(entries, generator=generator).to(chosen[0]))
        start = 0

        def shared(parameter: nn.Parameter) -> nn.Module:
            nonlocal start
            made = _Shared(bank, parameter.detach(), start, self.chunk, self.seed)
            start += -(-parameter.numel() // self.chunk)
            return made

        made = parametrise(model, self.include, self.exclude, shared, reshaping=True)
        return tuple(made), entries, weights

    def report(self) -> dict[str, float]:
        """Return ``parameters`` in the bank, their ``share`` of the weights, and the share of ``zeros``."""
        names, entries, weights = self.state
        zeros = share_of_zeros(self.model, names)
        return {"parameters": float(entries), "share": entries / weights, "zeros": zeros}


class _Shared(nn.Module):
    """The parametrisation of one tensor; what it replaces is an empty parameter."""

    places: torch.Tensor
    factors: torch.Tensor

    def __init__(self, bank: nn.Parameter, weights: torch.Tensor, start: int, chunk: int, seed: int) -> None:
        super().__init__()
        self.bank = bank
        self.shape = weights.shape
        self.dtype = weights.dtype
        count = -(-weights.numel() // chunk)
        numbers = torch.arange(start, start + count, dtype=torch.int64)
        hashed = _hashed(numbers, seed)
        first = hashed % (len(bank) - chunk + 1)
        signs = 1 - 2 * (_hashed(numbers, seed + 1) % 2)
        scale = float(weights.double().std(correction=0)) if weights.numel() > 1 else float(weights.double().abs())
        places = (first[:, None] + torch.arange(chunk)).reshape(-1)[: weights.numel()]
        factors = (signs.repeat_interleave(chunk)[: weights.numel()] * scale).to(weights.dtype)
        self.register_buffer("places", places.to(weights.device), persistent=False)
        self.register_buffer("factors", factors.to(weights.device))

    def forward(self, nothing: torch.Tensor) -> torch.Tensor:
        """Return the tensor's weights."""
        # The empty sum, zero, keeps the empty parameter in the graph: replicas wait for every parameter's gradient.
        return (self.bank[self.places].to(self.dtype) * self.factors).reshape(self.shape) + nothing.sum()

    def right_inverse(self, weights: torch.Tensor) -> torch.Tensor:
        """Return what stays of the weights that were: nothing."""
        return weights.new_empty(0)


def _hashed(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """Return (a x + b) mod p for numbers below p, with a and b drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (int(torch.randint(1, _PRIME, (), generator=generator)) for _ in range(2))
    return (numbers * a + b) % _PRIME
