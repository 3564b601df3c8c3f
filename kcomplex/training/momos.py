"""MoMos: training towards a mosaic, a network whose blocks of weights repeat few motifs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.motifs import Blocks, blocks_of, draw_motifs, mosaic_bits, motif_count, update_motifs
from kcomplex.nearest import Indices, Rows, nearest
from kcomplex.training.mode import WEIGHT_LAYERS, WEIGHT_NAMES, Mode, chosen_parameters
from kcomplex.training.projection import Projection, array_of, replaced

DEFAULT_CAPACITY = 0.01


@dataclass
class _Mosaic:
    """The mosaic of some parameters: their names, and what the last projection left."""

    names: tuple[str, ...]
    motifs: Rows | None = None
    assignment: Indices | None = None
    report: dict[str, float] = field(default_factory=dict)


@dataclass
class _State:
    """What a mode keeps between projections."""

    mosaics: list[_Mosaic]
    generator: torch.Tensor


@dataclass(frozen=True)
class MoMos(Mode):
    """Replaces every block of weights by its nearest motif, again and again during training.

    Parameters
    ----------
    block_size
        Weights a block.
    capacity
        Motifs as a share of the blocks; see `kcomplex.motifs.motif_count`.
    motifs
        Number of motifs instead, the zero motif included.
    every
        Project after every ``epoch`` or after every optimiser ``step``.
    scope
        One bank of motifs for the whole network (``global``) or one for each ``tensor``.
    force_zero
        One motif is zero. It is free to store, and what it replaces is pruned.
    reuse
        Leave weights as they are while they are on the mosaic of the last projection, so that projecting again
        without training changes nothing. What has left it gets motifs newly drawn from the current blocks. Otherwise
        every projection draws, and repeated ones shrink the bank as blocks merge.
    lloyd_steps
        Steps of Lloyd's algorithm after drawing: motifs move to the mean of their blocks, and unused ones to the
        blocks that fit worst. 0 leaves them where they were drawn.
    include, exclude
        Shell-style globs on parameter names. By default the weights of linear, convolution, embedding and
        attention layers are projected, not biases and norms.
    seed
        Of the drawing of motifs.
    reference
        As published: all trainable parameters, at each projection a bank of newly drawn blocks (duplicates and
        padded tails among them), padding counts in the distance, capacity truncates. `reuse` and `lloyd_steps` have
        no meaning then.

    Raises
    ------
    SpecError
        A value is out of range, or the zero motif would be the only one.

    Notes
    -----
    From MoMos (arXiv:2602.14896). Gradients reach the projected weights as they are: there is no latent copy. Drawing
    matters where weights move less between projections than motifs are apart: on an MLP for digits (AdamW, learning
    rate 1e-3, capacity 0.01, 15 epochs) accuracy was about 0.74 with new motifs and 0.45 with those kept and moved by
    Lloyd's algorithm; 0 to 4 steps of it after drawing made no clear difference. The latent weights of a quantised
    layer are chosen by ``include=("*.original",)``.
    """

    block_size: int = 4
    capacity: float | None = DEFAULT_CAPACITY
    motifs: int | None = None
    every: Literal["epoch", "step"] = "epoch"
    scope: Literal["global", "tensor"] = "global"
    force_zero: bool = True
    reuse: bool = True
    lloyd_steps: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    reference: bool = False
    name: ClassVar[str] = "momos"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise SpecError(f"momos: block_size must be at least 1, not {self.block_size}")
        if self.motifs is None and self.capacity is None:
            raise SpecError("momos: give either capacity or motifs")
        if self.motifs is not None and self.capacity not in (None, DEFAULT_CAPACITY):
            raise SpecError(f"momos: capacity={self.capacity} and motifs={self.motifs} exclude each other: give one")
        if self.capacity is not None and not 0 < self.capacity <= 1:
            raise SpecError(f"momos: capacity must be above 0 and at most 1, not {self.capacity}")
        if self.motifs is not None and self.motifs < 1:
            raise SpecError(f"momos: motifs must be at least 1, not {self.motifs}")
        if self.every not in ("epoch", "step"):
            raise SpecError(f"momos: every must be 'epoch' or 'step', not {self.every!r}")
        if self.scope not in ("global", "tensor"):
            raise SpecError(f"momos: scope must be 'global' or 'tensor', not {self.scope!r}")
        if self.lloyd_steps < 0:
            raise SpecError(f"momos: lloyd_steps must not be negative, but is {self.lloyd_steps}")
        if self.motifs is not None:
            self._refuse_erasure(self.motifs, "")

    def prepare(self, model: nn.Module) -> None:
        """Attach to a model, which isn't changed before the first projection.

        Raises
        ------
        SpecError
            See `Mode.prepare`; or a parameter is complex, or there would be no motif but zero.
        """
        everything = self.reference and not self.include
        types, parameter_names = (None, None) if everything else (WEIGHT_LAYERS, WEIGHT_NAMES)
        chosen = chosen_parameters(model, types, self.include, self.exclude, parameter_names)
        names = [full for _, _, full in chosen]
        mosaics = [_Mosaic(group) for group in ([tuple(names)] if self.scope == "global" else [(n,) for n in names])]
        for mosaic in mosaics:
            self._refuse_erasure(self._count(model, mosaic, names), f" for {', '.join(mosaic.names[:3])}")
        self.attach_to(model)
        generator = torch.Generator().manual_seed(self.seed).get_state()
        object.__setattr__(self, "_state", _State(mosaics, generator))

    def after_step(self) -> None:
        """Project, where `every` is ``step``."""
        if self.every == "step":
            self._project(self.model, self._kept, settled=self._settles)

    def after_epoch(self) -> None:
        """Project, where `every` is ``epoch``."""
        if self.every == "epoch":
            self._project(self.model, self._kept, settled=self._settles)

    def convert(self, model: nn.Module) -> nn.Module:
        """Return a plain copy whose chosen weights are a mosaic; they are projected where they have left it."""
        copied = copy.deepcopy(model)
        self._project(copied, copy.deepcopy(self._kept), settled=True)
        return super().convert(copied)

    def state_dict(self) -> dict[str, Any]:
        """Return motifs, assignment and figures of every mosaic, and the state of the random generator."""
        return {
            "generator": self._kept.generator.clone(),
            "mosaics": [
                {
                    "motifs": torch.from_numpy(mosaic.motifs.copy()),
                    "assignment": torch.from_numpy(mosaic.assignment.copy()),
                    "report": dict(mosaic.report),
                }
                if mosaic.motifs is not None and mosaic.assignment is not None
                else None
                for mosaic in self._kept.mosaics
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises
        ------
        SpecError
            The state belongs to another configuration or model.
        """
        kept = self._kept
        blocks = [sum(self._blocks(self.model, name) for name in mosaic.names) for mosaic in kept.mosaics]
        saved = state["mosaics"]
        fits = len(saved) == len(blocks) and all(
            item is None or (len(item["assignment"]) == count and item["motifs"].shape[1] == self.block_size)
            for item, count in zip(saved, blocks, strict=True)
        )
        if not fits:
            raise SpecError(f"the state isn't one of {self.spec!r} on this model: its mosaics have other blocks")
        kept.generator = state["generator"].clone()
        for mosaic, item in zip(kept.mosaics, saved, strict=True):
            mosaic.motifs = None if item is None else item["motifs"].numpy().copy()
            mosaic.assignment = None if item is None else item["assignment"].numpy().copy()
            mosaic.report = {} if item is None else dict(item["report"])

    def report(self) -> dict[str, float]:
        """Return figures of the last projection, summed over mosaics; nothing before the first.

        Returns
        -------
        dict
            ``motifs`` kept and ``motifs_used``; ``distortion``, the sum of squared changes; ``changed`` weights;
            ``nominal_bits``, the length `kcomplex.motifs.mosaic_bits` of the used motifs; and
            ``relative_algorithmic_compression``, raw bits of the projected weights over it.
        """
        reports = [mosaic.report for mosaic in self._kept.mosaics if mosaic.report]
        if not reports:
            return {}
        total = {key: sum(report[key] for report in reports) for key in reports[0]}
        raw = total.pop("raw_bits")
        return {**total, "relative_algorithmic_compression": raw / total["nominal_bits"]}

    @property
    def _kept(self) -> _State:
        state = self.__dict__.get("_state")
        if state is None:
            raise SpecError("the mode 'momos' isn't attached: call prepare(model) first")
        assert isinstance(state, _State)
        return state

    @property
    def _settles(self) -> bool:
        """Whether weights that are on the mosaic stay on it."""
        return self.reuse and not self.reference

    def _project(self, model: nn.Module, state: _State, *, settled: bool) -> None:
        names = [name for mosaic in state.mosaics for name in mosaic.names]
        for mosaic in state.mosaics:
            parameters = [model.get_parameter(name) for name in mosaic.names]
            blocks = blocks_of([array_of(parameter) for parameter in parameters], self.block_size, mosaic.names)
            if self.reference:
                blocks = replace(blocks, real=np.full_like(blocks.real, self.block_size))
            projection = None
            if settled and mosaic.motifs is not None and mosaic.assignment is not None:
                projection = replaced(parameters, blocks, mosaic.motifs, mosaic.assignment)
            if projection is None or projection.changed:
                # Motifs kept through training would pull every block that moved little back to where it was.
                motifs = self._drawn(blocks, self._count(model, mosaic, names), state)
                mosaic.motifs, mosaic.assignment = self._fitted(blocks, motifs, parameters)
                projection = replaced(parameters, blocks, mosaic.motifs, mosaic.assignment)
            with torch.no_grad():
                for parameter, tensor in zip(parameters, projection.tensors, strict=True):
                    parameter.copy_(tensor)
            mosaic.report = _figures(projection, self.block_size, parameters)

    def _drawn(self, blocks: Blocks, count: int, state: _State) -> Rows:
        generator = torch.Generator()
        generator.set_state(state.generator)
        permutation = torch.randperm(len(blocks.rows), generator=generator).numpy()
        state.generator = generator.get_state()
        return draw_motifs(blocks, count, permutation, force_zero=self.force_zero, reference=self.reference)

    def _fitted(self, blocks: Blocks, motifs: Rows, parameters: Sequence[torch.Tensor]) -> tuple[Rows, Indices]:
        assignment = nearest(blocks.rows, motifs, blocks.real)
        for _ in range(0 if self.reference else self.lloyd_steps):
            updated = update_motifs(blocks, motifs, assignment, force_zero=self.force_zero)
            motifs = torch.from_numpy(updated).to(_widest(parameters)).to(torch.float64).numpy()
            assignment = nearest(blocks.rows, motifs, blocks.real)
        return motifs, assignment

    def _count(self, model: nn.Module, mosaic: _Mosaic, names: Sequence[str]) -> int:
        """Return the number of motifs of one of the mosaics that have all these names."""
        blocks = sum(self._blocks(model, name) for name in mosaic.names)
        if self.motifs is not None:
            return self.motifs
        assert self.capacity is not None
        if self.reference:
            # The published code counts all blocks even where each tensor has its own motifs.
            total = sum(self._blocks(model, name) for name in names)
            return min(motif_count(self.capacity, total, reference=True), blocks)
        return motif_count(self.capacity, blocks)

    def _blocks(self, model: nn.Module, name: str) -> int:
        return -(-model.get_parameter(name).numel() // self.block_size)

    def _refuse_erasure(self, count: int, where: str) -> None:
        if count == 1 and self.force_zero and not self.reference:
            raise SpecError(
                f"momos: with one motif{where}, which is zero, every weight would become zero: "
                "raise capacity or motifs, or set force_zero=false"
            )


def _figures(projection: Projection, block_size: int, parameters: Sequence[torch.Tensor]) -> dict[str, float]:
    used = int(np.count_nonzero(projection.counts))
    word_bits = 8 * _widest(parameters).itemsize
    return {
        "motifs": float(len(projection.counts)),
        "motifs_used": float(used),
        "distortion": projection.distortion,
        "changed": float(projection.changed),
        "nominal_bits": float(mosaic_bits(used, block_size, word_bits, len(projection.assignment))),
        "raw_bits": float(word_bits * sum(parameter.numel() for parameter in parameters)),
    }


def _widest(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
