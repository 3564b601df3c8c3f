"""What the training modes cost on one thread: steps on ResNet-20 beside a plain step, and projections of MoMos.

``python tests/bench/training_step.py`` prints ratios of processor time, the median of pairs of steps taken in turn;
CoDeQ's quantile beside the published way; and seconds and growth of the peak memory of a projection.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time

import torch
from coding_process import watched_peak
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.analyses.experiments.networks.networks import network
from kcomplex.training.protocol.sequence import mode
from kcomplex.training.quantising.dead_zone import quantile_and_maximum

BATCH = 32
STEPS = 20
SPECS = {
    "uniform_qat": "uniform_qat",
    "codeq fixed": "codeq",
    "codeq mixed": "codeq:learnable_bits=true",
    "codeq target": "codeq:target_zeros=0.6",
    "codeq channels": "codeq:per_channel=true",
    "pmmp": "pmmp:alpha=1e-5",
}
PROJECTIONS = {
    "as published": "momos:block_size=4,motifs=12500,reference=true",
    "spread motifs and Lloyd's algorithm": "momos:block_size=4,motifs=12500",
}


class Loop:
    """A training in progress."""

    def __init__(self, spec: str) -> None:
        torch.manual_seed(0)
        self.model = network("resnet20").build((3, 32, 32), 10)
        self.mode = mode(spec)
        self.mode.prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.mode.parameter_groups(lr=1e-3))
        self.inputs = torch.randn(BATCH, 3, 32, 32)
        self.labels = torch.randint(10, (BATCH,))

    def step(self) -> float:
        """Take one step and return its seconds of processor time."""
        begin = time.process_time()
        self.optimizer.zero_grad()
        (cross_entropy(self.model(self.inputs), self.labels) + self.mode.penalty()).backward()
        self.optimizer.step()
        self.mode.after_step()
        return time.process_time() - begin


def projection(spec: str) -> tuple[float, float, float]:
    """Return wall and processor seconds of one projection of MoMos, and the growth of the peak memory in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Linear(2500, 2000, bias=False)
    momos = mode(spec)
    momos.prepare(model)
    growth = watched_peak()
    wall, processor = time.perf_counter(), time.process_time()
    momos.after_epoch()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall, processor, growth() / 2**20


def published_quantile(magnitudes: torch.Tensor, quantile: float = 0.99) -> torch.Tensor:
    """Return a quantile from two selections, one for each of the ranks that it lies between."""
    position = quantile * (len(magnitudes) - 1)
    low, high = (torch.kthvalue(magnitudes, rank).values for rank in (int(position) + 1, int(position) + 2))
    return low + (position - int(position)) * (high - low)


def quantiles() -> None:
    """Print what CoDeQ's top level costs, ours in one selection and the published way in two."""
    for size in (100_000, 1_000_000, 10_000_000):
        weights = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {"ours": [], "published": []}
        for _ in range(5):
            for name in seconds:
                begin = time.process_time()
                quantile_and_maximum(weights, 0.99) if name == "ours" else published_quantile(weights[0].abs())
                seconds[name].append(time.process_time() - begin)
        ours, theirs = (1000 * statistics.median(values) for values in seconds.values())
        print(f"quantile of {size:10,}: {ours:7.2f} ms, two selections {theirs:7.2f} ms, ratio {theirs / ours:.1f}")


def main() -> None:
    """Print one line a mode, then the quantiles and the projections."""
    torch.set_num_threads(1)
    for name in SPECS:
        plain, modified = Loop("baseline"), Loop(SPECS[name])
        pairs = [(plain.step(), modified.step()) for _ in range(STEPS + 3)][3:]
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        ours, theirs = (1000 * statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{name:14} {ratio:6.3f} x a plain step ({theirs:.1f} ms for {ours:.1f} ms)", flush=True)

    quantiles()
    # Each in a process of its own, which no earlier one's memory is left in.
    for name, spec in PROJECTIONS.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            wall, processor, grown = pool.apply(projection, (spec,))
        print(f"projection of 5 million weights, {name}: {wall:.1f} s, {processor:.1f} s cpu, {grown:.0f} MiB")


if __name__ == "__main__":
    main()
