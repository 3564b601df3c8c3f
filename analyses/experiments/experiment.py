"""Experiment: everything that decides a training run, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kcomplex.errors import SourceNotFoundError, SpecError
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.training.protocol.schedule import Schedule
from kcomplex.training.protocol.sequence import mode

from .networks.networks import network

DEFAULT_ESTIMATORS = ("raw", "zstd:level=19", "lzma", "palette|entropy")


@dataclass(frozen=True)
class Experiment:
    """A training run's exact configuration; the same experiment gives the same weights, bit for bit, on a CPU.

    Parameters
    ----------
    name
        Name of the run, and of its folder.
    data
        Data set; see `kcomplex.analyses.experiments.data.data.load`.
    network
        Specification of the network; see `kcomplex.analyses.experiments.networks.networks`.
    mode
        Specification of the training mode.
    epochs
        Passes over the training data.
    fine_tune_epochs
        Further passes after the mode has pruned what can go.
    batch_size
        Images, or windows of a text, a step.
    lr
        Learning rate at the start of training, and of fine-tuning where `fine_tune_lr_share` is 1.
    weight_decay
        Decoupled for ``adamw``.
    optimizer
        ``adamw``, or ``sgd`` with momentum 0.9.
    schedule
        Of the learning rate: ``cosine`` falls over each phase, ``constant`` stays.
    warm_up_epochs
        Over the first epochs the learning rate rises from zero.
    lr_floor
        Share of the learning rate that ``cosine`` falls to.
    fine_tune_lr_share
        Share of the learning rate that fine-tuning begins with.
    window
        Epochs that the stopping rule of `training.protocol.schedule` looks at, on the validation data; 0 trains all.
    min_epochs
        Epochs that it leaves alone before the mode prunes.
    augmentation
        ``shift`` moves training images by up to one place; ``crop_flip`` by up to four, and mirrors half of them; see
        `kcomplex.analyses.experiments.data.augmentation`. ``none`` leaves them.
    reestimate_batch_norm
        Estimate the statistics of batch normalisations anew, from the training data, whenever the mode has projected
        or pruned at the end of an epoch.
    seed
        Of initialisation, shuffling and whatever the mode draws.
    estimators
        Specifications of the estimators that measure the snapshots.
    every
        Epochs from one snapshot to the next; the last epoch of each phase always has one.
    threads
        Threads that PyTorch computes with. Sums depend on how they are split, so this is a part of the experiment and
        not of the machine. One leaves the other cores to the measuring beside the training.
    device
        PyTorch device to train on.

    Raises
    ------
    SpecError
        A value has the wrong type or is out of range.
    """

    name: str
    data: str = "digits"
    network: str = "mlp:hidden=128"
    mode: str = "baseline"
    epochs: int = 30
    fine_tune_epochs: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["cosine", "constant"] = "cosine"
    warm_up_epochs: int = 0
    lr_floor: float = 0.0
    fine_tune_lr_share: float = 1.0
    window: int = 0
    min_epochs: int = 0
    augmentation: Literal["none", "shift", "crop_flip"] = "none"
    reestimate_batch_norm: bool = False
    seed: int = 0
    estimators: tuple[str, ...] = DEFAULT_ESTIMATORS
    every: int = 1
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for field, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, field)
            # TOML and JSON have no tuples, and write whole floats as integers.
            if hint is float and type(value) is int:
                value = float(value)
            elif hint == tuple[str, ...] and isinstance(value, list):
                value = tuple(value)
            object.__setattr__(self, field, value)
            _check_type(field, value, hint)
        if not self.name or self.name != Path(self.name).name or self.name in (".", ".."):
            raise SpecError(f"name must be a plain folder name, not {self.name!r}")
        for field, least in (("batch_size", 1), ("every", 1), ("threads", 1)):
            if getattr(self, field) < least:
                raise SpecError(f"{field} must be {least} or more, not {getattr(self, field)}")
        self.phases()
        if not 0 <= self.seed < 1 << 63:
            raise SpecError(f"seed must be in [0, 2**63), not {self.seed}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise SpecError(f"lr must be positive and finite, not {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise SpecError(f"weight_decay must be finite and not negative, not {self.weight_decay}")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise SpecError(f"device {self.device!r} isn't known to PyTorch: {error}") from error
        if not self.estimators:
            raise SpecError("estimators must name at least one estimator, for example 'palette|entropy'")

    def phases(self) -> Schedule:
        """Return the phases of the training."""
        return Schedule(
            epochs=self.epochs,
            fine_tune_epochs=self.fine_tune_epochs,
            window=self.window,
            min_epochs=self.min_epochs,
            learning_rate=self.schedule,
            warm_up_epochs=self.warm_up_epochs,
            lr_floor=self.lr_floor,
            fine_tune_lr_share=self.fine_tune_lr_share,
        )

    def check(self) -> None:
        """Build the network's recipe, the mode and the estimators, so that a wrong one shows before anything trains.

        Raises
        ------
        SpecError, UnknownNameError, PluginError
            One of them can't be built, or the mode needs more epochs.
        """
        network(self.network)
        least = mode(self.mode).least_epochs()
        if self.epochs < least:
            raise SpecError(f"epochs must be {least} or more for {self.mode!r}, not {self.epochs}")
        for spec in self.estimators:
            build_estimator(spec)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, as JSON and TOML have them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    def to_toml(self) -> str:
        """Return the experiment as TOML, which `read_experiment` reads back."""
        # JSON's strings, numbers and arrays of strings are also TOML's.
        return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in self.to_dict().items())

    def to_json(self) -> str:
        """Return the experiment as JSON, which `read_experiment` reads back."""
        return json.dumps(self.to_dict(), indent=2)


def experiment_from(values: Mapping[str, Any], where: str) -> Experiment:
    """Return the experiment of plain values.

    Parameters
    ----------
    values
        By field name; fields that aren't given keep their default.
    where
        What the values come from, for messages.

    Raises
    ------
    SpecError
        A key isn't a field, ``name`` is missing, or a value makes no sense.
    """
    check_keys(values, where)
    if "name" not in values:
        raise SpecError(f"{where}: the experiment has no name")
    try:
        return Experiment(**values)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Refuse keys that aren't fields of an experiment.

    Raises
    ------
    SpecError
        There is one.
    """
    known = [field.name for field in dataclasses.fields(Experiment)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise SpecError(f"{where}: an experiment has no {', '.join(unknown)}. It has: {', '.join(known)}")


def read_table(path: Path) -> dict[str, Any]:
    """Return the plain values of a TOML file, or of a JSON file (by suffix ``.json``).

    Raises
    ------
    SourceNotFoundError
        There is no such file.
    SpecError
        The file isn't what its suffix says, or holds no table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise SourceNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: can't be read as a configuration: {error}") from error
    if not isinstance(table, dict):
        raise SpecError(f"{path}: must hold a table of keys and values")
    return table


def read_experiment(path: Path) -> Experiment:
    """Return the experiment of a TOML or JSON file.

    Raises
    ------
    SourceNotFoundError, SpecError
        The file is missing, or what it says makes no sense.
    """
    return experiment_from(read_table(path), str(path))


def _check_type(field: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise SpecError(f"{field} must be one of {', '.join(typing.get_args(hint))}, not {value!r}")
    elif hint == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(item, str) and item.isprintable() for item in value):
            raise SpecError(f"{field} must be a list of strings, not {value!r}")
    elif type(value) is not hint:
        raise SpecError(f"{field} must be of type {hint.__name__}, not {value!r}")
    elif hint is str and not value.isprintable():
        raise SpecError(f"{field} must be printable text, not {value!r}")
