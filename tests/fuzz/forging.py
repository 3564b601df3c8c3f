"""Small streams of every code, and what a forger may do to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any, NamedTuple

import torch

import kcomplex as kc
from kcomplex.estimators.structure import TensorEntry, decode_structure, encode_structure, varint
from kcomplex.weights import DTYPES

CODES = (
    *("raw", "zlib", "bz2", "lzma", "zstd:level=3,long=True", "brotli", "entropy", "entropy:coder=ans", "context"),
    *(
        "mix",
        "lin",
        "best",
        "best:tier=tight",
        "planes|zstd",
        "planes:unit=bit|entropy",
        "planes|context",
        "planes|mix",
    ),
    *("palette|entropy", "palette|context", "palette|lzma", "palette|planes|lin", "mosaic|entropy", "mosaic:s=2|mix"),
)
QUANTISED = (
    *("uniform:bits=4|entropy", "uniform:bits=4,per_row=True|mix", "deadzone|context", "sign|lin", "grid|lin"),
    *(
        "grid:step=0.1,trellis=False,price=0|entropy",
        "lloyd:k=8|palette|entropy",
        "lloyd:k=30,price=1.0,shared=True|mix",
    ),
    *("mosaic:s=4,k=8|context", "uniform|planes|zstd"),
)
RELATIVE = ("mix", "lin", "zstd", "best", "best:tier=tight", "grid:step=0.1|lin", "uniform|mix", "palette|mix")
# Of what a stream may claim, in bytes: tensors that stay whole are decoded in about three times their size.
LIMIT = 1 << 26
# Bytes that begin, end and lengthen integers.
_BYTES = (0, 1, 2, 3, 127, 128, 129, 254, 255)
_SIDES = (0, 1, 2, 3, 63, 64, 65, 1000, 1 << 16, 1 << 20, 1 << 22, 100_000_007, 1 << 31, 1 << 32, 1 << 40, 1 << 59)


class Sample(NamedTuple):
    """A stream, cut: its code, what tensors share, and the entry and stream of each of them."""

    spec: str
    shared: bytes
    entries: tuple[TensorEntry, ...]
    streams: tuple[bytes, ...]

    def joined(self) -> bytes:
        """Return the whole stream, its lengths made to fit."""
        lengths = [
            replace(entry, lengths=(len(stream),)) if entry.original is None else entry
            for entry, stream in zip(self.entries, self.streams, strict=True)
        ]
        return encode_structure(self.spec, len(self.shared), lengths) + self.shared + b"".join(self.streams)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of several dtypes, among them constants and one that is the transpose of another."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    weight += 0.1 * seed * torch.randn(20, 12, generator=random)
    codes = torch.randint(-8, 8, (16, 10), generator=random, dtype=torch.int8)
    return {
        "weight": weight,
        "half": (weight[:9] * 4).round().half(),
        "codes": codes,
        "turned": codes.t().contiguous(),
        "double": weight[0].double() / 3,
        "zeros": torch.zeros(30, 7),
        "short": weight[:6].to(torch.float8_e4m3fn),
        "waves": torch.complex(weight[1], weight[2]),
        "steps": torch.tensor(7 + seed),
        "mask": weight[3] > 0,
        "none": torch.zeros(0, 4),
        "wide": torch.arange(40).reshape(4, 10) * 1000003,
    }


@cache
def given() -> dict[str, torch.Tensor]:
    """Return the weights that relative streams are given."""
    return tensors(1) | {"half": torch.full((9, 12), torch.nan), "codes": tensors(2)["weight"][:16, :10]}


@cache
def specs() -> tuple[tuple[str, bool], ...]:
    """Return the code of every sample, and whether it is given other weights."""
    return (*((spec, False) for spec in (*CODES, *QUANTISED)), *((spec, True) for spec in RELATIVE))


@cache
def samples() -> tuple[Sample, ...]:
    """Return a stream of every code. Each is decoded once: nothing is left to be compiled."""
    found = []
    for spec, relative in specs():
        data = kc.encode_checkpoint(tensors(), spec, given=given() if relative else None)
        kc.decode_checkpoint(data, given=given())
        found.append(_cut(data))
    return tuple(found)


def _cut(data: bytes) -> Sample:
    structure = decode_structure(data)
    position = structure.size + structure.shared
    streams = []
    for entry in structure.tensors:
        streams.append(data[position : position + entry.length])
        position += entry.length
    return Sample(structure.spec, data[structure.size :][: structure.shared], structure.tensors, tuple(streams))


def damaged(data: bytes, random: Random) -> bytes:
    """Return data with bytes changed, cut, moved, repeated or inserted."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        place, other = sorted((random.randrange(len(changed) + 1), random.randrange(len(changed) + 1)))
        some = random.randbytes(random.randrange(1, 9))
        match random.randrange(9):
            case 0 | 1 | 2 if changed:
                changed[min(place, len(changed) - 1)] ^= 1 << random.randrange(8)
            case 3 | 4 if changed:
                changed[min(random.choice((place, place % 12)), len(changed) - 1)] = random.choice(_BYTES)
            case 5:
                del changed[place:other]
            case 6:
                changed[place:place] = changed[place:other][:1000]
            case 7:
                changed[place : place + len(some)] = some
            case 8:
                changed[place:place] = random.choice((some, varint(random.choice(_SIDES))))
    return bytes(changed)


