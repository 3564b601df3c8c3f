"""BDM of a million weights: ours and pybdm's, each from the weights to the value, alternately in one run.

Both use one thread; processor seconds, because the machine may be shared.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from environment import peer_python

import kcomplex

WEIGHTS = 1_000_000
ROUNDS = 5
# A call of ours takes milliseconds: one round times several and keeps the median.
CALLS = 20

# What the official code of MoMos does with the weights: their signs as integers, and one-dimensional BDM.
PEER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
from pybdm import BDM
weights = np.load(sys.argv[1])
bdm = BDM(ndim=1)
bdm.bdm((weights[:1200] > 0).astype(int))
for line in sys.stdin:
    start = time.process_time()
    value = bdm.bdm((weights > 0).astype(int))
    print(json.dumps([float(value), time.process_time() - start]), flush=True)
"""


def ours(weights: torch.Tensor) -> tuple[float, float]:
    """Return the value, and the median of the processor seconds that a call takes."""
    seconds = []
    for _ in range(CALLS):
        start = time.process_time()
        value = kcomplex.describe({"weights": weights}, "bdm")[0].value
        seconds.append(time.process_time() - start)
    return value, statistics.median(seconds)


def measure() -> tuple[list[float], list[float]]:
    """Return the processor seconds of each round, ours and the peer's.

    Raises
    ------
    SystemExit
        The values differ.
    """
    torch.set_num_threads(1)
    weights = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(0))
    ours(weights[:1200])
    mine, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npy"
        np.save(path, weights.numpy())
        command = [peer_python(), "-c", PEER, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
            assert peer.stdin is not None
            assert peer.stdout is not None
            for _ in range(ROUNDS):
                value, seconds = ours(weights)
                mine.append(seconds)
                peer.stdin.write("next\n")
                peer.stdin.flush()
                answer = peer.stdout.readline()
                if not answer:
                    sys.exit("bdm: pybdm ended without an answer")
                peer_value, seconds = json.loads(answer)
                theirs.append(seconds)
                if not math.isclose(value, peer_value, rel_tol=1e-9):
                    sys.exit(f"bdm: {value} bits, but pybdm says {peer_value}")
    return mine, theirs


def main() -> None:
    """Print both speeds and their ratio."""
    mine, theirs = measure()
    ratios = [their / my for my, their in zip(mine, theirs, strict=True)]
    print(f"BDM of {WEIGHTS:,} weights, {ROUNDS} rounds, medians of processor time; both give the same value")
    for name, seconds in (("kcomplex", statistics.median(mine)), ("pybdm 0.1.0", statistics.median(theirs))):
        print(f"  {name:<12} {1e3 * seconds:8.2f} ms  {WEIGHTS / seconds / 1e6:8.2f} Mbit/s")
    print(
        f"  kcomplex is {statistics.median(ratios):.0f} times as fast ({min(ratios):.0f} to {max(ratios):.0f} by round)"
    )


if __name__ == "__main__":
    main()
