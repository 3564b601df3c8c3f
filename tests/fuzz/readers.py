"""Fuzzes the readers of checkpoints: files of every format, mutated as bytes and as what they say."""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from kcomplex.sources.open import open_weights
from tests.fuzz.frame import Input, main

# Bits of numbers at which readers break: signs, widths, and sizes that no memory has.
_NUMBERS = [
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    *(2**bits + more for bits in (31, 32, 62, 63) for more in (-1, 0)),
]
_JUMP = 40


def read(path: Path) -> None:
    """Read every word of a checkpoint."""
    with open_weights(path) as weights:
        for handle in weights.values():
            handle.words()
            if handle.load_range is not None:
                handle.load_range(0, handle.elements)


def sound_files() -> list[Input]:
    """Return small files of every format, none of them broken."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimiser = torch.optim.Adam(layers.parameters())
    layers(torch.ones(2, 3)).sum().backward()
    optimiser.step()
    state = {**layers.state_dict(), "half": torch.ones(3).bfloat16(), "view": torch.arange(12).reshape(3, 4).t()}
    checkpoint = {"model": state, "ema": dict(state), "optimizer": optimiser.state_dict(), "epoch": 3, "names": {"a"}}
    arrays = {"a": np.arange(12.0).reshape(3, 4), "b": np.asfortranarray(np.ones((2, 3), ">f4")), "c": np.ones((), "?")}
    packed = {"q.qweight": torch.ones(2, 8, dtype=torch.int32), "q.qzeros": torch.ones(1, 1, dtype=torch.int32)}
    shapes = {"shape": [4, 4]}
    quantised = {"w": torch.ones(8, 1, dtype=torch.uint8), "q.scales": torch.ones(1, 8)}
    quantised["w.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(shapes).encode()), dtype=torch.uint8)
    files = [Input(".safetensors", save({"a": torch.ones(3, 4), "b": torch.zeros(0), **packed, **quantised}))]
    for value in (state, checkpoint, layers, [torch.ones(2), {"w": torch.ones(2)}]):
        for zipped in (True, False):
            for protocol in (2, 4):
                buffer = io.BytesIO()
                torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
                files.append(Input(".pt", buffer.getvalue()))
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, **arrays)
        files.append(Input(".npz", buffer.getvalue()))
    for array in arrays.values():
        buffer = io.BytesIO()
        np.save(buffer, array)
        files.append(Input(".npy", buffer.getvalue()))
    return files


SOUND = sound_files()


def make(random: Random) -> Input:
    """Return a mutated file, or now and then one of pieces that were never a file."""
    suffix, data = random.choice(SOUND)
    mutations = [flip, cut, splice, insert, number]
    if data[:2] == b"PK":
        mutations += [in_record, in_record, in_record, directory]
    elif suffix == ".pt":
        mutations += [instructions, instructions]
    elif suffix == ".safetensors":
        mutations += [header, header, header]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(mutations)(random, data) or b"\0"
    return Input(random.choice((suffix, suffix, suffix, ".bin", "")), data)


# What changes bytes.


def flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def cut(random: Random, data: bytes) -> bytes:
    start, stop = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:start] if random.random() < 0.5 else data[:start] + data[stop:]


def splice(random: Random, data: bytes) -> bytes:
    other = random.choice(SOUND).data
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other)) :]


def insert(random: Random, data: bytes) -> bytes:
    at, start = random.randrange(len(data) + 1), random.randrange(len(data))
    again = data[start : start + random.randrange(1, _JUMP)]
    return data[:at] + again * random.choice((1, 1, 2, 1000)) + data[at:]


def number(random: Random, data: bytes) -> bytes:
    """Put a number at which readers break where one may stand."""
    code = random.choice(("<H", "<I", "<Q", ">I"))
    value = struct.pack(code, random.choice(_NUMBERS) % 256 ** struct.calcsize(code))
    at = random.randrange(len(data) + 1)
    return data[:at] + value + data[at + len(value) :]


# What changes what a file says.


def instructions(random: Random, data: bytes) -> bytes:
    """Change, move, repeat or drop instructions of the pickles that data begins with, keeping each well-formed."""
    parts, end = [], 0
    try:
        for _ in range(5):
            places = [place for _, _, place in pickletools.genops(data[end:])]
            places = [place + end for place in places if place is not None]
            stop = data.index(b".", places[-1]) + 1
            parts += [data[start:after] for start, after in zip(places, [*places[1:], stop], strict=True)]
            end = stop
            if random.random() < 0.3:
                break
    # The data doesn't begin with a pickle, or no longer.
    except Exception:
        if not parts:
            return flip(random, data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        match random.randrange(5):
            case 0:
                parts[at] = parts[other]
            case 1:
                parts.insert(at, parts[other])
            case 2:
                del parts[at]
                parts = parts or [b"."]
            case 3:
                parts[at] = random.choice(
                    (b"N", b"}", b"]", b")", b"(", b"0", b"1", b"2", b"Q", b"R", b"b", b"\x85", b"\x81")
                )
            case 4:
                parts[at] = pickle.dumps(random.choice((-1, *_NUMBERS)), 2)[2:-1]
    return b"".join(parts) + data[end:]


def header(random: Random, data: bytes) -> bytes:
    """Change the header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    try:
        entries: dict[str, Any] = json.loads(data[8 : 8 + size])
        name = random.choice(list(entries))
        entry = entries[name]
        match random.randrange(5):
            case 0:
                entry["dtype"] = random.choice(("F64", "F4", "BOOL", "C64", "X", "I8", 3))
            case 1:
                entry["shape"] = random.choice(([], [0], [-1, -1], [2**62, 4], [2**31] * 3, [1] * 70, ["a"], [1.0], {}))
            case 2:
                entry["data_offsets"] = [random.choice(_NUMBERS), random.choice(_NUMBERS)]
            case 3:
                entries[random.choice(("", "__metadata__", "a" * 9999, "\ud800"))] = entry
            case 4:
                entries[name] = random.choice((None, [], {}, {"dtype": "F32"}, [entries], math.nan))
        text = json.dumps(entries).encode()
    # It was mutated before.
    except Exception:
        return flip(random, data)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def in_record(random: Random, data: bytes) -> bytes:
    """Change one record of a zip file, and write the archive anew, checksums and all."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    # It was mutated before.
    except Exception:
        records = {}
    if not records:
        return flip(random, data)
    name = random.choice([*records, *(name for name in records if name.endswith("data.pkl")), *records])
    inner: list[Callable[[Random, bytes], bytes]] = [flip, cut, insert, number]
    if name.endswith("data.pkl"):
        inner += [instructions] * 6
    records[name] = random.choice(inner)(random, records[name] or b"\0")
    if random.random() < 0.1:
        records[random.choice(("archive/constants.pkl", "archive/data/7", "x.npy", "../x"))] = records.pop(name)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return buffer.getvalue()


def directory(random: Random, data: bytes) -> bytes:
    """Change the table of contents of a zip file, or the record behind it."""
    at = data.find(b"PK\x01\x02")
    if at < 0:
        return flip(random, data)
    change = random.choice((flip, number, insert, cut))
    return data[:at] + change(random, data[at:])


if __name__ == "__main__":
    main("readers", make, read)
