"""The training loop: one loop that drives every mode and knows none of them."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.errors import RunError, SpecError
from kcomplex.machine.files import replacing
from kcomplex.training.protocol.batch_norm import reestimate_batch_norm
from kcomplex.training.protocol.mode import Mode, ParameterGroups
from kcomplex.training.protocol.schedule import Course, Phase, Verdict
from kcomplex.training.protocol.sequence import mode

from .data.augmentation import crop_and_flip, shift
from .data.data import Dataset, Split
from .experiment import Experiment
from .networks.networks import network

# Images or windows evaluated at once, and places in windows: both bound the memory that activations take.
_EVALUATION_BATCH = 1000
_EVALUATION_PREDICTIONS = 1 << 16
_AUGMENTATIONS = {"shift": shift, "crop_flip": crop_and_flip}
# Devices that PyTorch has a fused AdamW for.
_FUSED = ("cpu", "cuda", "mps", "xpu")
_IMAGE_AXES = 3


class Training:
    """A network in training, with everything that its future depends on.

    Parameters
    ----------
    experiment
        What to train and how.
    data
        The experiment's data set.

    Notes
    -----
    Initialisation and modes draw from PyTorch's global generator, which this class seeds and, on resuming, sets: call
    it inside ``torch.random.fork_rng`` to leave no trace.
    """

    def __init__(self, experiment: Experiment, data: Dataset) -> None:
        torch.manual_seed(experiment.seed)
        device = torch.device(experiment.device)
        self.experiment = experiment
        self.data = data.to(device)
        self.model = network(experiment.network).build(data.input_shape, data.classes).to(device)
        if experiment.augmentation != "none" and len(data.input_shape) != _IMAGE_AXES:
            raise SpecError(f"augmentation={experiment.augmentation} is for images: {experiment.data} has none")
        _check_last_batch(experiment, self.model, self.data.train)
        self.mode = mode(experiment.mode).with_samples(data.train.predictions)
        self.mode.prepare(self.model)
        self.optimizer = _optimizer(experiment, self.mode)
        self.course = Course(experiment.phases())
        self.shuffling = torch.Generator().manual_seed(experiment.seed)
        self._kept: dict[str, Any] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the training data."""
        return math.ceil(len(self.data.train) / self.experiment.batch_size)

    @property
    def epoch(self) -> int:
        """Epochs so far."""
        return self.course.epoch

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return self.epoch * self.steps_per_epoch

    @property
    def phase_ended(self) -> bool:
        """Whether the last epoch was the last one of its phase."""
        return self.course.epoch == self.course.begun

    @property
    def finished(self) -> bool:
        """Whether the last epoch is over."""
        return self.course.phase == Phase.FINISHED

    def run_epoch(self) -> dict[str, float]:
        """Train for one epoch and return its metrics: accuracies in [0, 1], losses in nats, the mode's own numbers."""
        train_loss = self._pass()
        self.mode.after_epoch()
        self._reestimate_batch_norm()
        self._follow(self.course.after_epoch(self._objective(), self.mode.settled()))
        validation_loss, validation_accuracy = self.evaluate(self.data.validation)
        return {
            # Prefixed: a mode may report bits or weights, which are columns of the run store.
            **{f"mode_{name}": value for name, value in self.mode.report().items()},
            "accuracy": self.evaluate(self.data.test)[1],
            "validation_accuracy": validation_accuracy,
            "train_loss_nats": train_loss,
            "validation_loss_nats": validation_loss,
        }

    def evaluate(self, split: Split) -> tuple[float, float]:
        """Return mean loss in nats and accuracy in [0, 1]."""
        return evaluate(self.model, split)

    def converted(self) -> nn.Module:
        """Return a plain network with exactly the compressed weights."""
        return self.mode.convert(self.model)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to continue from here."""
        with replacing(path, failures=(RuntimeError,)) as temporary:
            torch.save(self._state(), temporary)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote.

        Raises
        ------
        RunError
            The file is broken, or was written by another experiment.
        """
        try:
            state = torch.load(path, map_location=self.experiment.device, weights_only=True)
            # The mode first: a sequence attaches its second mode, which changes the names of the model's tensors.
            self.mode.load_state_dict(state["mode"])
            self._take_up_new_groups()
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.course.load_state_dict(state["course"])
            self._kept = state["kept"]
            self.shuffling.set_state(state["shuffling"].cpu())
            torch.set_rng_state(state["global_generator"].cpu())
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, pickle.UnpicklingError) as error:
            raise RunError(f"{path}: the checkpoint can't be continued ({error}): remove the run's folder") from error

    def _pass(self) -> float:
        self.model.train()
        train = self.data.train
        order = torch.randperm(len(train), generator=self.shuffling).to(train.labels.device)
        total = torch.zeros((), dtype=torch.float64, device=train.labels.device)
        for number, batch in enumerate(torch.split(order, self.experiment.batch_size)):
            factor = self.course.lr_factor_after(number / self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            logits, labels = _predictions(self.model(self._augmented(train.inputs[batch])), train.labels[batch])
            loss = cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            (loss + self.mode.penalty()).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.mode.after_step()
            total += loss.detach().double() * len(batch)
        mean = float(total) / len(train)
        if not math.isfinite(mean):
            raise RunError(f"{self.experiment.name}: the training loss is {mean} in epoch {self.epoch + 1}: lower lr")
        return mean

    def _augmented(self, inputs: torch.Tensor) -> torch.Tensor:
        augment = _AUGMENTATIONS.get(self.experiment.augmentation)
        return inputs if augment is None else augment(inputs, self.shuffling)

    def _objective(self) -> float:
        """Return what the stopping rule looks at; NaN, which it doesn't compare, where the penalty isn't steady.

        It costs an evaluation, so not where nothing stops early.
        """
        if not self.experiment.window or not self.mode.steady():
            return math.nan
        with torch.no_grad():
            return self._validation_loss() + float(self.mode.penalty())

    def _follow(self, verdict: Verdict) -> None:
        if verdict.keep:
            self._kept = copy.deepcopy({"model": self.model.state_dict(), "mode": self.mode.state_dict()})
        if verdict.restore:
            assert self._kept is not None
            self.model.load_state_dict(self._kept["model"])
            self.mode.load_state_dict(self._kept["mode"])
        if verdict.prune:
            self.mode.begin_fine_tuning(self._validation_loss, self._validation_error)
            self._take_up_new_groups()
            self._reestimate_batch_norm()
        if verdict.prune or verdict.finished:
            self._kept = None

    def _reestimate_batch_norm(self) -> None:
        if self.experiment.reestimate_batch_norm:
            reestimate_batch_norm(self.model, torch.split(self.data.train.inputs, _evaluated_at_once(self.data.train)))

    def _take_up_new_groups(self) -> None:
        """Let the optimiser train what the mode has added; it stays the same object, which a tracker has hooks on."""
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for group in _parameter_groups(self.experiment, self.mode):
            if not known.issuperset(map(id, group["params"])):
                self.optimizer.add_param_group(group)

    def _validation_loss(self) -> float:
        return self.evaluate(self.data.validation)[0]

    def _validation_error(self) -> float:
        return 1 - self.evaluate(self.data.validation)[1]

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mode": self.mode.state_dict(),
            "course": self.course.state_dict(),
            "kept": self._kept,
            "shuffling": self.shuffling.get_state(),
            "global_generator": torch.get_rng_state(),
        }


