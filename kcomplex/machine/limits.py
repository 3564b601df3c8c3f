"""What a stream claims in memory, before it is allocated: a constant tensor of any shape takes a few bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kcomplex.errors import RefusedStreamError, SpecError

# Weights that a stream may claim without being asked, in bytes, besides so many times its own bytes.
_CLAIM = 1 << 30
_PLAUSIBLE = 1000
# Claims of so many bytes are never refused for lack of memory.
_SMALL = 1 << 26
_KERNEL = Path("/proc/meminfo")


class _Group(NamedTuple):
    """Where a version of Linux control groups tells a limit and what is used of it, files in memory included."""

    folder: Path
    limit: str
    used: str
    files: str
    shared: str


_GROUPS = (
    _Group(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file", "shmem"),
    _Group(
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"
    ),
)


def free_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping; None where the system doesn't tell.

    Where it only tells how much memory there is, as macOS does, that is returned.
    """
    try:
        free: int | None = 1024 * int(_numbers(_KERNEL)["MemAvailable:"])
    except (OSError, KeyError, ValueError, IndexError):
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            free = None
    left = [_left_in(group) for group in _GROUPS]
    return min((bound for bound in (free, *left) if bound is not None), default=None)


def require_memory(needed: int) -> None:
    """Refuse what needs more than the free memory, in bytes.

    Raises
    ------
    RefusedStreamError
        It does.
    """
    if needed <= _SMALL:
        return
    free = free_memory()
    if free is not None and needed > free:
        raise RefusedStreamError(f"it claims {needed / 1e9:.1f} GB of memory where {free / 1e9:.1f} GB are free")


def require_claim(claimed: int, given: int, limit: int | None) -> None:
    """Refuse a stream that claims more weights than it may, in bytes, as a few bytes can claim any number of them.

    Parameters
    ----------
    given
        Bytes of the stream.
    limit
        What it may claim; None for a thousand times its bytes and 2**30 bytes.

    Raises
    ------
    RefusedStreamError
        It claims more.
    SpecError
        The limit is no integer.
    """
    if not isinstance(limit, int | None):
        raise SpecError(f"limit is a number of bytes, not {limit!r}")
    allowed = _PLAUSIBLE * given + _CLAIM if limit is None else limit
    if claimed > allowed:
        raise RefusedStreamError(
            f"{given:,} bytes claim to hold {claimed:,} bytes of weights where {allowed:,} are allowed: if you trust "
            f"where they are from, allow more with limit={claimed} (on the command line: --limit {claimed})"
        )


def _left_in(group: _Group) -> int | None:
    """Return the bytes that a group may still use, those of files that needn't stay in memory included."""
    try:
        limit, used = (int((group.folder / name).read_text()) for name in (group.limit, group.used))
        told = _numbers(group.folder / "memory.stat")
        return max(limit - used + int(told[group.files]) - int(told[group.shared]), 0)
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _numbers(file: Path) -> dict[str, str]:
    """Return the second word of every line by its first."""
    return {words[0]: words[1] for words in map(str.split, file.read_text().splitlines())}
