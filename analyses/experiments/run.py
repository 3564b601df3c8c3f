"""Running an experiment: a tracked training run in a folder, resumed where it was interrupted, skipped when done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from kcomplex.errors import RunError, SpecError
from kcomplex.machine.files import replacing
from kcomplex.tracking.differences import differences
from kcomplex.tracking.tracker import attach
from kcomplex.training.quantising.bit_operations import weight_bits

from .data.data import load
from .experiment import Experiment, read_experiment
from .training import Training

Progress: TypeAlias = Callable[[int, Mapping[str, float]], None]

CONFIGURATION = "experiment.toml"
CHECKPOINT = "checkpoint.pt"
BITS = "bits.json"
FINAL = "final.safetensors"


def run(
    experiment: Experiment,
    folder: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of an experiment's finished run.

    Its folder ``folder/name`` holds the configuration (``experiment.toml``), the run store with snapshots, metrics
    and descriptions, and at the end the bits of quantised weights (``bits.json``) and the plain compressed network
    (``final.safetensors``, the experiment in its metadata). An interrupted run continues after its last whole epoch and
    ends with the same weights, bit for bit, as one that wasn't interrupted. A finished one is returned as it is.

    Parameters
    ----------
    experiment
        What to train and how.
    folder
        Where runs are kept; made if it doesn't exist.
    data_dir
        Where the data is; see `kcomplex.analyses.experiments.data.data.load`.
    progress
        Called after each epoch with the number of epochs done and their metrics.

    Raises
    ------
    RunError
        The folder holds a run of another experiment, or something else, or a checkpoint that can't be read; or the
        training diverged.
    SpecError, UnknownNameError, PluginError
        The experiment can't be built.
    DataError
        The data isn't there.
    """
    path = Path(folder) / experiment.name
    if is_done(experiment, folder):
        return path
    experiment.check()
    data = load(experiment.data, data_dir)
    with _own_randomness_and_threads(experiment):
        training = Training(experiment, data)
        with replacing(path / CONFIGURATION) as temporary:
            temporary.write_text(experiment.to_toml(), encoding="utf-8")
        _train(training, path, progress)
        _write_final(training, path / FINAL)
    (path / CHECKPOINT).unlink(missing_ok=True)
    return path


def is_done(experiment: Experiment, folder: str | os.PathLike[str]) -> bool:
    """Return whether an experiment's run is finished.

    Raises
    ------
    RunError
        The run's folder holds a run of another experiment, or something else.
    """
    path = Path(folder) / experiment.name
    configuration = path / CONFIGURATION
    if not configuration.exists():
        if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
            raise RunError(f"{path}: holds something that isn't a run of an experiment: choose another place or name")
        return False
    there, here = read_experiment(configuration).to_dict(), experiment.to_dict()
    if there != here:
        raise RunError(
            f"{path}: holds a run of another experiment ({differences(there, here)}): choose another place or name"
        )
    return (path / FINAL).is_file()


def load_final(path: Path, model: nn.Module) -> None:
    """Give a plain network the weights that a finished run ended with, tied ones under all their names.

    Raises
    ------
    RunError
        The file is broken, or of another network.
    """
    try:
        load_model(model, path)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise RunError(f"{path}: doesn't hold the weights of the run's network: {error}") from error


def final_bits(run: Path) -> dict[str, int] | None:
    """Return the bits a weight of the layers that a finished run's mode quantised, by full name; None if it kept none.

    Raises
    ------
    RunError
        The file is broken.
    """
    path = run / BITS
    try:
        bits = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read: {error}") from error
    widths = bits.values() if isinstance(bits, dict) else [None]
    if bits is not None and not all(type(width) is int and width > 0 for width in widths):
        raise RunError(f"{path}: doesn't hold numbers of bits by name: remove it")
    kept: dict[str, int] | None = bits
    return kept


def _train(training: Training, path: Path, progress: Progress | None) -> None:
    experiment = training.experiment
    checkpoint = path / CHECKPOINT
    if checkpoint.exists():
        training.load(checkpoint)
    with attach(
        training.model,
        training.optimizer,
        run=path,
        every=None,
        steps_per_epoch=training.steps_per_epoch,
        estimators=list(experiment.estimators),
        config=experiment.to_dict(),
        resume=True,
        step=training.step,
    ) as tracker:
        while not training.finished:
            metrics = training.run_epoch()
            if training.epoch % experiment.every == 0 or training.phase_ended:
                tracker.capture()
                tracker.log(metrics)
            training.save(checkpoint)
            if progress is not None:
                progress(training.epoch, metrics)


def _write_final(training: Training, path: Path) -> None:
    plain = training.converted().cpu()
    with replacing(path.with_name(BITS)) as temporary:
        temporary.write_text(json.dumps(weight_bits(training.model)), encoding="utf-8")
    with replacing(path, failures=(SafetensorError,)) as temporary:
        save_model(plain, str(temporary), metadata={"experiment": training.experiment.to_json()})


@contextmanager
def _own_randomness_and_threads(experiment: Experiment) -> Iterator[None]:
    """Leave PyTorch's generators and number of threads as they were."""
    device = torch.device(experiment.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"device {experiment.device!r}: PyTorch finds no CUDA device here")
    threads = torch.get_num_threads()
    torch.set_num_threads(experiment.threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
