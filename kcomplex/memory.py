"""What a stream claims in memory, before it is allocated: a constant tensor of any shape takes a few bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from kcomplex.errors import StreamError
from kcomplex.structure import TensorEntry

# Claims of so many bytes are never refused.
_SMALL = 1 << 26
_KERNEL, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def free_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping; None where the system doesn't tell."""
    try:
        lines = dict(line.split(":", 1) for line in _KERNEL.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError, IndexError):
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    try:
        return min(free, int(_GROUP.read_text()))
    except (OSError, ValueError):
        return free


def require_memory(entries: Iterable[TensorEntry]) -> None:
    """Refuse tensors that do not fit in the free memory, with the largest of them twice: it is joined from pieces.

    Raises
    ------
    StreamError
        They don't.
    """
    sizes = [math.prod(entry.shape) * entry.dtype.itemsize for entry in entries]
    needed = sum(sizes) + max(sizes, default=0)
    if needed <= _SMALL:
        return
    free = free_memory()
    if free is not None and needed > free:
        raise StreamError(f"it claims {needed / 1e9:.1f} GB of memory where {free / 1e9:.1f} GB are free")
