"""Front: what each finished run's network costs when it is written and read back, against how well it then does."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import nn

from kcomplex.errors import RunError, SpecError
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.measuring.stream import decode_checkpoint, encode_checkpoint
from kcomplex.training.quantising.bit_operations import bit_operations
from kcomplex.training.shrinking.chain import is_chain, links_of
from kcomplex.training.shrinking.dead_units import remove_dead_units

from ..experiments.data.data import Dataset, load
from ..experiments.experiment import Experiment, read_experiment
from ..experiments.networks.networks import network
from ..experiments.run import CONFIGURATION, FINAL, final_bits, load_final
from ..experiments.training import evaluate
from ..figures.axes import Style, add_grid_and_legend, axes_or_new, styles
from .accuracy import pareto_front
from .lengths import compression_rate, description_bits, mask_bits, values_bytes

# Of the codes that others need no context for, the one that sees both zeros and few distinct values.
DEFAULT_ESTIMATOR = "palette|entropy"

# Fields of an experiment that have a column, or say nothing about what is trained.
_TOLD = ("name", "data", "network", "mode", "seed", "estimators", "every")


def compute(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `measured`, by increasing bytes, with what is on the front.

    Two columns are added: ``pareto`` (no other run is as short and as good, and better in one of the two) and ``hull``
    (on the upper concave hull of accuracy over bytes, which a mixture of two runs could reach).

    Parameters
    ----------
    frame
        What `measured` returned.
    """
    table = frame.sort_values("bytes", ignore_index=True)
    costs, gains = table["bytes"].to_numpy(float), table["accuracy"].to_numpy(float)
    return table.assign(pareto=pareto_front(costs, gains), hull=upper_hull(costs, gains))


def measured(
    folder: str | os.PathLike[str], estimator: str | None = None, *, data_given_network: bool = True
) -> pd.DataFrame:
    """Return one row a finished run: its network without dead units, encoded, decoded and evaluated.

    Columns: run, data, network, mode, seed, settings (the experiment's other fields that matter, as JSON); accuracy (of
    the decoded network, on test images), parameters (of the network as built), non_zeros, rate (their ratio), units (of
    the layers left, as ``40-20-10``; empty where the network isn't a chain of layers, which keeps its dead units),
    estimator, bytes (of the whole stream, names and shapes included; with dead units where that is shorter, as it can
    be for mosaics, whose blocks go across units), mask_bytes (what the positions of the non-zeros cost where all are
    alike: no code), value_bytes (four for each non-zero, which others report as the size), bit_operations (of one
    pass of the network as trained, dead units and all, over those at full precision, as
    `training.quantising.bit_operations` counts: layers that aren't quantised count in full, however many weights are
    zero; NaN for a run that kept no bits), data_bytes (the training labels given the network) and description_bytes
    (both).

    Parameters
    ----------
    folder
        A run, or a folder of runs; those that aren't finished are left out.
    estimator
        Specification of a code; None for ``palette|entropy``.
    data_given_network
        Whether to measure data_bytes and description_bytes, for which all training data are evaluated.

    Raises
    ------
    RunError
        No run is finished.
    WeightsError
        The estimator isn't a code.
    """
    spec = build_estimator(estimator or DEFAULT_ESTIMATOR).spec
    paths = sorted(path.parent for path in Path(folder).rglob(FINAL) if (path.parent / CONFIGURATION).is_file())
    if not paths:
        raise RunError(f"{os.fspath(folder)}: holds no finished run of an experiment")
    data: dict[str, Dataset] = {}
    rows = []
    for path in paths:
        experiment = read_experiment(path / CONFIGURATION)
        if experiment.data not in data:
            data[experiment.data] = load(experiment.data)
        network_row, decoded = _row(experiment, path, data[experiment.data], spec)
        given = _data_given(decoded, data[experiment.data], network_row["bytes"]) if data_given_network else {}
        rows.append({"run": path.name, **network_row, **given})
    return pd.DataFrame(rows)


