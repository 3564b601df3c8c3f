"""Sweeps: many experiments from one TOML file.

::

    [experiment]                       # what they share
    data = "digits"
    epochs = 30

    [sweep]                            # every combination of these
    seed = [0, 1, 2]

    [[runs]]                           # each of these, with every combination
    mode = "codeq"

    [[runs]]
    name = "sparse"                    # instead of a name made of what differs
    mode = "pmmp"
    fine_tune_epochs = 10
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kcomplex.errors import SpecError

from .experiment import Experiment, check_keys, experiment_from, read_table
from .run import run

_TABLES = ("experiment", "sweep", "runs")
# A value of one of these says by itself what it is; others are written with their key.
_TELLING = ("data", "network", "mode")


def read_sweep(path: Path) -> list[Experiment]:
    """Return the experiments of a sweep file, in order; see `expand`.

    Raises
    ------
    SourceNotFoundError, SpecError
        The file is missing, or what it says makes no sense.
    """
    return expand(read_table(path), str(path))


def expand(tables: Mapping[str, Any], where: str = "sweep") -> list[Experiment]:
    """Return the experiments of a sweep, the last of the swept keys varying fastest.

    Parameters
    ----------
    tables
        ``experiment`` (shared values), ``sweep`` (lists, of which every combination is run) and ``runs`` (a list of
        tables; each is run with every combination). Each may be left out.
    where
        What the tables come from, for messages.

    Raises
    ------
    SpecError
        A table or key is unknown, a key is both swept and set by a run, or two experiments are the same.
    """
    shared, swept, overrides = _checked(tables, where)
    varied = set(swept).union(*overrides)
    experiments: dict[str, Experiment] = {}
    for override in overrides:
        for combination in itertools.product(*swept.values()):
            chosen = dict(zip(swept, combination, strict=True))
            values = {**shared, **override, **chosen}
            if "name" in override:
                words = [str(override["name"]), *_words(chosen)]
            else:
                words = _words({key: value for key, value in values.items() if key in varied})
            experiment = experiment_from({**values, "name": "_".join(words) or "run"}, where)
            if experiment.name in experiments:
                raise SpecError(f"{where}: two runs would be called {experiment.name!r}: name them in [[runs]]")
            experiments[experiment.name] = experiment
    return list(experiments.values())


def run_sweep(
    experiments: Iterable[Experiment],
    folder: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[Experiment, int, Mapping[str, float]], None] | None = None,
) -> list[Path]:
    """Return the runs of experiments, one after the other in a folder; what is finished is skipped.

    Parameters
    ----------
    experiments
        All are checked before the first one trains.
    folder
        Where the runs' folders are.
    data_dir
        Where the data is; see `kcomplex.analyses.experiments.data.data.load`.
    progress
        Called after each epoch with the experiment, the number of epochs done and their metrics.

    Raises
    ------
    KComplexError
        An experiment can't be run; the ones before it are done.
    """
    experiments = list(experiments)
    for experiment in experiments:
        experiment.check()
    paths = []
    for experiment in experiments:

        def report(epoch: int, metrics: Mapping[str, float], current: Experiment = experiment) -> None:
            if progress is not None:
                progress(current, epoch, metrics)

        paths.append(run(experiment, folder, data_dir, report))
    return paths


def _checked(
    tables: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, list[Any]], list[dict[str, Any]]]:
    unknown = sorted(set(tables) - set(_TABLES))
    if unknown:
        raise SpecError(f"{where}: a sweep has no table {', '.join(unknown)}. It has: {', '.join(_TABLES)}")
    shared, swept, overrides = tables.get("experiment", {}), tables.get("sweep", {}), tables.get("runs", [{}])
    if (
        not (isinstance(shared, dict) and isinstance(swept, dict) and isinstance(overrides, list))
        or not overrides
        or not all(isinstance(override, dict) for override in overrides)
    ):
        raise SpecError(f"{where}: write the tables [experiment] and [sweep] and the list of tables [[runs]]")
    if "name" in shared or "name" in swept:
        raise SpecError(f"{where}: runs are named after what differs between them: give name only in [[runs]]")
    for key, values in swept.items():
        if not isinstance(values, list) or not values:
            raise SpecError(f"{where}: [sweep] {key} must be a list of at least one value, not {values!r}")
    for table in (shared, swept, *overrides):
        check_keys(table, where)
    twice = sorted(set(swept).intersection(set().union(*overrides)))
    if twice:
        raise SpecError(f"{where}: {', '.join(twice)} is swept and also set in [[runs]]: keep one of them")
    return shared, swept, overrides


def _words(values: Mapping[str, Any]) -> list[str]:
    """Return what a run's name says about values, in characters that every file system takes."""
    words = []
    for key, value in values.items():
        text = "+".join(value) if isinstance(value, list) else str(value)
        words.append(re.sub(r"[^\w.+=,-]", "-", text if key in _TELLING else f"{key}={text}"))
    return words
