"""Damaged and forged streams of every code."""

from __future__ import annotations

from pathlib import Path
from random import Random

import kcomplex as kc
from tests.fuzz.forging import LIMIT, damaged, forged, given, samples
from tests.fuzz.frame import Input, main


def make(random: Random) -> Input:
    """Return a stream, damaged anywhere or forged field by field."""
    sample = random.choice(samples())
    data = forged(sample, random).joined() if random.random() < 0.8 else damaged(sample.joined(), random)
    return Input(".kcx", data)


def read(path: Path) -> None:
    """Decode a stream."""
    kc.decode_checkpoint(path.read_bytes(), given=given(), limit=LIMIT)


if __name__ == "__main__":
    samples()
    main("streams", make, read)
