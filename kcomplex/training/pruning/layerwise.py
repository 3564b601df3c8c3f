"""Layerwise pruning: masks that change the outputs of each layer least for what they save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.functional import pad, unfold

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import refuse_others, refuse_outside
from kcomplex.training.protocol.mode import Evaluate
from kcomplex.training.protocol.parametrised import arithmetic_dtype
from kcomplex.training.protocol.schedule import saturated
from kcomplex.training.pruning.pruning import PrunedState, Pruning

Layer: TypeAlias = nn.Linear | nn.Conv2d
Form: TypeAlias = Literal["projected", "sigmoid"]

_CHECK_EVERY = 20
_WINDOW = 30
_CHECKS_IN_A_ROW = 3
# So close to 0 or 1 is a sigmoid taken for decided.
_DECIDED = 4e-4
_SIGMOID_START = -5.0
_LR = {"projected": 1e-2, "sigmoid": 1e-1}
# Entries of the unfolded inputs of a convolution that are in memory at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Layerwise(Pruning):
    """Trains plainly, then finds for every layer the probabilities with which its weights are kept.

    What is minimised is the expected squared change of the layer's outputs under independent masks, plus the price of
    the weights kept; see `expected_objective`. The layers' inputs are those of the held-out data. Magnitude pruning
    follows, as in every `Pruning`.

    Parameters
    ----------
    bits_per_parameter, alpha, samples, tolerance, error_tolerance, cleaning, include, exclude
        See `Pruning`. The price is set against squared changes of outputs before the activation, a sample: it isn't one
        of description length. With a cleaning, weights that a pruned layer leaves without influence go at once.
    form
        ``projected``: probabilities are free in [0, 1] and rounded at the end, from the last layer to the first.
        ``sigmoid``: they are sigmoids, from the first layer to the last; what stays between 0 and 1 scales its weight.
    start
        Where projected probabilities begin.
    steps
        Most steps of Adam a layer; fewer, where the objective is saturated or everything is decided.

    References
    ----------
    L. S. Barth, P. von Petersenn: Efficient compression of neural networks and datasets. arXiv:2505.17469, 2025.
    """

    form: Form = "projected"
    start: float = 0.3
    steps: int = 2000
    name: ClassVar[str] = "layerwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rising_epochs:
            raise SpecError("layerwise: there is no price while it trains that could rise; leave rising_epochs out")
        refuse_others(self, form=_LR)
        refuse_outside(self, start="[0, 1]", steps="[1, inf)")

    def attach(self, model: nn.Module) -> PrunedState:
        """Return what `Pruning.attach` does; SpecError where a layer is neither linear nor an ungrouped convolution."""
        state = super().attach(model)
        _layers_of(model, state)
        return state

    def regulariser(self) -> torch.Tensor:
        """Return zero: the first phase trains plainly."""
        return self.no_penalty()

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Prune layer by layer, then by magnitude as much as is tolerated; see `Pruning.begin_fine_tuning`.

        Raises
        ------
        SpecError
            The evaluation doesn't call one of the layers, too.
        """
        layers = _layers_of(self.model, self.pruned_state)
        grams = _grams(layers, evaluate)
        missing = sorted(set(layers) - set(grams))
        if missing:
            raise SpecError(f"layerwise: the evaluation doesn't call {', '.join(missing)}: exclude them")
        # In the order of their calls, which is that from the inputs to the outputs.
        names = list(grams) if self.form == "sigmoid" else list(grams)[::-1]
        for name in names:
            self._prune_layer(name, layers[name], *grams[name])
            self.clean(evaluate)
        super().begin_fine_tuning(evaluate, error)

    @torch.no_grad()
    def _prune_layer(self, name: str, layer: Layer, gram: torch.Tensor, samples: int) -> None:
        state = self.pruned_state
        matrix = layer.weight.flatten(1)
        with_bias = f"{name}.bias" in state.weights
        if with_bias:
            assert layer.bias is not None
            matrix = torch.cat([matrix, layer.bias[:, None]], 1)
        size = matrix.shape[1]
        wide = matrix.to(arithmetic_dtype(matrix.dtype))
        kept = probabilities(
            wide, (gram[:size, :size] / samples).to(wide), state.price, self.form, self.start, self.steps
        )
        pruned = (wide * kept).to(matrix.dtype)
        columns = layer.weight[0].numel()
        if f"{name}.weight" in state.weights:
            layer.weight.copy_(pruned[:, :columns].reshape(layer.weight.shape))
        if with_bias:
            layer.bias.copy_(pruned[:, -1])  # type: ignore[union-attr]


def _layers_of(model: nn.Module, state: PrunedState) -> dict[str, Layer]:
    """Return the layers of the priced weights by name."""
    layers: dict[str, Layer] = {}
    for full in state.weights:
        name, _, parameter = full.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
            raise SpecError(
                f"layerwise: {full!r} belongs to a {type(layer).__name__}, not to an nn.Linear or an ungrouped "
                "nn.Conv2d: exclude it"
            )
        if parameter == "weight":
            layers[name] = layer
        elif f"{name}.weight" not in state.weights:
            raise SpecError(f"layerwise: {full!r} is chosen without the weight of its layer: exclude it")
    return layers