def forged(sample: Sample, random: Random) -> Sample:
    """Return a sample of which one to four fields say something else."""
    for _ in range(random.choice((1, 1, 2, 4))):
        sample = random.choice(_FORGERIES)(sample, random)
    return sample


def _with_entry(sample: Sample, random: Random, change: Callable[[TensorEntry], dict[str, Any]]) -> Sample:
    place = random.randrange(len(sample.entries))
    entries = list(sample.entries)
    entries[place] = replace(entries[place], **change(entries[place]))
    return sample._replace(entries=tuple(entries))


def _other_stream(sample: Sample, random: Random) -> Sample:
    place = random.randrange(len(sample.streams))
    streams = list(sample.streams)
    another = random.choice((sample, random.choice(samples())))
    streams[place] = random.choice((b"", damaged(streams[place], random), random.choice(another.streams)))
    return sample._replace(streams=tuple(streams))


def _damaged_stream(sample: Sample, random: Random) -> Sample:
    place = random.randrange(len(sample.streams))
    streams = list(sample.streams)
    streams[place] = damaged(streams[place], random)
    return sample._replace(streams=tuple(streams))


def _other_shape(sample: Sample, random: Random) -> Sample:
    def change(entry: TensorEntry) -> dict[str, Any]:
        shape = list(entry.shape)
        match random.randrange(5):
            case 0 if shape:
                shape[random.randrange(len(shape))] = random.choice(_SIDES)
            case 1 if shape:
                shape[random.randrange(len(shape))] *= random.choice((2, 10, 1000, 100_000))
            case 2:
                shape.insert(random.randrange(len(shape) + 1), random.choice(_SIDES))
            case 3 if shape:
                shape.pop(random.randrange(len(shape)))
            case _:
                shape = [random.choice(_SIDES) for _ in range(random.randrange(4))]
        return {"shape": tuple(shape)}

    return _with_entry(sample, random, change)


def _other_dtype(sample: Sample, random: Random) -> Sample:
    return _with_entry(sample, random, lambda entry: {"dtype": random.choice(list(DTYPES.values()))})


def _other_choice(sample: Sample, random: Random) -> Sample:
    choice = random.choice((*range(14), *range(128, 142), 255))
    return _with_entry(sample, random, lambda entry: {"choices": (choice,) if entry.original is None else ()})


def _other_names(sample: Sample, random: Random) -> Sample:
    names = [name for entry in sample.entries for name in entry.names]
    another = random.choice((*names, "", "__metadata__", "a/b\x1b[31m", "\N{SNOWMAN}" * 300))
    return _with_entry(sample, random, lambda entry: {"names": random.choice(((another,), (*entry.names, another)))})


def _same_as_another(sample: Sample, random: Random) -> Sample:
    if len(sample.entries) < 2:
        return sample
    place = random.randrange(1, len(sample.entries))
    entries, streams = list(sample.entries), list(sample.streams)
    first = random.randrange(place)
    shape = random.choice((entries[place].shape, entries[first].shape, entries[first].shape[::-1]))
    told = {"lengths": (), "choices": (), "original": first, "transposed": random.random() < 0.5, "shape": shape}
    entries[place] = replace(entries[place], **told)
    streams[place] = b""
    return sample._replace(entries=tuple(entries), streams=tuple(streams))


def _other_spec(sample: Sample, random: Random) -> Sample:
    behind = random.choice(samples()).spec
    stages = sample.spec.split("|")
    if random.random() < 0.5:
        stages.insert(random.randrange(len(stages)), random.choice(("planes:unit=byte", "palette", *behind.split("|"))))
        behind = "|".join(stages)
    return sample._replace(spec=random.choice((behind, behind, damaged(behind.encode(), random).decode("latin-1"))))


def _other_shared(sample: Sample, random: Random) -> Sample:
    return sample._replace(shared=random.choice((damaged(sample.shared, random), random.choice(samples()).shared)))


def _another_order(sample: Sample, random: Random) -> Sample:
    places = random.sample(range(len(sample.entries)), len(sample.entries))[: random.randrange(1, 13)]
    own = [place for place in places if sample.entries[place].original is None]
    if not own:
        return sample
    entries, streams = (tuple(items[place] for place in own) for items in (sample.entries, sample.streams))
    return sample._replace(entries=entries, streams=streams)


_FORGERIES = (
    *(_damaged_stream,) * 8,
    *(_other_shape,) * 4,
    *(_other_stream, _other_dtype, _other_choice, _other_names, _other_spec, _other_shared, _another_order),
    _same_as_another,
)
