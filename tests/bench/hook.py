"""What the tracking hook costs: the same training with and without it, interleaved."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import kcomplex as kc
from kcomplex.analyses.experiments.data.data import load
from kcomplex.training.protocol.sequence import mode

EPOCHS = 40
BATCH = 32
REPEATS = 7


def train(spec: str, run: Path | None) -> tuple[float, float]:
    """Return the seconds that training took, and the seconds until the tracker was closed as well."""
    data = load("digits")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )
    training = mode(spec)
    training.prepare(network)
    optimizer = torch.optim.AdamW(training.parameter_groups(lr=1e-3))
    x, y = data.train.inputs, data.train.labels
    batches = list(torch.arange(len(x)).split(BATCH))
    begin = time.perf_counter()
    tracker = None
    if run is not None:
        tracker = kc.attach(network, optimizer, run=run, every="1 epoch", steps_per_epoch=len(batches))
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(x[batch]), y[batch]) + training.penalty()
            loss.backward()
            optimizer.step()
            training.after_step()
        training.after_epoch()
        with torch.no_grad():
            accuracy = (network(data.test.inputs).argmax(1) == data.test.labels).float().mean().item()
        if tracker is not None:
            tracker.log(accuracy=accuracy)
    end = time.perf_counter()
    if tracker is not None:
        tracker.close()
    return end - start, time.perf_counter() - begin


def main() -> None:
    """Print the training time with and without the hook, the median of interleaved repeats."""
    torch.set_num_threads(1)
    table = Table(title=f"hook every epoch, default estimators, {EPOCHS} epochs of digits, median of {REPEATS}")
    for column in ("mode", "plain s", "with hook s", "overhead %", "with hook and close() s"):
        table.add_column(column, justify="right")
    for spec in ("baseline", "codeq"):
        plain, hooked, closed = [], [], []
        for _ in range(REPEATS):
            with tempfile.TemporaryDirectory() as folder:
                plain.append(train(spec, None)[0])
                seconds, until_closed = train(spec, Path(folder) / "run")
            hooked.append(seconds)
            closed.append(until_closed)
        overhead = statistics.median(h / p - 1 for h, p in zip(hooked, plain, strict=True))
        medians = [statistics.median(values) for values in (plain, hooked, closed)]
        table.add_row(spec, f"{medians[0]:.3f}", f"{medians[1]:.3f}", f"{100 * overhead:+.2f}", f"{medians[2]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
