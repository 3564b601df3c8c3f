"""Bit operations: what a quantised and pruned network costs to run, layer by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

from kcomplex.errors import SpecError
from kcomplex.training.protocol.mode import WEIGHT_LAYERS, WEIGHT_NAMES
from kcomplex.training.protocol.parametrised import HoldingQuantiser

FULL_PRECISION = 32

_Counter = Callable[[nn.Module, tuple[Any, ...], Any], dict[str, int]]


@torch.no_grad()
def bit_operations(
    model: nn.Module,
    inputs: torch.Tensor | tuple[torch.Tensor, ...],
    bits: Mapping[str, float],
    *,
    activation_bits: int = FULL_PRECISION,
) -> pd.DataFrame:
    """Return the bit operations of one forward pass, a row for each weight tensor that multiplies something.

    Parameters
    ----------
    model
        With plain weights, as `Mode.convert` gives it; it isn't changed.
    inputs
        A batch, or the positional arguments of one forward pass.
    bits
        Bits a weight of the quantised parameters by full name, a tied one by any of its names. The others count at full
        precision: 32 bits, none of them left out however many are zero, activations at 32 bits too.
    activation_bits
        Bits of the inputs of quantised layers.

    Returns
    -------
    DataFrame
        Indexed by parameter: ``macs``, multiplications by a weight in this pass; ``density``, the share of non-zero
        weights; ``bits``; ``bit_operations``, macs x density x bits x activation_bits; and ``full``, macs x 32 x 32.
        ``attrs["relative"]`` is the sum of bit operations over that of ``full``.

    Raises
    ------
    SpecError
        ``bits`` names something that isn't the weight of a linear, convolution, attention or embedding layer, or the
        pass used none, or weights aren't plain parameters.

    Notes
    -----
    Biases, norms, activations and the products of activations in attention aren't counted. Embeddings multiply nothing.
    """
    counted = copy.deepcopy(model).eval()
    macs: dict[str, int] = {}

    def counting(prefix: str, counter: _Counter) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            for name, count in counter(module, (*args, *kwargs.values()), output).items():
                full = f"{prefix}.{name}" if prefix else name
                macs[full] = macs.get(full, 0) + count

        return hook

    for prefix, module in counted.named_modules():
        counter = _counter(module)
        if counter is not None:
            module.register_forward_hook(counting(prefix, counter), with_kwargs=True)
    counted(*inputs) if isinstance(inputs, tuple) else counted(inputs)
    # A tied weight is quantised under one of its names, and multiplies under another.
    parameters = dict(counted.named_parameters(remove_duplicate=False))
    hidden = [name for name in macs if name not in parameters]
    if hidden:
        raise SpecError(f"not plain parameters: {', '.join(hidden)}; take the model that the mode's convert returns")
    known = {id(parameters[name]) for name in macs}
    known |= {id(module.weight) for module in counted.modules() if isinstance(module, nn.Embedding)}
    unknown = [name for name in bits if name not in parameters or id(parameters[name]) not in known]
    if unknown or not macs:
        raise SpecError(
            f"no weights of layers that this forward pass used: {', '.join(unknown) or 'none at all'}; there are "
            f"{', '.join(list(macs)[:8])}"
        )
    widths = {id(parameters[name]): float(width) for name, width in bits.items()}
    rows = []
    for name, count in macs.items():
        weights = parameters[name]
        quantised = id(weights) in widths
        density = int(torch.count_nonzero(weights)) / weights.numel() if quantised else 1.0
        width = widths.get(id(weights), float(FULL_PRECISION))
        operations = count * density * width * (activation_bits if quantised else FULL_PRECISION)
        rows.append((name, count, density, width, operations, float(count * FULL_PRECISION**2)))
    columns = ["parameter", "macs", "density", "bits", "bit_operations", "full"]
    frame = pd.DataFrame(rows, columns=columns).set_index("parameter")
    frame.attrs["relative"] = float(frame["bit_operations"].sum() / frame["full"].sum())
    return frame


def weight_bits(model: nn.Module) -> dict[str, int]:
    """Return the bits a weight of every layer that a model in training quantises, by full name; for `bit_operations`.

    Parameters
    ----------
    model
        With its quantisers attached, before `Mode.convert`. Quantised biases and norms, which aren't counted, are left
        out.
    """
    bits = {}
    for prefix, module in model.named_modules():
        if not (isinstance(module, WEIGHT_LAYERS) and parametrize.is_parametrized(module)):
            continue
        for name, chain in module.get_submodule("parametrizations").named_children():
            for parametrisation in chain.children():
                if name in WEIGHT_NAMES and isinstance(parametrisation, HoldingQuantiser):
                    bits[f"{prefix}.{name}" if prefix else name] = parametrisation.bits
    return bits


def _counter(module: nn.Module) -> _Counter | None:
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention
    if isinstance(module, nn.Linear):
        return lambda layer, _, output: {"weight": output.numel() * layer.in_features}
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return lambda layer, _, output: {"weight": output.numel() * math.prod(layer.get_parameter("weight").shape[1:])}
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return lambda layer, args, _: {"weight": args[0].numel() * math.prod(layer.get_parameter("weight").shape[1:])}
    return None


def _of_attention(layer: nn.Module, args: tuple[Any, ...], _: Any) -> dict[str, int]:
    query, key, value = args[:3]
    width = layer.embed_dim
    assert isinstance(width, int)
    counts = {"q_proj_weight": query.numel(), "k_proj_weight": key.numel(), "v_proj_weight": value.numel()}
    if layer.in_proj_weight is not None:
        counts = {"in_proj_weight": sum(counts.values())}
    # The layer applies its output projection itself, without calling it as a module.
    return {name: count * width for name, count in (*counts.items(), ("out_proj.weight", query.numel()))}