@torch.no_grad()
def _check_last_batch(experiment: Experiment, model: nn.Module, train: Split) -> None:
    """Refuse a last batch of one input where the network normalises single numbers over the batch."""
    if (len(train) - 1) % experiment.batch_size:
        return
    try:
        copy.deepcopy(model)(train.inputs[:1])
    except ValueError as error:
        raise SpecError(
            f"{experiment.network} can't learn from one input alone ({error}), and batch_size="
            f"{experiment.batch_size} leaves one of {len(train)} for the last batch: take another batch_size"
        ) from error


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return mean loss in nats a prediction and accuracy in [0, 1], in evaluation mode."""
    was_training = model.training
    model.eval()
    loss = correct = 0.0
    size = _evaluated_at_once(split)
    for inputs, wanted in zip(torch.split(split.inputs, size), torch.split(split.labels, size), strict=True):
        logits, labels = _predictions(model(inputs), wanted)
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        correct += float((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return loss / split.predictions, correct / split.predictions


def _predictions(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (n, classes) and labels (n,): of text, those of all places of all windows."""
    return logits.flatten(0, -2), labels.flatten()


def _evaluated_at_once(split: Split) -> int:
    return min(_EVALUATION_BATCH, max(1, _EVALUATION_PREDICTIONS * len(split) // split.predictions))


def _optimizer(experiment: Experiment, prepared: Mode) -> torch.optim.Optimizer:
    groups = _parameter_groups(experiment, prepared)
    if experiment.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=experiment.lr, momentum=0.9)
    # One pass over weights and moments: on networks as small as these, the optimiser is half of a step.
    return torch.optim.AdamW(groups, lr=experiment.lr, fused=torch.device(experiment.device).type in _FUSED)


def _parameter_groups(experiment: Experiment, prepared: Mode) -> ParameterGroups:
    groups = prepared.parameter_groups(lr=experiment.lr, weight_decay=experiment.weight_decay)
    for group in groups:
        group["initial_lr"] = group["lr"]
    return groups