def expected_objective(
    weights: torch.Tensor,
    kept: torch.Tensor,
    gram: torch.Tensor,
    cross: torch.Tensor,
    target: torch.Tensor | float,
    price: float,
) -> torch.Tensor:
    """Return the expectation of ``|Y - (W * Z) X|^2 + price * sum(Z)`` over independent Bernoulli masks Z.

    It is ``|Y - (W * P) X|^2 + sum(W^2 P (1 - P) X^2) + price * sum(P)``, computed from second moments alone. Linear in
    every single probability, it has its minima at 0 and 1.

    Parameters
    ----------
    weights, kept
        W, with the bias as the last column where it has a mask too, and P; shape (outputs, inputs).
    gram
        ``X X^T``; shape (inputs, inputs). Of a bias, X has a row of ones.
    cross
        ``Y X^T``; shape (outputs, inputs).
    target
        ``|Y|^2``.
    price
        Of a weight kept, in the unit of the squares.
    """
    mean = weights * kept
    explained = ((mean @ gram - 2 * cross) * mean).sum()
    variance = (weights.square() * kept * (1 - kept) * gram.diagonal()).sum()
    return target + explained + variance + price * kept.sum()


@torch.no_grad()
def probabilities(
    weights: torch.Tensor, gram: torch.Tensor, price: float, form: Form, start: float, steps: int
) -> torch.Tensor:
    """Return the probabilities that minimise `expected_objective` for the layer's own outputs, by Adam.

    Gram may be a mean over samples, and the price is then one a sample. For form, start and steps see `Layerwise`.
    """
    cross = weights @ gram
    target = (cross * weights).sum()
    squares = weights.square() * gram.diagonal()
    alive = weights != 0
    projected = form == "projected"
    latent = torch.where(alive, start, 0.0).to(weights) if projected else torch.full_like(weights, _SIGMOID_START)
    optimizer = torch.optim.Adam([latent.requires_grad_()], lr=_LR[form])
    objectives: list[float] = []
    flat_checks = decided_checks = 0
    before = None
    for step in range(1, steps + 1):
        kept = latent.detach() if projected else torch.sigmoid(latent)
        mean = weights * kept
        # One product serves objective and gradient.
        change = mean @ gram - cross
        objective = target + ((change - cross) * mean).sum() + (squares * kept * (1 - kept)).sum() + price * kept.sum()
        objectives.append(float(objective))
        slope = 2 * weights * change + squares * (1 - 2 * kept) + price
        latent.grad = slope if projected else slope * kept * (1 - kept)
        optimizer.step()
        if projected:
            latent.clamp_(0, 1)
        if step % _CHECK_EVERY or step < _WINDOW:
            continue
        rounded = _decided(latent, form)
        flat = saturated(objectives[-_WINDOW:])
        decided = bool(((rounded == 0) | (rounded == 1)).all())
        flat_checks = flat_checks + 1 if flat else 0
        decided_checks = decided_checks + 1 if decided else 0
        if projected and max(flat_checks, decided_checks) >= _CHECKS_IN_A_ROW:
            break
        if not projected and flat and decided and before is not None and torch.equal(before, rounded):
            break
        before = rounded
    rounded = (latent.detach() > 0.5).to(weights) if projected else _decided(latent, form)
    return torch.where(alive, rounded, 0)


def _decided(latent: torch.Tensor, form: Form) -> torch.Tensor:
    """Return the probabilities, with sigmoids that are close to 0 or 1 rounded."""
    if form == "projected":
        return latent.detach().clone()
    kept = torch.sigmoid(latent.detach())
    return torch.where(kept < _DECIDED, 0, torch.where(kept > 1 - _DECIDED, 1, kept))


@torch.no_grad()
def _grams(layers: dict[str, Layer], evaluate: Callable[[], Any]) -> dict[str, tuple[torch.Tensor, int]]:
    """Return by name, in the order of calls, the second moments of the inputs with a one appended, and their number.

    The inputs of a convolution are its patches; a sample is an image or, in a linear layer, a row.
    """
    sums: dict[str, tuple[torch.Tensor, int]] = {}

    def add(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            total, samples = sums.get(name, (None, 0))
            for rows, count in _rows(layer, inputs[0].detach()):
                wide = torch.cat([rows, rows.new_ones(len(rows), 1)], 1).to(arithmetic_dtype(rows.dtype))
                moments = (wide.T @ wide).double()
                total = moments if total is None else total.add_(moments)
                samples += count
            if total is not None:
                sums[name] = total, samples

        return hook

    handles = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _rows(layer: Layer, inputs: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield a layer's inputs as matrices, one row a product with the weights, and the samples in each."""
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield rows, len(rows)
        return
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = pad(inputs.reshape(-1, *inputs.shape[-3:]), layer._reversed_padding_repeated_twice, mode=mode)
    patches = layer.weight[0].numel() * images.shape[-2] * images.shape[-1]
    for chunk in torch.split(images, max(1, _CHUNK // patches)):
        columns = unfold(chunk, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
        yield columns.transpose(1, 2).flatten(0, 1), len(chunk)
