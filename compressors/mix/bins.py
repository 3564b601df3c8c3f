"""Bins of quantities that contexts are made of: what compiled models have in common."""

from __future__ import annotations

from kcomplex.machine.compiled import inlined

BINS = 96


@inlined
def log_bin(log: float, steps: float, lowest: float) -> int:
    """Return the bin, below `BINS`, of a natural logarithm at so many steps an octave from the lowest octave."""
    place = int((log * 1.4426950408889634 - lowest) * steps)
    return min(max(place, 0), BINS - 1)


@inlined
def signed_bin(ratio: float, steps: float) -> int:
    """Return the bin, below 32, of a signed ratio; 16 for zero."""
    return int(min(max(ratio * steps + 16.0, 0.0), 31.0))
