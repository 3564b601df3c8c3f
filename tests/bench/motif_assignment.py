"""Nearest motifs: ours beside the published formula, in one run.

``python tests/bench/motif_assignment.py`` prints seconds of wall and processor time, the growth of the process's peak
memory, and the share of a sample of blocks that got the motif which brute force in float64 gives them.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch

from kcomplex.motifs.blocks import blocks_of, draw_motifs
from kcomplex.motifs.nearest import nearest, squared_distances

SAMPLE = 2000


@dataclass(frozen=True)
class Case:
    """How many weights, in blocks of what size, for how many motifs, around what offset."""

    weights: int
    block_size: int
    motifs: int
    offset: float = 0.0


CASES = (
    Case(2_000_000, 4, 5000),
    Case(2_000_000, 8, 2500),
    Case(200_000, 4, 500, offset=1.0),
)


def published_formula(rows: torch.Tensor, motifs: torch.Tensor, budget: int = 256 << 20) -> torch.Tensor:
    """Return the motif of smallest |x|^2 + |z|^2 - 2 x z in float32, in chunks of ``budget`` bytes of distances."""
    step = max(1, budget // (4 * len(motifs)))
    lengths = motifs.square().sum(dim=1)
    found = [
        (chunk.square().sum(dim=1, keepdim=True) + lengths - 2 * chunk @ motifs.T).argmin(dim=1)
        for chunk in rows.split(step)
    ]
    return torch.cat(found)


def measure(case: Case, which: str) -> tuple[float, float, float, float]:
    """Return wall seconds, processor seconds, growth of peak memory in MiB, and agreement with brute force."""
    generator = np.random.default_rng(0)
    weights = generator.normal(case.offset, 0.05 if not case.offset else 0.001, case.weights).astype(np.float32)
    blocks = blocks_of([weights], case.block_size)
    motifs = draw_motifs(blocks, case.motifs, generator.permutation(len(blocks.rows)), force_zero=not case.offset)
    single_rows, single_motifs = (torch.from_numpy(array.astype(np.float32)) for array in (blocks.rows, motifs))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    ours = which == "ours"
    found = nearest(blocks.rows, motifs) if ours else published_formula(single_rows, single_motifs).numpy()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    sample = generator.choice(len(blocks.rows), SAMPLE, replace=False)
    best = [np.square(blocks.rows[index] - motifs).sum(axis=1).min() for index in sample]
    chosen = squared_distances(blocks.rows[sample], motifs[found[sample]])
    return wall, processor, grown, float(np.mean(chosen <= np.array(best) * (1 + 1e-12)))


def main() -> None:
    """Print one line a case and method; each is measured in a process of its own, so that memory is its own too."""
    context = multiprocessing.get_context("spawn")
    print(f"{'weights':>9} {'s':>2} {'k':>5} {'offset':>6}  method       wall s    cpu s  peak MiB  exact")
    for case in CASES:
        walls = []
        for which in ("ours", "published"):
            with context.Pool(1) as pool:
                wall, processor, grown, exact = pool.apply(measure, (case, which))
            walls.append(wall)
            head = f"{case.weights:9} {case.block_size:2} {case.motifs:5} {case.offset:6.1f}"
            print(f"{head}  {which:10} {wall:8.2f} {processor:8.2f} {grown:9.0f} {exact:6.1%}", flush=True)
        print(f"{'':25}  ratio      {walls[1] / walls[0]:8.1f}")


if __name__ == "__main__":
    main()
