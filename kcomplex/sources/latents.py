"""What a network computes with, from the latent tensors that its state dict holds in place of it.

Pruning (`torch.nn.utils.prune`) stores a dense original and a mask, weight normalisation a direction and a norm,
spectral normalisation an original and two singular vectors. A live module hands out the product; of a file, it is
computed here as PyTorch does, so that both give the same number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from kcomplex.sources.state_dicts import merge_shared
from kcomplex.weights import TensorHandle, Weights


class Folded(NamedTuple):
    """Tensors that are computed, and the stored ones that they are computed from.

    Attributes
    ----------
    computed
        What the network computes with, under its plain name.
    stored
        Role (``latent`` or ``mask``) of the stored tensors by name, and the name of the one that each is folded into.
    """

    computed: list[TensorHandle]
    stored: dict[str, tuple[str, str]]


def fold(weights: Weights) -> Folded:
    """Return the products of latent tensors that weights hold; a product that is stored as well isn't computed."""
    by_name = {name: handle for handle in weights.values() for name in (handle.name, *handle.aliases)}
    stored_as: dict[str, tuple[str, str]] = {}
    keyed: list[tuple[Hashable, TensorHandle]] = []
    chains = Counter(match["chain"] for match in map(_CHAIN.match, by_name) if match)
    found: dict[str, TensorHandle] | None = None
    # What is computed may be the latent tensor of something else: a pruned direction of a normalised weight.
    while found is None or found:
        found = {}
        for name in by_name:
            made = _product_of(name, by_name, chains)
            if made is None:
                continue
            product, stored, compute = made
            handles = [by_name[item] for item in stored]
            original, read = handles[0], partial(_read, compute, handles)
            found[product] = TensorHandle(product, original.shape, original.dtype, read, trainable=original.trainable)
            keyed.append((tuple(item.name for item in handles), found[product]))
            for item in handles:
                stored_as[item.name] = "mask" if item.name.endswith("_mask") else "latent", product
        by_name |= found
    computed = [handle for handle in merge_shared(keyed) if handle.name not in stored_as]
    return Folded(computed, stored_as)


def _read(compute: Callable[..., torch.Tensor], handles: list[TensorHandle]) -> torch.Tensor:
    with torch.no_grad():
        return compute(*(handle.read().detach() for handle in handles))


_Product = tuple[str, tuple[str, ...], Callable[..., torch.Tensor]]


def _product_of(name: str, by_name: dict[str, TensorHandle], chains: Mapping[str, int]) -> _Product | None:
    """Return the product that a tensor is the original of: its name, the stored names, and how it is computed."""
    for pattern, product, others, compute in _FORMS:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        parts = match.groupdict()
        names = (name, *(other.format(**parts) for other in others))
        target = product.format(**parts)
        if target in by_name or not all(item in by_name for item in names):
            continue
        # Where several parametrisations stand in a row, a file doesn't say what the others do.
        if chains.get(parts.get("chain", ""), 0) > len(names):
            continue
        made = compute(*(by_name[item].shape for item in names))
        if made is not None:
            return target, names, made
    return None


def _masked(original: tuple[int, ...], mask: tuple[int, ...]) -> Callable[..., torch.Tensor] | None:
    def product(dense: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return kept.to(dense.dtype) * dense

    return product if original == mask else None


def _normalised(direction: tuple[int, ...], norm: tuple[int, ...]) -> Callable[..., torch.Tensor] | None:
    """Weight normalisation; the norm's shape tells the dimension that keeps its own norms, or none."""
    if not norm:
        dimension = -1
    elif len(norm) != len(direction):
        return None
    else:
        kept = [at for at, size in enumerate(norm) if size > 1] or [
            at for at, size in enumerate(direction) if size == 1
        ]
        if not kept or any(norm[at] != (direction[at] if at == kept[0] else 1) for at in range(len(norm))):
            return None
        dimension = kept[0]

    def product(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch._weight_norm(v, g, dimension)

    return product


def _divided(
    original: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> Callable[..., torch.Tensor] | None:
    """Spectral normalisation: the original divided by its greatest singular value, in evaluation."""
    if len(left) != 1 or len(right) != 1 or len(original) < 2:
        return None
    total = left[0] * right[0]
    dimensions = [at for at, size in enumerate(original) if size == left[0]]
    if not dimensions or total != torch.Size(original).numel():
        return None

    def product(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Where several dimensions have the length of the left vector, it is the one whose matrix it is a vector of.
        matrices = [weight.movedim(at, 0).reshape(left[0], -1) for at in dimensions]
        matrix = min(matrices, key=lambda item: float((item @ v - (u @ (item @ v)) * u).norm()))
        return weight / torch.dot(u, torch.mv(matrix, v))

    return product


# Of each form: the original's name, the product's, those of what else is stored, and what makes the computation of
# their shapes; nothing where these don't fit.
_CHAIN = re.compile(r"(?P<chain>(?P<module>(.*\.)?)parametrizations\.(?P<name>[^.]+)\.)", re.DOTALL)
_FORMS = (
    (re.compile(r"(?P<stem>.*)_orig", re.DOTALL), "{stem}", ("{stem}_mask",), _masked),
    (re.compile(r"(?P<stem>.*)_orig", re.DOTALL), "{stem}", ("{stem}_u", "{stem}_v"), _divided),
    # Other tensors end in the same letters: those of RWKV are no latent ones.
    (re.compile(r"(?P<stem>(.*\.)?weight[^.]*)_v", re.DOTALL), "{stem}", ("{stem}_g",), _normalised),
    (
        re.compile(f"{_CHAIN.pattern}original1", re.DOTALL),
        "{module}{name}",
        ("{chain}original0",),
        _normalised,
    ),
    (
        re.compile(f"{_CHAIN.pattern}original", re.DOTALL),
        "{module}{name}",
        ("{chain}0._u", "{chain}0._v"),
        _divided,
    ),
)
