"""All benchmarks in one run: each prints our figure, the named peer's figure measured beside it, and their ratio."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import bdm
import coding
import hook
import motif_assignment
import training_step

BENCHMARKS = {
    "bdm": bdm.main,
    "motifs": motif_assignment.main,
    "coding": coding.main,
    "hook": hook.main,
    "training": training_step.main,
}


def main() -> None:
    """Run the benchmarks named on the command line, or all of them."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"no benchmark is called {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
