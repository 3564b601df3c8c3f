"""One half of a measurement in a process of its own: encode a set of tensors to a file, or decode that file.

Runs in the environment of kcomplex for its own codes and in that of the peers for theirs. Prints a line of JSON: the
processor seconds of each repetition, and the peak of memory above what was in use before, in bytes (Linux alone tells).
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from peers import PEERS

Arrays = dict[str, NDArray[Any]]
Result = TypeVar("Result")
# Quick tools are timed several times.
REPETITIONS = 3
ENOUGH_SECONDS = 2.0
CLEAR_PEAK = Path("/proc/self/clear_refs")


class Ours:
    """A code of kcomplex: the stream of a whole checkpoint."""

    def __init__(self, spec: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.spec = spec

    def encode(self, arrays: Arrays) -> bytes:
        """Return the stream."""
        import torch

        from kcomplex.measuring.stream import encode_checkpoint

        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        bfloat16 = {
            name: tensor.view(torch.bfloat16) for name, tensor in tensors.items() if tensor.dtype == torch.uint16
        }
        return encode_checkpoint({**tensors, **bfloat16}, self.spec)

    def decode(self, stream: bytes) -> Arrays:
        """Return the arrays by name."""
        import torch

        from kcomplex.measuring.stream import decode_checkpoint

        tensors = decode_checkpoint(stream)
        bfloat16 = {
            name: tensor.view(torch.uint16) for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16
        }
        return {name: tensor.numpy() for name, tensor in {**tensors, **bfloat16}.items()}


def processor_seconds() -> float:
    """Return what this process and those that it waited for have used."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def memory(field: str) -> int:
    """Return a field of Linux's account of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def watched_peak() -> Callable[[], float]:
    """Reset the peak of this process's memory; return a function of its growth since in bytes, NaN but on Linux."""
    if not CLEAR_PEAK.exists():
        return lambda: math.nan
    CLEAR_PEAK.write_text("5")
    before = memory("VmRSS")
    return lambda: float(memory("VmHWM") - before)


def measured(work: Callable[[], Result]) -> tuple[Result, list[float], float]:
    """Return the result, the processor seconds of each repetition, and the peak of memory in bytes.

    The peak is that above what this process used before, or a child's in whole, whichever is higher.
    """
    growth = watched_peak()
    seconds: list[float] = []
    while len(seconds) < REPETITIONS and sum(seconds) < ENOUGH_SECONDS:
        start = processor_seconds()
        result = work()
        seconds.append(processor_seconds() - start)
    of_children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    grown = growth()
    return result, seconds, grown if math.isnan(grown) else max(grown, of_children)


def main() -> None:
    """Run ``encode TOOL DTYPE SET STREAM`` or ``decode TOOL DTYPE STREAM SET``."""
    action, tool, dtype, source, target = sys.argv[1:]
    codec = PEERS[tool]() if tool in PEERS else Ours(tool)
    # Imports and compiled kernels are loaded before the clock starts.
    trial = {"w": np.arange(64 * 64).reshape(64, 64).astype(dtype)}
    codec.decode(codec.encode(trial))
    if action == "encode":
        with np.load(source) as file:
            arrays = dict(file)
        stream, seconds, peak = measured(lambda: codec.encode(arrays))
        Path(target).write_bytes(stream)
    else:
        stream = Path(source).read_bytes()
        arrays, seconds, peak = measured(lambda: codec.decode(stream))
        np.savez(target, allow_pickle=False, **arrays)
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
