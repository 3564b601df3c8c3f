"""Where the bits are: a run's table, and the figure of stacked bars."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from torch import nn

from kcomplex.analyses.studies import bits
from kcomplex.errors import RunError
from kcomplex.estimators.description import SHARED
from kcomplex.measuring.explanation import explain
from kcomplex.tracking.tracker import attach
from kcomplex.tracking.worker import measure_pending


def network(layers: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"encoder.layers.{i:02}.attention.output.projection.weight": torch.randn(20 + i, 30, generator=random)
        for i in range(layers)
    }
    return tensors | {"batches": torch.tensor(12), "bias": torch.zeros(50)}


def stacked(ax: Axes) -> dict[str, list[float]]:
    """Widths of the bars, by part."""
    containers = [item for item in ax.containers if isinstance(item, BarContainer)]
    return {str(item.get_label()).lstrip("_"): [patch.get_width() for patch in item.patches] for item in containers}


def ticks(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def small_run(folder: Path) -> Path:
    tracker = attach(nn.Linear(40, 30), run=folder, every=None, estimators=("mix", "zstd"), measure=False)
    tracker.close()
    measure_pending(folder)
    return folder


def test_a_runs_bits_are_those_that_were_measured(tmp_path: Path) -> None:
    frame = bits.compute_from_runs(small_run(tmp_path / "run"), estimator="mix")
    assert set(frame["tensor"]) == {"weight", "bias", SHARED}
    assert set(frame.loc[frame["tensor"] == "weight", "part"]) >= {"signs", "exponents", "mantissas", "structure"}
    totals = bits.load_runs(tmp_path / "run").set_index("estimator")["bits"]
    assert frame["bits"].sum() == pytest.approx(totals["mix"])
    ax = bits.plot(frame)
    assert ticks(ax) == ["all 1,230 weights", "bias", "weight", SHARED]
    widths = np.array(list(stacked(ax).values())).sum(axis=0)
    assert widths[0] == pytest.approx(totals["mix"] / 1230)


def test_several_runs_are_too_many(tmp_path: Path) -> None:
    for name in ("a", "b"):
        small_run(tmp_path / name)
    with pytest.raises(RunError, match="one run: give the folder of one of a, b"):
        bits.compute_from_runs(tmp_path, estimator="zstd")


@pytest.mark.parametrize("spec", ["mix", "palette|entropy", "planes|zstd", "uniform:bits=4|mix"])
def test_the_figure_stacks_every_bit_beside_floor_and_control(spec: str) -> None:
    (explanation,) = explain(network(3), spec, shuffle=0)
    ax = bits.plot(explanation.to_frame())
    description = explanation.description
    widths = np.array(list(stacked(ax).values())).sum(axis=0)
    assert widths[0] == pytest.approx(description.bits_per_weight)
    lengths = {tensor.name: tensor.value / max(tensor.weights, 1) for tensor in description.tensors}
    for name, width in zip(ticks(ax), widths, strict=True):
        if name in lengths:
            assert width == pytest.approx(lengths[name])
    floor, control = (np.asarray(line.get_xdata()) for line in ax.get_lines())
    assert floor[0] * description.weights == pytest.approx(sum(item.bits for item in explanation.floors))
    assert explanation.shuffled is not None
    assert control[0] == pytest.approx(explanation.shuffled.bits_per_weight)
    assert ax.get_xlabel() == f"description length, bits per weight\n{spec} (code)"
    shares = [text.get_text() for text in ax.texts if text.get_text().endswith("%")]
    assert shares[0] == "100.0 %"
    assert sum(float(share.split()[0]) for share in shares[1:]) == pytest.approx(100, abs=0.3)


def test_many_tensors_have_names_that_can_be_read(tmp_path: Path) -> None:
    (explanation,) = explain(network(40), "planes|zstd", shuffle=0)
    ax = bits.plot(explanation.to_frame())
    names = ticks(ax)
    assert len(names) == 33
    assert names[1] == "encoder.layers.10.atte…utput.projection.weight"
    assert names[-2:] == ["(12 other tensors)", SHARED]
    figure = ax.figure
    figure.savefig(tmp_path / "figure.png")  # type: ignore[union-attr]
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    width, height = figure.canvas.get_width_height()
    legend = ax.get_legend()
    assert legend is not None
    inside = ax.get_window_extent()
    for box in (legend.get_window_extent(), ax.xaxis.label.get_window_extent(), *boxes):
        assert 0 <= box.x0 <= box.x1 <= width
        assert 0 <= box.y0 <= box.y1 <= height
        assert not box.overlaps(inside)


def test_single_weights_do_not_set_the_scale() -> None:
    ax = bits.plot(explain(network(30), "zstd")[0].to_frame())
    assert "batches" not in ticks(ax)
    assert max(np.array(list(stacked(ax).values())).sum(axis=0)) < 40


def test_parts_that_nobody_knows_have_looks_of_their_own() -> None:
    parts = ["signs", *(f"part {i}" for i in range(6)), "payload"]
    rows = [
        {"estimator": "x", "kind": "code", "measured": "weights", "tensor": "w", "shape": "8", "dtype": "int8",
         "weights": 8, "part": part, "bits": 8.0, "bits_per_weight": 1.0}
        for part in parts
    ]  # fmt: skip
    ax = bits.plot(pd.DataFrame(rows))
    containers = [item for item in ax.containers if isinstance(item, BarContainer)]
    looks = [(item.patches[0].get_hatch(), item.patches[0].get_facecolor()) for item in containers]
    assert len(set(looks)) == len(parts)
    assert sorted(stacked(ax)) == sorted(parts)


def test_draws_where_it_is_asked_to() -> None:
    mine = Figure().subplots()
    assert bits.plot(explain(network(2), "zstd")[0].to_frame(), mine) is mine