def plot(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Return axes with one marker a run, one style a mode, and the front of best trade-offs.

    Parameters
    ----------
    frame
        What `compute` returned.
    ax
        Axes to draw on; new ones by default.
    """
    ax = axes_or_new(ax, width=8.0)
    front = frame[frame["pareto"]]
    ax.plot(front["bytes"], front["accuracy"], drawstyle="steps-post", color="0.6", zorder=1, label="best trade-offs")
    for name, style, rows in rows_by_method(frame):
        ax.plot(rows["bytes"], rows["accuracy"], style.marker, color=style.grey, markeredgecolor="black", label=name)
    return finish_axes(ax, frame)


def compute_from_runs(
    path: str | os.PathLike[str], *, estimator: str | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    """Return `compute` of a run or a folder of runs.

    Raises
    ------
    SpecError
        Another metric than the accuracy is asked for: it is measured anew, on the decoded networks.
    """
    refuse_other_metric("front", metric)
    return compute(measured(path, estimator))


def refuse_other_metric(analysis: str, metric: str) -> None:
    """Raise SpecError unless the metric is the accuracy, which decoded networks are measured by."""
    if metric != "accuracy":
        raise SpecError(
            f"{analysis} measures the accuracy of decoded networks, not {metric!r}: use the analysis accuracy"
        )


def rows_by_method(frame: pd.DataFrame) -> Iterator[tuple[str, Style, pd.DataFrame]]:
    """Yield the name of a mode's stages, its style and its rows, in alphabetical order."""
    names = frame["mode"].map(method_names)
    groups = sorted(set(names))
    for style, name in zip(styles(len(groups)), groups, strict=True):
        yield name, style, frame[names == name]


def finish_axes(ax: Axes, frame: pd.DataFrame, told: str = "") -> Axes:
    """Return axes of accuracy over bytes with their scales, labels, grid and legend; `told` ends the label of bytes."""
    ax.set_xscale("log")
    ax.set_xlabel(f"bytes ({frame['estimator'].iloc[0]}, code){told}")
    ax.set_ylabel("test accuracy of the decoded network")
    add_grid_and_legend(ax)
    return ax


def upper_hull(costs: NDArray[np.float64], gains: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points are on the concave hull of the largest gain over cost, up to the point of the largest gain.

    Parameters
    ----------
    costs, gains
        One of each a point; shape (n,).
    """
    chosen: list[int] = []
    for point in np.lexsort((-gains, costs)):
        if chosen and gains[point] <= gains[chosen[-1]]:
            continue
        while len(chosen) > 1:
            one, other = chosen[-2:]
            rise = (gains[other] - gains[one]) * (costs[point] - costs[other])
            if rise > (gains[point] - gains[other]) * (costs[other] - costs[one]):
                break
            chosen.pop()
        chosen.append(int(point))
    on_hull = np.zeros(len(costs), bool)
    on_hull[chosen] = True
    return on_hull


def _row(experiment: Experiment, run: Path, data: Dataset, estimator: str) -> tuple[dict[str, Any], nn.Module]:
    """Return the columns of the network, and the network that its stream decodes to."""
    model = network(experiment.network).build(data.input_shape, data.classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    load_final(run / FINAL, model)
    operations = _bit_operations(model, run, data)
    chain = is_chain(model)
    candidates = [model, remove_dead_units(model).model] if chain else [model]
    streams = [encode_checkpoint(candidate, estimator) for candidate in candidates]
    shortest = min(range(len(streams)), key=lambda place: len(streams[place]))
    smaller, stream = candidates[shortest], streams[shortest]
    smaller.load_state_dict(decode_checkpoint(stream))
    non_zeros = sum(int(parameter.count_nonzero()) for parameter in smaller.parameters())
    entries = sum(parameter.numel() for parameter in smaller.parameters())
    settings = {key: value for key, value in experiment.to_dict().items() if key not in _TOLD}
    row = {
        "data": experiment.data,
        "network": experiment.network,
        "mode": experiment.mode,
        "seed": experiment.seed,
        "settings": json.dumps(settings),
        "accuracy": evaluate(smaller, data.test)[1],
        "parameters": parameters,
        "non_zeros": non_zeros,
        "rate": compression_rate(parameters, non_zeros),
        "units": "-".join(str(link.units) for link in links_of(smaller)) if chain else "",
        "estimator": estimator,
        "bytes": len(stream),
        "mask_bytes": mask_bits(non_zeros, entries) / 8,
        "value_bytes": values_bytes(non_zeros),
        "bit_operations": operations,
    }
    return row, smaller


def _data_given(decoded: nn.Module, data: Dataset, network_bytes: int) -> dict[str, float]:
    loss, _ = evaluate(decoded, data.train)
    data_bytes = description_bits(0.0, loss, data.train.predictions) / 8
    return {"data_bytes": data_bytes, "description_bytes": network_bytes + data_bytes}


def _bit_operations(model: nn.Module, run: Path, data: Dataset) -> float:
    bits = final_bits(run)
    if bits is None:
        return math.nan
    try:
        return float(bit_operations(model, data.test.inputs[:1], bits).attrs["relative"])
    except SpecError as error:
        raise RunError(f"{run}: its bits aren't those of its network: {error}") from error


def method_names(mode: str) -> str:
    """Return the names of a mode's stages without their options."""
    return " | ".join(stage.partition(":")[0].strip() for stage in mode.split("|"))
