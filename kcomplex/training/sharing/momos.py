"""MoMos: training towards a mosaic, a network whose blocks of weights repeat few motifs."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import refuse_others, refuse_outside
from kcomplex.motifs.blocks import Blocks, motif_count, update_motifs
from kcomplex.motifs.nearest import Indices, Rows, distinct, nearest
from kcomplex.motifs.selection import SELECTIONS, Selection, select_motifs
from kcomplex.training.protocol.mode import (
    WEIGHT_LAYERS,
    WEIGHT_NAMES,
    Evaluate,
    Mode,
    ParameterGroups,
    chosen_parameters,
)
from kcomplex.training.quantising.codeq import CoDeQ
from kcomplex.training.quantising.uniform_qat import UniformQAT
from kcomplex.training.sharing.mosaics import Group, Mosaic, blocks_in

DEFAULT_CAPACITY = 0.01
_EVERY = re.compile(r"(?:(\d+)\s+)?(step|epoch)s?")


@dataclass
class _State:
    """What a mode keeps between projections."""

    mosaics: list[Mosaic]
    generator: torch.Tensor
    quantising: Mode | None = None
    steps: int = 0
    epochs: int = 0
    fixed: bool = False


@dataclass(frozen=True)
class MoMos(Mode):
    """Replaces every block of weights by its nearest motif, again and again during training.

    Parameters
    ----------
    block_size
        Weights a block.
    capacity
        Motifs as a share of the blocks; see `kcomplex.motifs.blocks.motif_count`.
    motifs
        Number of motifs instead, the zero motif included.
    every
        When to project: ``epoch``, ``step`` (of the optimiser), or a number of them, such as ``20 steps``.
    scope
        One bank of motifs for the whole network (``global``) or one for each ``tensor``.
    force_zero
        One motif is zero. It is free to store, and what it replaces is pruned.
    selection
        How motifs are selected from the blocks; see `kcomplex.motifs.selection.select_motifs`.
    keep
        Share of the motifs of the last projection that stay in the bank, the most used ones; the others are selected
        anew from the blocks.
    reuse
        Leave weights as they are while they are on the mosaic of the last projection, so that projecting again
        without training changes nothing. What has left it gets motifs newly drawn from the current blocks. Otherwise
        every projection draws, and repeated ones shrink the bank as blocks merge.
    lloyd_steps
        Steps of Lloyd's algorithm after drawing: motifs move to the mean of their blocks, and unused ones to the
        blocks that fit worst. 0 leaves them where they were drawn.
    quantiser
        ``uniform_qat`` or ``codeq``: train through this quantiser at fixed precision, its scales held from one
        projection to the next. Motifs are then made of its symbols, which the whole network shares while every tensor
        has a scale of its own, so that a motif costs s x `bits` bits; see `kcomplex.training.sharing.mosaic_file`.
    bits
        Bits of the quantiser's symbols, 2 to 16.
    target_zeros
        Of CoDeQ; see there.
    include, exclude
        Patterns on names of parameters or modules, or on types; see `protocol.mode.chosen_parameters`. By
        default the weights of linear, convolution, embedding and attention layers are projected, not biases and norms.
    seed
        Of the drawing of motifs.
    reference
        As published: all trainable parameters, at each projection a bank of newly drawn blocks (duplicates and
        padded tails among them), padding counts in the distance, capacity truncates, latent weights are projected
        whatever quantises them. `reuse`, `selection`, `keep` and `lloyd_steps` have no meaning then.

    Notes
    -----
    From MoMos (arXiv:2602.14896). Gradients reach the projected weights as they are: there is no latent copy.

    `begin_fine_tuning` fixes the mosaic: from then on every step ends with each motif at the mean of its blocks, which
    trains the motifs and nothing else, with any optimiser: worth it where there are few motifs. docs/training.md
    has accuracies of the published scheme beside the defaults.

    What is drawn depends on the seed and the weights alone: ranks that hold the same weights get the same motifs. A
    quantiser that was attached to the model before serves like one of this mode's own.
    """

    block_size: int = 4
    capacity: float | None = DEFAULT_CAPACITY
    motifs: int | None = None
    every: str = "epoch"
    scope: Literal["global", "tensor"] = "global"
    force_zero: bool = True
    selection: Selection = "spread"
    keep: float = 0.0
    reuse: bool = True
    lloyd_steps: int = 1
    quantiser: Literal["none", "uniform_qat", "codeq"] = "none"
    bits: int = 8
    target_zeros: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    reference: bool = False
    name: ClassVar[str] = "momos"

    def __post_init__(self) -> None:
        refuse_outside(self, block_size="[1, inf)", capacity="(0, 1]", motifs="[1, inf)", lloyd_steps="[0, inf)")
        refuse_outside(self, keep="[0, 1]", bits="[2, 16]")
        refuse_others(
            self, selection=SELECTIONS, quantiser=("none", "uniform_qat", "codeq"), scope=("global", "tensor")
        )
        if self.motifs is None and self.capacity is None:
            raise SpecError("momos: give either capacity or motifs")
        if self.motifs is not None and self.capacity not in (None, DEFAULT_CAPACITY):
            raise SpecError(f"momos: capacity={self.capacity} and motifs={self.motifs} exclude each other: give one")
        if not _EVERY.fullmatch(self.every) or self._period[0] < 1:
            raise SpecError(f"momos: every must be 'epoch', 'step', or such as '20 steps', not {self.every!r}")
        if self.target_zeros is not None and self.quantiser != "codeq":
            raise SpecError("momos: target_zeros is CoDeQ's: it needs quantiser=codeq")
        if self.motifs is not None:
            self._refuse_erasure(self.motifs, "")

    def attach(self, model: nn.Module) -> _State:
        """Return the mosaics of a model, which isn't changed before the first projection.

        Raises
        ------
        SpecError
            A parameter is complex, or there would be no motif but zero.
        """
        everything = self.reference and not self.include
        types, parameter_names = (None, None) if everything else (WEIGHT_LAYERS, WEIGHT_NAMES)

        def chosen() -> list[str]:
            places = chosen_parameters(model, types, self.include, self.exclude, parameter_names, parametrised=True)
            return [full for _, _, full in places]

        names = chosen()
        for group in self._grouped(names):
            Group(model, group, self.block_size, latents=self.reference)
            self._refuse_erasure(self._count(model, group, names), f" for {', '.join(group[:3])}")
        quantising = self._quantising()
        if quantising is not None:
            quantising.prepare(model)
            # Published projections take parameters in the model's order, which parametrisations change.
            names = chosen()
        generator = torch.Generator().manual_seed(self.seed).get_state()
        mosaics = [Mosaic(tuple(group)) for group in self._grouped(names)]
        return _State(mosaics, generator, quantising)

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> ParameterGroups:
        """Return the groups of the quantiser, or all parameters in one."""
        quantising: Mode | None = self.state.quantising
        if quantising is not None:
            return quantising.parameter_groups(lr, weight_decay)
        return super().parameter_groups(lr, weight_decay)

    def after_step(self) -> None:
        """Project, where it is time; while fine-tuning, make equal what shares a motif."""
        state: _State = self.state
        if state.quantising is not None:
            state.quantising.after_step()
        state.steps += 1
        period, unit = self._period
        if state.fixed:
            self._tie(self.model, state)
        elif unit == "step" and state.steps % period == 0:
            self._project(self.model, state, settled=self._settles)

    def after_epoch(self) -> None:
        """Project, where it is time."""
        state: _State = self.state
        state.epochs += 1
        period, unit = self._period
        if unit == "epoch" and not state.fixed and state.epochs % period == 0:
            self._project(self.model, state, settled=self._settles)

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """Fix the mosaic, after a last projection where weights have left it: from here on only motifs are trained."""
        state: _State = self.state
        if state.quantising is not None:
            state.quantising.begin_fine_tuning(evaluate, error)
        self._project(self.model, state, settled=True)
        state.fixed = True

    def convert(self, model: nn.Module) -> nn.Module:
        """Return a plain copy whose chosen weights are a mosaic; they are projected where they have left it."""
        return super().convert(self._converted(model)[0])

    def mosaics(self) -> list[tuple[Group, Mosaic]]:
        """Return the mosaics of what `convert` makes of the model; for `kcomplex.training.sharing.mosaic_file`."""
        copied, state = self._converted(self.model)
        return [
            (Group(copied, mosaic.names, self.block_size, latents=self.reference), mosaic) for mosaic in state.mosaics
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return motifs, assignment and figures of every mosaic, the random generator, counters and held scales."""
        state: _State = self.state
        held = {
            member.name: member.quantiser.held.clone()
            for group in self._groups(self.model, state)
            for member in group.members
            if member.quantiser is not None and member.quantiser.held is not None
        }
        return {
            "generator": state.generator.clone(),
            "steps": state.steps,
            "epochs": state.epochs,
            "fixed": state.fixed,
            "held": held,
            "quantising": None if state.quantising is None else state.quantising.state_dict(),
            "mosaics": [
                {
                    "motifs": torch.from_numpy(mosaic.motifs.copy()),
                    "assignment": torch.from_numpy(mosaic.assignment.copy()),
                    "report": dict(mosaic.report),
                }
                if mosaic.motifs is not None and mosaic.assignment is not None
                else None
                for mosaic in state.mosaics
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; see `Mode.load_state_dict`."""
        kept: _State = self.state
        blocks = [blocks_in(self.model, mosaic.names, self.block_size) for mosaic in kept.mosaics]
        saved = state["mosaics"]
        fits = len(saved) == len(blocks) and all(
            item is None or (len(item["assignment"]) == count and item["motifs"].shape[1] == self.block_size)
            for item, count in zip(saved, blocks, strict=True)
        )
        if not fits:
            raise SpecError(f"the state isn't one of {self.spec!r} on this model: its mosaics have other blocks")
        kept.generator = state["generator"].cpu().clone()
        kept.steps, kept.epochs, kept.fixed = state["steps"], state["epochs"], state["fixed"]
        if kept.quantising is not None:
            kept.quantising.load_state_dict(state["quantising"])
        for group in self._groups(self.model, kept):
            for member in group.members:
                if member.quantiser is not None:
                    held = state["held"].get(member.name)
                    member.quantiser.held = None if held is None else held.to(member.parameter.device, copy=True)
        for mosaic, item in zip(kept.mosaics, saved, strict=True):
            mosaic.motifs = None if item is None else item["motifs"].cpu().numpy().copy()
            mosaic.assignment = None if item is None else item["assignment"].cpu().numpy().copy()
            mosaic.report = {} if item is None else dict(item["report"])

    def report(self) -> dict[str, float]:
        """Return figures of the last projection, summed over mosaics; nothing before the first.

        Returns
        -------
        dict
            ``motifs`` kept and ``motifs_used``; ``distortion``, the sum of squared changes; ``changed`` weights;
            ``nominal_bits``, the length `kcomplex.motifs.blocks.mosaic_bits` of the used motifs; and
            ``relative_algorithmic_compression``, raw bits of the projected weights over it.
        """
        reports = [mosaic.report for mosaic in self.state.mosaics if mosaic.report]
        if not reports:
            return {}
        total = {key: sum(report[key] for report in reports) for key in reports[0]}
        raw = total.pop("raw_bits")
        quantising = self.state.quantising
        return {
            **({} if quantising is None else quantising.report()),
            **total,
            "relative_algorithmic_compression": raw / total["nominal_bits"],
        }

    @property
    def _settles(self) -> bool:
        """Whether weights that are on the mosaic stay on it."""
        return self.reuse and not self.reference

    @property
    def _period(self) -> tuple[int, str]:
        """Number and unit of what lies between projections."""
        match = _EVERY.fullmatch(self.every)
        assert match is not None
        return int(match[1] or 1), match[2]

    def _quantising(self) -> Mode | None:
        if self.quantiser == "uniform_qat":
            return UniformQAT(bits=self.bits, include=self.include, exclude=self.exclude)
        if self.quantiser == "codeq":
            # Without a target there is no pressure: a mosaic has its own.
            decay = 1.0 if self.target_zeros is None else 0.0
            return CoDeQ(
                bits=self.bits,
                dead_zone_weight_decay=decay,
                target_zeros=self.target_zeros,
                include=self.include,
                exclude=self.exclude,
            )
        return None

    def _grouped(self, names: Sequence[str]) -> list[Sequence[str]]:
        return [names] if self.scope == "global" else [(name,) for name in names]

    def _groups(self, model: nn.Module, state: _State) -> Iterator[Group]:
        for mosaic in state.mosaics:
            yield Group(model, mosaic.names, self.block_size, latents=self.reference)

    def _converted(self, model: nn.Module) -> tuple[nn.Module, _State]:
        """Return a copy of a model on its mosaics, and their state."""
        copied, state = copy.deepcopy(model), copy.deepcopy(replace(self.state, quantising=None))
        if state.fixed:
            self._tie(copied, state, exact=True)
        else:
            self._project(copied, state, settled=True)
        return copied, state

    def _tie(self, model: nn.Module, state: _State, *, exact: bool = False) -> None:
        for mosaic, group in zip(state.mosaics, self._groups(model, state), strict=True):
            group.tie(mosaic, force_zero=self.force_zero, exact=exact)

    def _project(self, model: nn.Module, state: _State, *, settled: bool) -> None:
        names = [name for mosaic in state.mosaics for name in mosaic.names]
        for mosaic, group in zip(state.mosaics, self._groups(model, state), strict=True):
            before = [parameter.detach().clone() for parameter in group.parameters]
            projection = None
            if settled and mosaic.motifs is not None and mosaic.assignment is not None:
                projection = group.place(mosaic.motifs, mosaic.assignment)
            if projection is None or projection.changed:
                with torch.no_grad():
                    for parameter, values in zip(group.parameters, before, strict=True):
                        parameter.copy_(values)
                group.hold()
                blocks = group.blocks()
                if self.reference:
                    blocks = replace(blocks, real=np.full_like(blocks.real, self.block_size))
                # Motifs kept through training would pull every block that moved little back to where it was.
                motifs = self._bank(group, blocks, mosaic, self._count(model, mosaic.names, names), state)
                mosaic.motifs, mosaic.assignment = self._fitted(group, blocks, motifs)
                projection = group.place(mosaic.motifs, mosaic.assignment)
            mosaic.report = group.figures(projection)

    def _bank(self, group: Group, blocks: Blocks, mosaic: Mosaic, count: int, state: _State) -> Rows:
        """Return the motifs to begin with: the most used old ones, if some are to be kept, and others from blocks."""
        generator = torch.Generator()
        generator.set_state(state.generator)
        if self.reference:
            motifs = select_motifs(blocks, count, generator, "random", force_zero=self.force_zero)
        else:
            exact = replace(blocks, rows=group.exact(blocks.rows))
            kept = self._most_used(mosaic, count)
            motifs = select_motifs(exact, count, generator, self.selection, force_zero=self.force_zero, kept=kept)
        state.generator = generator.get_state()
        return motifs

    def _most_used(self, mosaic: Mosaic, count: int) -> Rows | None:
        """Return the motifs of the last projection that stay, the zero motif among them; None where none do."""
        if not self.keep or mosaic.motifs is None or mosaic.assignment is None:
            return None
        usage = np.bincount(mosaic.assignment, minlength=len(mosaic.motifs))
        usage[0] += len(mosaic.assignment) * self.force_zero
        kept = mosaic.motifs[np.sort(np.argsort(-usage, kind="stable")[: max(1, round(self.keep * count))])]
        return kept[distinct(kept)]

    def _fitted(self, group: Group, blocks: Blocks, motifs: Rows) -> tuple[Rows, Indices]:
        assignment = nearest(blocks.rows, motifs, blocks.real)
        for _ in range(0 if self.reference else self.lloyd_steps):
            updated = update_motifs(blocks, motifs, assignment, force_zero=self.force_zero)
            motifs = group.exact(updated)
            assignment = nearest(blocks.rows, motifs, blocks.real)
        return motifs, assignment

    def _count(self, model: nn.Module, group: Sequence[str], names: Sequence[str]) -> int:
        """Return the number of motifs of one of the mosaics that have all these names."""
        blocks = blocks_in(model, group, self.block_size)
        if self.motifs is not None:
            return self.motifs
        assert self.capacity is not None
        if self.reference:
            # The published code counts all blocks even where each tensor has its own motifs.
            total = blocks_in(model, names, self.block_size)
            return min(motif_count(self.capacity, total, reference=True), blocks)
        return motif_count(self.capacity, blocks)

    def _refuse_erasure(self, count: int, where: str) -> None:
        if count == 1 and self.force_zero and not self.reference:
            raise SpecError(
                f"momos: with one motif{where}, which is zero, every weight would become zero: "
                "raise capacity or motifs, or set force_zero=false"
            )
