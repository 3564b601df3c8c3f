"""What integers are counted from, so that their magnitudes are small."""

from __future__ import annotations

import numpy as np

from kcomplex.estimators.symbols import Symbols

_SAMPLE = 1 << 13


def centre(symbols: Symbols) -> int:
    """Return what magnitudes are counted from: zero, the mode or the median, whichever they are least far from.

    It is looked for among some 8,000 of the symbols.
    """
    step = max(1, symbols.size // _SAMPLE)
    sample = symbols.reshape(-1)[::step].astype(np.int64)
    lowest = int(sample.min())
    if int(sample.max()) - lowest < _SAMPLE:
        counts = np.bincount(sample - lowest)
        words = np.flatnonzero(counts) + lowest
        counts = counts[words - lowest]
    else:
        words, counts = np.unique(sample, return_counts=True)
    candidates = [int(words[np.argmax(counts)]), int(words[np.searchsorted(2 * np.cumsum(counts), sample.size)])]
    if words[0] <= 0 <= words[-1]:
        candidates.insert(0, 0)
    return min(candidates, key=lambda middle: float(np.log2(1.0 + np.abs(words - float(middle))) @ counts))
