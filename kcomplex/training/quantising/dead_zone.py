"""The learnable dead-zone quantiser behind `kcomplex.training.quantising.codeq`, with closed-form gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kcomplex.training.protocol.parametrised import HoldingQuantiser, arithmetic_dtype, compiled_loops_serve
from kcomplex.training.quantising import dead_zone_kernels

MIN_BITS = 2
# A plain number at fixed precision, a tensor without dimensions where the bits are learned.
Scalar: TypeAlias = "float | torch.Tensor"
# Half of the usual initial logit (3) opens the quantiser half.
_MIDDLE = 1.5


@dataclass(frozen=True)
class Scheme:
    """What a dead-zone quantiser doesn't learn; the fields are those of `kcomplex.training.quantising.codeq.CoDeQ`."""

    bits: int
    max_bits: int
    quantile: float
    reference: bool
    per_channel: bool = False

    def openness(self, logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the openness p of a logit, in [0, 1], and its derivative."""
        if self.reference:
            bent = torch.tanh(logit)
            return bent.abs(), bent.sign() * (1 - bent.square())
        opened = 0.5 * (1 + torch.tanh(logit - _MIDDLE))
        return opened, 2 * opened * (1 - opened)

    def rows(self, weights: torch.Tensor) -> torch.Tensor:
        """Return detached weights in the dtype of the arithmetic, a row for each of their scales."""
        wide = weights.detach().to(arithmetic_dtype(weights.dtype))
        return wide.reshape(len(wide) if self.per_channel and wide.ndim else 1, -1)

    def absmax(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the top level a of every row: the quantile of the magnitudes or, where that is 0, their maximum."""
        quantile, largest = quantile_and_maximum(rows, self.quantile)
        return quantile if self.reference else torch.where(quantile == 0, largest, quantile)

    def grid(self, absmax: torch.Tensor, logit_dead_zone: torch.Tensor, logit_bits: torch.Tensor | None) -> Grid:
        """Return the levels that top levels and the logits stand for."""
        bits: Scalar = float(self.bits)
        if logit_bits is not None:
            bits = torch.round(MIN_BITS + (self.max_bits - MIN_BITS) * self.openness(logit_bits)[0])
        top = 2 ** (bits - 1) - 1
        dead_zone = 2 * absmax * (1 - self.openness(logit_dead_zone)[0])
        if self.reference:
            step = (absmax - dead_zone / 2) / (top - 0.5) + 1e-8
        else:
            # Widened in proportion, so that the widest dead zone leaves a step. Where all is zero any step will do.
            step = (absmax * (1 + torch.finfo(absmax.dtype).eps) - dead_zone / 2) / (top - 0.5)
            step = torch.where(step == 0, 1, step)
        return Grid(absmax, bits, top, dead_zone, step, (dead_zone - step) / 2)


@dataclass(frozen=True)
class Grid:
    """The levels of one tensor: 0 and ``±(step * j + shift)`` for j = 1 to ``top``.

    Attributes
    ----------
    absmax
        The top level, of shape (rows, 1) as dead zone, step and shift.
    bits, top
        Number of bits b, and ``2**(b - 1) - 1``.
    dead_zone, step, shift
        Width of the zero bin, width of the others, and half their difference.
    """

    absmax: torch.Tensor
    bits: Scalar
    top: Scalar
    dead_zone: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor

    def positions(self, rows: torch.Tensor) -> torch.Tensor:
        """Return where the magnitudes lie among the levels: 0 up to the shift, else in steps beyond it."""
        return rows.abs().sub_(self.shift).clamp_min_(0).div_(self.step)

    def symbols(self, rows: torch.Tensor) -> torch.Tensor:
        """Return signed integers as floats; exact zeros get symbol 0."""
        return self.positions(rows).round_().clamp_max_(self.top).mul_(rows.sign())

    def values(self, symbols: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what symbols stand for."""
        return _dequantise(symbols, self.step, self.shift, dtype)


@dataclass(frozen=True)
class IntegerTensor:
    """A quantised tensor as integers.

    Attributes
    ----------
    bits
        Bits a symbol.
    dead_zone, step, shift
        Width of the zero bin, width of the others, and half their difference: of shape (), or (rows,) where every row
        of the first axis has its own, in the dtype of the arithmetic (float32 or float64).
    symbols
        int8 up to 8 bits, else int16; between ``-(2**(bits - 1) - 1)`` and ``2**(bits - 1) - 1``.
    dtype
        Of the weights.
    """

    bits: int
    dead_zone: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor
    symbols: torch.Tensor
    dtype: torch.dtype

    def values(self) -> torch.Tensor:
        """Return ``step * symbols + shift * sign(symbols)``: bit for bit the weights that the network computes with."""
        rows = self.symbols.to(self.step.dtype).reshape(self.step.numel(), -1)
        return _dequantise(rows, self.step.reshape(-1, 1), self.shift.reshape(-1, 1), self.dtype).reshape(
            self.symbols.shape
        )


def _dequantise(symbols: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = (symbols * step).add_(symbols.sign().mul_(shift)).to(dtype)
    # Adding zero turns -0.0 into 0.0, which would otherwise be one value more to store.
    return values.add_(0.0)


class DeadZoneQuantiser(HoldingQuantiser):
    """The parametrisation of one tensor, with logits (float32) of the dead zone and, where they are learned, bits."""

    def __init__(self, scheme: Scheme, learnable_bits: bool, initial_logit: float, device: torch.device) -> None:
        super().__init__()
        self.scheme = scheme
        self.logit_dead_zone = nn.Parameter(torch.tensor(initial_logit, dtype=torch.float32, device=device))
        self.logit_bits = nn.Parameter(self.logit_dead_zone.detach().clone()) if learnable_bits else None

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the quantised weights; gradients reach the weights and the logits."""
        quantised: torch.Tensor = _Quantise.apply(  # type: ignore[no-untyped-call]
            weights, self.logit_dead_zone, self.logit_bits, self.scheme, self.held
        )
        return quantised

    @torch.no_grad()
    def hold(self, weights: torch.Tensor) -> None:
        """Keep the top level that these weights have; the logits still move the levels below it."""
        self.held = None
        self.held = self.grid(weights).absmax.clone()

    @torch.no_grad()
    def coordinates(self, weights: torch.Tensor) -> torch.Tensor:
        """Return symbols with what lies between: half a symbol at the edge of the dead zone, linear on both sides."""
        grid, rows = self.grid(weights), self.scheme.rows(weights)
        size = rows.abs()
        inside = size / grid.dead_zone
        beyond = (size - grid.shift) / grid.step
        found = torch.where(size < grid.dead_zone / 2, inside, beyond)
        return (found * rows.sign()).reshape(weights.shape)

    @torch.no_grad()
    def weights_at(self, coordinates: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the weights at coordinates; at an integer, what the quantiser makes of that symbol."""
        grid = self.grid(like)
        rows = coordinates.to(grid.step).reshape(len(grid.step), -1)
        size = rows.abs()
        found = torch.where(size < 0.5, size * grid.dead_zone, size * grid.step + grid.shift)
        return (found * rows.sign()).reshape(coordinates.shape).to(like.dtype).add_(0.0)

    @torch.no_grad()
    def grid(self, weights: torch.Tensor) -> Grid:
        """Return the levels that these weights are quantised to."""
        scheme = self.scheme
        if not _compiled(scheme, weights):
            absmax = scheme.absmax(scheme.rows(weights)) if self.held is None else self.held
            return scheme.grid(absmax, self.logit_dead_zone, self.logit_bits)
        values = _array(scheme, weights)
        columns = np.empty((len(values), 4), values.dtype)
        openness, bits, _ = _numbers(scheme, self.logit_dead_zone, self.logit_bits)
        top = 2 ** (bits - 1) - 1
        held = _held(self.held, values)
        dead_zone_kernels.levels(_words(values), values[:0], held, scheme.quantile, openness, top, columns)
        absmax, dead_zone, step, shift = torch.from_numpy(columns)[..., None].unbind(1)
        return Grid(absmax, bits, top, dead_zone, step, shift)

    @property
    def bits(self) -> int:
        """Bits a symbol."""
        scheme = self.scheme
        if self.logit_bits is None or _compiled(scheme, self.logit_bits):
            return round(_numbers(scheme, self.logit_dead_zone, self.logit_bits)[1])
        opened = scheme.openness(self.logit_bits.detach())[0]
        return int(torch.round(MIN_BITS + (scheme.max_bits - MIN_BITS) * opened))

    @property
    def slope_of_bits(self) -> float:
        """How many bits a unit of their logit is worth, before rounding; 0 where they aren't learned."""
        if self.logit_bits is None:
            return 0.0
        return (self.scheme.max_bits - MIN_BITS) * float(self.scheme.openness(self.logit_bits.detach())[1])

    @torch.no_grad()
    def zeros(self, weights: torch.Tensor, offset: float = 0.0) -> int:
        """Return how many weights would be quantised to zero if the dead zone's logit were higher by an offset."""
        rows = self.scheme.rows(weights)
        absmax = self.grid(weights).absmax
        grid = self.scheme.grid(absmax, self.logit_dead_zone + offset, self.logit_bits)
        return rows.numel() - int(torch.count_nonzero(grid.symbols(rows)))

    @torch.no_grad()
    def integers(self, weights: torch.Tensor) -> IntegerTensor:
        """Return the integer form of the quantised weights."""
        grid = self.grid(weights)
        symbols = grid.symbols(self.scheme.rows(weights)).reshape(weights.shape)
        shape = (-1,) if self.scheme.per_channel and weights.ndim else ()
        return IntegerTensor(
            bits=int(grid.bits),
            dead_zone=grid.dead_zone.reshape(shape),
            step=grid.step.reshape(shape),
            shift=grid.shift.reshape(shape),
            symbols=symbols.to(torch.int8 if grid.bits <= 8 else torch.int16),
            dtype=weights.dtype,
        )

    def extra_repr(self) -> str:
        """Return the scheme for the module's repr."""
        return str(self.scheme)


def _compiled(scheme: Scheme, weights: torch.Tensor) -> bool:
    """Return whether the compiled loops serve: they are for the CPU, and the published forms have their own order."""
    return not scheme.reference and compiled_loops_serve(weights)


def _numbers(
    scheme: Scheme, logit_dead_zone: torch.Tensor, logit_bits: torch.Tensor | None
) -> tuple[float, float, tuple[float, float]]:
    """Return openness, bits, and the derivatives of openness and bits in their logits."""
    opened, slope = _opened(logit_dead_zone.item())
    if logit_bits is None:
        return opened, float(scheme.bits), (slope, 0.0)
    range_of_bits = scheme.max_bits - MIN_BITS
    share, steepness = _opened(logit_bits.item())
    return opened, float(round(MIN_BITS + range_of_bits * share)), (slope, range_of_bits * steepness)


def _opened(logit: float) -> tuple[float, float]:
    opened = 0.5 * (1 + math.tanh(logit - _MIDDLE))
    return opened, 2 * opened * (1 - opened)


def _array(scheme: Scheme, tensor: torch.Tensor) -> NDArray[np.floating[Any]]:
    """Return `Scheme.rows` as an array; between layers the caches hold other things, and every operation counts."""
    array: NDArray[np.floating[Any]] = tensor.detach().to(arithmetic_dtype(tensor.dtype)).contiguous().numpy()
    return array.reshape(len(array) if scheme.per_channel and array.ndim else 1, -1)


def _held(held: torch.Tensor | None, values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return held top levels as an array of shape (rows, 1), or an empty one."""
    return np.empty((0, 1), values.dtype) if held is None else held.numpy()


def _words(values: NDArray[np.floating[Any]]) -> NDArray[np.unsignedinteger[Any]]:
    return values.view(np.uint32 if values.itemsize == 4 else np.uint64)


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        logit_dead_zone: torch.Tensor,
        logit_bits: torch.Tensor | None,
        scheme: Scheme,
        held: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.scheme = scheme
        if not _compiled(scheme, weights):
            rows = scheme.rows(weights)
            grid = scheme.grid(scheme.absmax(rows) if held is None else held, logit_dead_zone, logit_bits)
            ctx.grid = grid
            ctx.save_for_backward(weights, logit_dead_zone, logit_bits)
            return grid.values(grid.symbols(rows), weights.dtype).reshape(weights.shape)
        openness, bits, ctx.derivatives = _numbers(scheme, logit_dead_zone, logit_bits)
        values = _array(scheme, weights)
        quantised, columns = np.empty_like(values), np.empty((len(values), 4), values.dtype)
        dead_zone_kernels.quantise_anew(
            _words(values),
            values,
            _held(held, values),
            scheme.quantile,
            openness,
            2 ** (bits - 1) - 1,
            columns,
            quantised,
        )
        ctx.save_for_backward(weights)
        ctx.bits, ctx.columns, ctx.logit_dtype = bits, columns, logit_dead_zone.dtype
        return torch.from_numpy(quantised).reshape(weights.shape).to(weights.dtype)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None, None]:
        if not any(ctx.needs_input_grad[1:3]):
            weights, scheme = ctx.saved_tensors[0], ctx.scheme
            return gradient * (weights != 0) if scheme.reference else gradient, None, None, None, None
        if hasattr(ctx, "columns"):
            rows, outward = (_array(ctx.scheme, tensor) for tensor in (ctx.saved_tensors[0], gradient))
            to_openness, to_top = dead_zone_kernels.slopes(rows, outward, ctx.columns, 2 ** (ctx.bits - 1) - 1)
            dead_zone, bits = ctx.derivatives
            to_bits = to_top * math.log(2) * 2 ** (ctx.bits - 1) * bits if ctx.needs_input_grad[2] else None
            of_dead_zone, of_bits = (_logit(value, ctx.logit_dtype) for value in (to_openness * dead_zone, to_bits))
            return gradient, of_dead_zone, of_bits, None, None
        return *_elementary_backward(ctx, gradient), None, None


def _logit(value: float | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if value is None else torch.from_numpy(np.array(value)).to(dtype)


def _elementary_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients in weights and logits; the formulas are told in `dead_zone_kernels.slopes`."""
    weights, logit_dead_zone, logit_bits = ctx.saved_tensors
    scheme: Scheme = ctx.scheme
    grid: Grid = ctx.grid
    rows = scheme.rows(weights)
    positions = grid.positions(rows)
    symbols = positions.round().clamp_max_(grid.top)
    if not scheme.reference:
        positions.clamp_max_(grid.top)
    outward = gradient.to(rows.dtype).reshape(rows.shape) * rows.sign()
    dead = (outward * (symbols == 0)).sum(1, keepdim=True) / -2
    rounding = outward.mul_(symbols.sub_(positions)).sum(1, keepdim=True)
    share = 1 / (2 * grid.top - 1)
    slope = -2 * grid.absmax * scheme.openness(logit_dead_zone)[1]
    to_dead_zone = (((1 + share) * dead - share * rounding) * slope).sum().to(logit_dead_zone.dtype)
    to_weights = gradient * (weights != 0) if scheme.reference else gradient
    if logit_bits is None:
        return to_weights, to_dead_zone, None
    to_top = (-(grid.absmax - grid.dead_zone / 2) / (grid.top - 0.5) ** 2 * (rounding - dead)).sum()
    slope = math.log(2) * 2 ** (grid.bits - 1) * (scheme.max_bits - MIN_BITS) * scheme.openness(logit_bits)[1]
    return to_weights, to_dead_zone, (to_top * slope).to(logit_bits.dtype)


def quantile_and_maximum(rows: torch.Tensor, quantile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the quantile (linear interpolation between ranks) and the maximum of the magnitudes of every row.

    Both are of shape (rows, 1), for rows of float32 or float64, of one entry at least. One selection finds both
    neighbouring ranks; the values, and so the result, don't depend on the algorithm.
    """
    position = quantile * (rows.shape[1] - 1)
    lower = math.floor(position)
    if compiled_loops_serve(rows):
        values = rows.contiguous().numpy()
        found = np.empty((len(values), 3), _words(values).dtype)
        dead_zone_kernels.order_statistics(_words(values), lower, found)
        low, high, largest = torch.from_numpy(found.view(values.dtype))[..., None].unbind(1)
    else:
        tail = torch.topk(rows.abs(), rows.shape[1] - lower).values
        low, high, largest = tail[:, -1:], tail[:, max(tail.shape[1] - 2, 0), None], tail[:, :1]
    return low + (position - lower) * (high - low), largest
