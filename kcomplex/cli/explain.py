"""What ``kcomplex describe --explain`` shows: the bits by part and by tensor, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kcomplex.cli.output import OutputFormat, progress, write_figure, write_frame

if TYPE_CHECKING:
    import pandas as pd
    from rich.progress import TaskID

    from kcomplex.estimators.estimator import Estimator
    from kcomplex.measuring.explanation import Explanation
    from kcomplex.weights import TensorHandle, Weights

# Tensors that have a row of their own on a terminal.
_MOST_TENSORS = 20


def explain_weights(
    weights: Weights, wanted: list[Estimator], jobs: int, shuffled: bool, verify: bool, partial: bool
) -> tuple[Explanation, ...]:
    """Return an explanation an estimator, with a bar on the standard error; ``verify`` decodes every code."""
    from kcomplex.measuring.explanation import explain
    from kcomplex.measuring.stream import prove

    with progress() as bar:
        tasks: dict[str, TaskID] = {}

        def advance(label: str, handle: TensorHandle) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=max(weights.nbytes, 1))
            bar.update(tasks[label], advance=handle.nbytes)

        seed = 0 if shuffled else None
        explanations = explain(weights, wanted, shuffle=seed, jobs=jobs, progress=advance, partial=partial)
        for item in explanations:
            if verify and item.description.kind == "code":
                bar.add_task(f"verifying {item.description.estimator}", total=None)
                prove(weights, item.description)
    return explanations


def show_explanation(explanation: Explanation, source: str, every_tensor: bool) -> None:
    """Print two tables: what the bits are spent on, and in which tensors."""
    from kcomplex.measuring.explanation import by_part, by_tensor, fold_short_tensors

    description, frame = explanation.description, explanation.to_frame()
    title = f"{source}: {description.estimator} ({description.kind})"
    parts = by_part(frame)
    lengths = parts.filter(like="bits").fillna(0.0)
    _show(parts[(lengths > 0).any(axis=1)], f"{title}, by part")
    _show(by_tensor(frame if every_tensor else fold_short_tensors(frame, _MOST_TENSORS)), f"{title}, by tensor")


def _show(table: pd.DataFrame, title: str) -> None:
    names = {
        "floor_bits_per_weight": "floor (proxy)",
        "shuffled_bits_per_weight": "shuffled",
        "beyond_histogram": "shuffled - unshuffled",
    }
    lengths = [name for name in ("bits_per_weight", *names) if name in table]
    rounded = table.assign(bits=table["bits"].round(), percent=(100 * table["share"]).round(2)).round(
        dict.fromkeys(lengths, 4)
    )
    columns = [*(name for name in ("part", "tensor", "weights", "bits") if name in table), "percent", *lengths]
    write_frame(rounded[columns].rename(columns=names), OutputFormat.TABLE, title=title)


def draw_explanation(explanation: Explanation, path: Path, *sources: str | None) -> None:
    """Write the figure of stacked bars, and its table beside it."""
    from kcomplex.registry import registry

    frame = explanation.to_frame()
    write_figure(registry("kcomplex.analyses").load("bits").plot(frame), frame, path, *sources)
