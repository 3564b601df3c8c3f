"""The three analyses: tables against brute force, figures by what they say."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kcomplex.analyses.figures.axes import styles
from kcomplex.analyses.studies import accuracy, layers, trajectory
from kcomplex.errors import RunError, UnknownNameError
from kcomplex.registry import registry

WEIGHTS = 1000
SIZES = {"baseline": 30_000.0, "codeq": 1_500.0, "momos": 4_000.0}
ACCURACIES = {"baseline": 0.98, "codeq": 0.95, "momos": 0.94}


def runs_frame(estimator: str = "palette|entropy", kind: str = "code", unit: str = "bits") -> pd.DataFrame:
    """Return what `load_runs` gives for three runs of three snapshots, the first without metrics."""
    rows = [
        {
            "run": run,
            "step": 10 * epoch,
            "epoch": float(epoch),
            "estimator": name,
            "kind": "code" if name == "raw" else kind,
            "unit": "bits" if name == "raw" else unit,
            "value": 32.0 * WEIGHTS if name == "raw" else bits * (3 - epoch),
            "bits": 32.0 * WEIGHTS if name == "raw" else bits * (3 - epoch),
            "bits_per_weight": 32.0 if name == "raw" else bits * (3 - epoch) / WEIGHTS,
            "weights": WEIGHTS,
            "raw_bits": 32 * WEIGHTS,
            "accuracy": math.nan if epoch == 0 else ACCURACIES[run] - (2 - epoch) / 10,
            "loss_nats": math.nan if epoch == 0 else 1 - ACCURACIES[run],
        }
        for run, bits in SIZES.items()
        for epoch in range(3)
        for name in ("raw", estimator)
    ]
    return pd.DataFrame(rows)


def tensors_frame(tensors: int = 2) -> pd.DataFrame:
    """Return what `load_tensors` gives for the same runs; the tensors have nine tenths of the bits."""
    frame = runs_frame()
    copies = [
        frame.assign(tensor=f"{i}.weight", weights=WEIGHTS // tensors, value=0.9 * frame["value"] * share)
        for i, share in enumerate(np.arange(1, tensors + 1) / sum(range(1, tensors + 1)))
    ]
    return pd.concat(copies).drop(columns=["bits", "bits_per_weight", "raw_bits", "accuracy", "loss_nats"])


def texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def dominated(points: list[tuple[float, float]], point: tuple[float, float]) -> bool:
    cost, gain = point
    return any(c <= cost and g >= gain and (c, g) != point for c, g in points)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_the_front_is_what_no_other_point_dominates(points: list[tuple[float, float]]) -> None:
    costs, gains = np.array(points, dtype=float).T
    assert accuracy.pareto_front(costs, gains).tolist() == [not dominated(points, point) for point in points]


def test_accuracy_is_one_row_a_run_at_its_last_snapshot() -> None:
    table = accuracy.compute(runs_frame())
    assert table[["run", "step", "bits", "score", "pareto"]].to_numpy().tolist() == [
        ["codeq", 20, 1_500.0, 0.95, True],
        ["momos", 20, 4_000.0, 0.94, False],
        ["baseline", 20, 30_000.0, 0.98, True],
    ]


def test_a_loss_is_better_when_smaller() -> None:
    table = accuracy.compute(runs_frame(), metric="loss_nats").set_index("run")
    assert table["pareto"].to_dict() == {"codeq": True, "momos": False, "baseline": True}
    assert (table["score"] > 0).all()


@pytest.mark.parametrize("kind", ["code", "ideal", "proxy"])
@pytest.mark.parametrize("analysis", ["accuracy", "trajectory", "layers"])
def test_every_figure_tells_estimator_kind_and_unit(analysis: str, kind: str) -> None:
    module = registry("kcomplex.analyses").load(analysis)
    runs = runs_frame(kind=kind)
    tensors = tensors_frame().assign(kind=kind)
    ax = module.plot(module.compute(tensors, runs) if analysis == "layers" else module.compute(runs))
    label = ax.get_ylabel() if analysis == "trajectory" else ax.get_xlabel()
    assert f"palette|entropy ({kind})" in label
    assert ("bits per weight" if analysis == "trajectory" else "bits") in label
    assert set(SIZES) <= set(texts(ax))


def test_the_accuracy_figure_has_a_marker_a_run_the_front_and_the_raw_size() -> None:
    ax = accuracy.plot(accuracy.compute(runs_frame()))
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "accuracy"
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    assert set(lines) == {"best trade-offs", "raw size", *SIZES}
    for run, bits in SIZES.items():
        assert np.asarray(lines[run].get_xydata()).tolist() == [[bits, ACCURACIES[run]]]
    assert np.asarray(lines["raw size"].get_xdata()).tolist() == [32_000, 32_000]
    assert np.asarray(lines["best trade-offs"].get_xydata()).tolist()[:2] == [[1500, 0.95], [30_000, 0.98]]


def test_the_accuracy_figure_names_only_the_front_of_many_runs() -> None:
    table = pd.concat(
        [accuracy.compute(runs_frame()).assign(run=lambda frame, i=i: frame["run"] + str(i)) for i in range(9)]
    )
    table = table.reset_index(drop=True)
    table["pareto"] = table["run"] == "codeq3"
    assert texts(accuracy.plot(table)) == ["best trade-offs", "26 other runs", "codeq3", "raw size"]


def test_the_trajectory_has_a_line_a_run_and_the_raw_size() -> None:
    ax = trajectory.plot(trajectory.compute(runs_frame()))
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    assert set(lines) == {"raw size", *SIZES}
    for run, bits in SIZES.items():
        expected = [[epoch, bits * (3 - epoch) / WEIGHTS] for epoch in range(3)]
        np.testing.assert_allclose(np.asarray(lines[run].get_xydata()), expected)
    assert np.asarray(lines["raw size"].get_ydata()).tolist() == [32, 32]
    assert ax.get_xlabel() == "epoch"
    drawn = [(lines[run].get_linestyle(), lines[run].get_marker()) for run in SIZES]
    assert len(set(drawn)) == len(drawn)


def test_without_epochs_the_trajectory_is_over_steps() -> None:
    ax = trajectory.plot(trajectory.compute(runs_frame().assign(epoch=math.nan)))
    assert ax.get_xlabel() == "step"
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [0, 10, 20]


def test_the_layers_of_a_run_sum_to_its_length() -> None:
    table = layers.compute(tensors_frame(), runs_frame())
    assert table.groupby("run")["bits"].sum().to_dict() == pytest.approx(SIZES)
    shared = table[table["tensor"] == layers.SHARED].set_index("run")
    assert shared["bits"].to_dict() == pytest.approx({run: bits / 10 for run, bits in SIZES.items()})
    assert shared["bits_per_weight"].isna().all()
    assert table.set_index("run")["accuracy"].to_dict() == ACCURACIES


def test_the_layers_figure_has_a_bar_a_run_and_tensor() -> None:
    ax = layers.plot(layers.compute(tensors_frame(3), runs_frame()))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.weight", "1.weight", "2.weight", layers.SHARED]
    widths = {
        str(bars.get_label()): [patch.get_width() for patch in bars.patches]  # type: ignore[attr-defined]
        for bars in ax.containers
    }
    for run, bits in SIZES.items():
        assert widths[run] == pytest.approx([0.15 * bits, 0.3 * bits, 0.45 * bits, 0.1 * bits])
    looks = [(bars.patches[0].get_hatch(), bars.patches[0].get_facecolor()) for bars in ax.containers]  # type: ignore[attr-defined]
    assert len(set(looks)) == len(looks)


def test_the_layers_of_a_deep_network_are_summed_beyond_the_longest() -> None:
    ax = layers.plot(layers.compute(tensors_frame(40), runs_frame()))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [*(f"{i}.weight" for i in range(28, 40)), "28 other tensors", layers.SHARED]
    widths = [patch.get_width() for patch in ax.containers[0].patches]  # type: ignore[attr-defined]
    assert sum(widths) == pytest.approx(SIZES["baseline"])


@pytest.mark.parametrize("compute", [accuracy.compute, trajectory.compute])
def test_an_estimator_is_found_by_any_way_to_write_it(compute: Any) -> None:
    frame = runs_frame("mosaic|entropy")
    assert compute(frame, "mosaic:seed=0|entropy").equals(compute(frame, "mosaic|entropy"))


@pytest.mark.parametrize("compute", [accuracy.compute, trajectory.compute])
def test_estimators_that_did_not_measure_are_refused_with_those_that_did(compute: Any) -> None:
    with pytest.raises(RunError, match=r"there is: palette\|entropy, raw"):
        compute(runs_frame(), "zstd")
    with pytest.raises(RunError, match="nothing yet"):
        compute(runs_frame().iloc[:0])
    with pytest.raises(UnknownNameError):
        compute(runs_frame(), "zsdt")


@pytest.mark.parametrize("compute", [accuracy.compute, trajectory.compute])
def test_measures_that_are_not_in_bits_are_refused(compute: Any) -> None:
    with pytest.raises(RunError, match="measures share, not bits"):
        compute(runs_frame("sparsity", kind="proxy", unit="share"), "sparsity")


def test_a_missing_metric_is_told() -> None:
    with pytest.raises(RunError, match="no run logged the metric 'bleu'"):
        accuracy.compute(runs_frame(), metric="bleu")
    frame = runs_frame()
    frame.loc[frame["run"] == "momos", "accuracy"] = math.nan
    with pytest.raises(RunError, match="missing at the last snapshot of momos"):
        accuracy.compute(frame)


@pytest.mark.parametrize("name", ["accuracy", "trajectory", "layers"])
def test_figures_are_drawn_where_they_are_asked_to_and_nothing_overlaps(name: str, tmp_path: Path) -> None:
    module = registry("kcomplex.analyses").load(name)
    frame = layers.compute(tensors_frame(), runs_frame()) if name == "layers" else module.compute(runs_frame())
    mine = Figure(figsize=(9, 5)).subplots()
    assert module.plot(frame, mine) is mine
    figure = module.plot(frame).figure
    figure.savefig(tmp_path / "figure.png")
    ax = figure.axes[0]
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        boxes = [
            tick.label1.get_window_extent()
            for tick in axis.get_major_ticks()
            if tick.label1.get_text() and low <= tick.get_loc() <= high
        ]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    width, height = figure.canvas.get_width_height()
    for text in (ax.xaxis.label, ax.yaxis.label, *ax.get_legend().get_texts()):
        box = text.get_window_extent()
        if not text.get_text():
            continue
        assert 0 <= box.x0 <= box.x1 <= width
        assert 0 <= box.y0 <= box.y1 <= height


def test_the_first_sixty_styles_differ_in_black_and_white() -> None:
    first = styles(60)
    for look in ([(s.marker, s.grey) for s in first[:30]], [(s.line, s.marker) for s in first[:30]]):
        assert len(set(look)) == len(look)
    bars = [(s.grey, s.hatch) for s in first[:18]]
    assert len(set(bars)) == len(bars)
