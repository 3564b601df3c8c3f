"""The golden arrays: what the published code computes on seeded inputs (see the README beside them)."""

from __future__ import annotations

from pathlib import Path

VENDORED = Path(__file__).resolve().parent / "fixtures" / "golden"
# Where there is such a neighbour, arrays that it has beside the vendored ones take part too.
NEIGHBOUR = Path(__file__).resolve().parents[2] / "shared" / "golden"


def golden_files(pattern: str) -> list[Path]:
    """Return the files of a name pattern: the vendored ones, then the neighbour's that aren't vendored."""
    further = (path for path in NEIGHBOUR.glob(pattern) if not (VENDORED / path.name).exists())
    return [*sorted(VENDORED.glob(pattern)), *sorted(further)]
