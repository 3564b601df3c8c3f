"""Our lossless coders on synthetic tensors: bits a weight, and megabytes a second both ways."""

from __future__ import annotations

import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from kcomplex.estimator import Coder, Symbols
from kcomplex.pipeline import build_estimator

WEIGHTS = 300_000
CODERS = (
    "zlib",
    "bz2",
    "lzma",
    "zstd:level=19",
    "planes|zstd:level=19",
    "planes|entropy",
    "palette|zstd:level=19",
    "palette|entropy",
    "entropy",
    "entropy:coder=ans",
)


def tensors() -> dict[str, Symbols]:
    """Return Gaussian weights as words: float32, quantised to 8 and 4 bits, and dead-zoned with 90 % zeros."""
    gaussian = np.random.default_rng(0).normal(0, 0.05, WEIGHTS).astype(np.float32)
    largest = np.abs(gaussian).max()
    edge = np.quantile(np.abs(gaussian), 0.9)
    levels = np.sign(gaussian) * np.ceil(np.maximum(np.abs(gaussian) - edge, 0) / ((largest - edge) / 7))
    return {
        "f32": gaussian.view(np.uint32),
        "q8": np.rint(gaussian / largest * 127).astype(np.int8),
        "q4": np.rint(gaussian / largest * 7).astype(np.int8),
        "dz90": levels.astype(np.int8),
        # Plus zero: a quantised network has no negative zeros.
        "q4 as f32": (np.rint(gaussian / largest * 7) * (largest / 7) + 0.0).astype(np.float32).view(np.uint32),
    }


def entropy(words: Symbols) -> float:
    """Return the zero-order entropy in bits a word, without the cost of a model."""
    counts = np.unique(words, return_counts=True)[1]
    return float((counts * np.log2(words.size / counts)).sum() / words.size)


def measure(spec: str, words: Symbols) -> tuple[float, float, float]:
    """Return bits a weight, and the speed of encoding and decoding in megabytes of words a processor second.

    Raises
    ------
    SystemExit
        Decoding gives other words back.
    """
    coder = build_estimator(spec)
    assert isinstance(coder, Coder)
    start = time.process_time()
    stream = coder.encode(words)
    encoded = time.process_time()
    decoded = coder.decode(stream, words.shape, words.dtype)
    end = time.process_time()
    if decoded.tobytes() != words.tobytes():
        sys.exit(f"coders: {spec} doesn't give its words back")
    megabytes = words.nbytes / 1e6
    return 8 * len(stream) / words.size, megabytes / max(encoded - start, 1e-9), megabytes / max(end - encoded, 1e-9)


def main() -> None:
    """Print one row a coder: for each tensor bits a weight, and MB/s of encoding and decoding."""
    words = tensors()
    table = Table(title=f"{WEIGHTS:,} weights: bits a weight (MB/s encode / decode)")
    table.add_column("coder")
    for name in words:
        table.add_column(name, justify="right")
    table.add_row("entropy, no model cost", *(f"{entropy(tensor):.4f}" for tensor in words.values()))
    for spec in CODERS:
        cells = []
        for tensor in words.values():
            bits, encode, decode = measure(spec, tensor)
            cells.append(f"{bits:.4f} ({encode:.0f} / {decode:.0f})")
        table.add_row(spec, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
