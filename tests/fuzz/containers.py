"""Damaged ``.kcz`` files, raw and with their digests made right again, and forged ones."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open

from kcomplex.errors import KComplexError
from kcomplex.estimators import pieces
from kcomplex.estimators.structure import encode_structure, varint
from kcomplex.kcz import container
from kcomplex.kcz.index import HEAD, _trailer, digest_of
from tests.fuzz.forging import LIMIT, Sample, damaged, forged, given, samples, specs, tensors
from tests.fuzz.frame import Input, main

_TRAILER = 24
_TEXTS = ("", "x", "weight", "__metadata__", "\ud800", "\x1b[31m", "a" * 5000)
_NUMBERS = (0, 1, -1, 0.5, -0.5, 1e300, 10**400, float("nan"), float("inf"), "1", None, [], {})


@cache
def files() -> tuple[bytes, ...]:
    """Return a file of every code, its longer tensors in several pieces."""
    found = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "w.kcz"
        limit, pieces.PIECE_WEIGHTS = pieces.PIECE_WEIGHTS, 100
        for spec, relative in specs():
            container.encode(tensors(), path, spec, given=given() if relative else None)
            found.append(path.read_bytes())
            read(path)
        pieces.PIECE_WEIGHTS = limit
    return tuple(found)


def make(random: Random) -> Input:
    """Return a file, damaged or forged."""
    whole = random.choice(files())
    match random.randrange(6):
        case 0:
            return Input(".kcz", damaged(whole, random))
        case 1 | 2:
            return Input(".kcz", _damaged_within(whole, random))
        case _:
            return Input(".kcz", _forged_file(forged(random.choice(samples()), random), random))


def read(path: Path) -> None:
    """Verify a file, read its tensors one by one, and decode it to one that its reader opens."""
    output = path.with_suffix(".safetensors")
    with suppress(KComplexError):
        container.verify(path, given=given(), limit=LIMIT)
    with suppress(KComplexError), container.Container(path, given=given(), limit=LIMIT) as opened:
        for entry in opened.entries[:20]:
            with suppress(KComplexError):
                tensor = opened.tensor(entry.names[-1])
                assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape)
    try:
        container.decode(path, output, given=given(), limit=LIMIT)
        with safe_open(output, framework="pt") as file, container.Container(path, given=given(), limit=LIMIT) as opened:
            assert set(file.keys()) == {name for entry in opened.entries for name in entry.names}
    finally:
        output.unlink(missing_ok=True)


def _damaged_within(whole: bytes, random: Random) -> bytes:
    """Return a file of which streams or index are damaged and the digests right."""
    length = int.from_bytes(whole[-_TRAILER:][:8], "little")
    end = len(whole) - _TRAILER - length
    body, index = whole[len(HEAD) : end], whole[end:-_TRAILER]
    if random.random() < 0.5:
        index = damaged(index, random)
    else:
        place = random.randrange(len(index) + 1)
        index = index[:place] + random.randbytes(random.randrange(9)) + index[place + random.randrange(9) :]
    return HEAD + body + index + _trailer(HEAD, index)


def _forged_file(sample: Sample, random: Random) -> bytes:
    limit = random.choice((0, 0, 0, 1, 64, 100, 1 << 22, 1 << 40))
    entries, streams = [], []
    for entry, stream in zip(sample.entries, sample.streams, strict=True):
        if entry.original is not None:
            entries.append(entry)
            continue
        count = min(pieces.piece_count(entry.shape, limit), 40)
        entries.append(replace(entry, lengths=(len(stream),) * count, choices=entry.choices[:1] * count))
        streams += [stream] * count
    digests = b"".join(map(digest_of, [sample.shared, *streams]))
    notes = zlib.compress(json.dumps(_notes(sample, random)).encode())
    if random.random() < 0.1:
        digests, notes = damaged(digests, random), damaged(notes, random)
    index = encode_structure(sample.spec, len(sample.shared), entries) + varint(limit) + digests + notes
    return HEAD + sample.shared + b"".join(streams) + index + _trailer(HEAD, index)


def _notes(sample: Sample, random: Random) -> Any:
    names = [name for entry in sample.entries for name in entry.names]
    notes: dict[str, Any] = {}
    if random.random() < 0.3:
        notes["metadata"] = {random.choice(_TEXTS): random.choice(_TEXTS)}
    if random.random() < 0.3:
        notes["order"] = random.sample(names, len(names))[: random.randrange(len(names) + 1)]
    if random.random() < 0.3:
        notes["inexact"] = {name: random.choice((0.5, 1e300)) for name in random.sample(names, 1)}
    if random.random() < 0.05:
        notes["inexact"] = {random.choice(names): random.choice(_NUMBERS)}
    if random.random() < 0.05:
        notes[random.choice(("metadata", "order", "inexact", "other"))] = random.choice((*_NUMBERS, *_TEXTS))
    return notes


if __name__ == "__main__":
    samples()
    files()
    main("containers", make, read)
