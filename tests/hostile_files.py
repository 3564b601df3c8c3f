"""Hostile and broken checkpoints: every one of them must be refused with one clear error.

Load this module by its path and call `write_all`. What a planted pickle would do is to make ``PLANTED`` in the folder.
"""

from __future__ import annotations

import builtins
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLANTED = "planted"
HUGE = 10**12

Builder = Callable[[Path], object]
BUILDERS: dict[str, Builder] = {}


def write_all(folder: Path) -> list[Path]:
    """Return the paths of all hostile files and folders, written to an empty folder."""
    for name, build in BUILDERS.items():
        build(folder / name)
    return [folder / name for name in BUILDERS]


def hostile(name: str) -> Callable[[Builder], Builder]:
    """Register a builder under the name of the file that it writes."""

    def register(build: Builder) -> Builder:
        assert name not in BUILDERS
        BUILDERS[name] = build
        return build

    return register


def hostile_bytes(name: str, data: bytes) -> None:
    hostile(name)(lambda path: path.write_bytes(data))


# Files without any sense.

for suffix in ("safetensors", "npy", "npz", "pt", "pth", "ckpt", "bin", "txt"):
    hostile_bytes(f"empty.{suffix}", b"")
    hostile_bytes(f"noise.{suffix}", bytes((7 * i * i + 13) % 251 for i in range(500)))


@hostile("loop.pt")
def _(path: Path) -> None:
    path.symlink_to(path.name)


@hostile("pipe.pt")
def _(path: Path) -> None:
    os.mkfifo(path)


# Safetensors.


def tensor_entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


_W = tensor_entry("F32", (2,), 0, 8)
_TWICE = b'{"w":%s,"w":%s}' % (json.dumps(_W).encode(), json.dumps(tensor_entry("I32", (2,), 0, 8)).encode())
for name, data in {
    "short": safetensors({"w": _W}, bytes(8))[:7],
    "header_huge": safetensors({"w": _W}, bytes(8), 2**62),
    "header_beyond_end": safetensors({"w": _W}, bytes(8), 1000),
    "header_cut": safetensors({"w": _W}, bytes(8), 20),
    "header_no_json": safetensors(b"{w: 1}"),
    "header_list": safetensors([1, 2]),
    "header_nested": safetensors(b'{"a":' * 100_000),
    "header_no_text": safetensors(b'{"\xff": {}}'),
    "header_odd_entry": safetensors({"w": 3}),
    "header_odd_metadata": safetensors({"__metadata__": {"a": 1}, "w": _W}, bytes(8)),
    "truncated": safetensors({"w": _W}, bytes(5)),
    "surplus": safetensors({"w": _W}, bytes(80)),
    "overlap": safetensors({"v": tensor_entry("F32", (2,), 4, 12), "w": _W}, bytes(12)),
    "hole": safetensors({"v": tensor_entry("F32", (1,), 12, 16), "w": _W}, bytes(16)),
    "offsets_reversed": safetensors({"w": tensor_entry("F32", (2,), 8, 0)}, bytes(8)),
    "size_claimed": safetensors({"w": tensor_entry("F32", (HUGE,), 0, 4 * HUGE)}, bytes(8)),
    "shape_unlike_bytes": safetensors({"w": tensor_entry("F32", (3,), 0, 8)}, bytes(8)),
    "shape_negative": safetensors({"w": tensor_entry("F32", (-2,), 0, 8)}, bytes(8)),
    "shape_overflow": safetensors({"w": tensor_entry("F32", (2**62, 2**62), 0, 8)}, bytes(8)),
    "shape_zero_by_huge": safetensors({"w": tensor_entry("F32", (0, 2**62), 0, 0)}),
    "shape_long": safetensors({"w": tensor_entry("F32", (1,) * 100, 0, 4)}, bytes(4)),
    "names_twice": safetensors(_TWICE, bytes(8)),
    "dtype_unknown": safetensors({"w": tensor_entry("X9", (2,), 0, 8)}, bytes(8)),
    "name_no_unicode": safetensors({"\ud800w": _W}, bytes(8)),
}.items():
    hostile_bytes(f"{name}.safetensors", data)


# NumPy.


def npy(header: str | Mapping[str, Any], data: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else repr(dict(header))).encode("latin-1") + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def array_header(shape: Any = (2,), descr: Any = "<f4", fortran: Any = False) -> dict[str, Any]:
    return {"descr": descr, "fortran_order": fortran, "shape": shape}


_NPY = {
    "magic_only": b"\x93NUMPY",
    "version_unknown": npy(array_header(), bytes(8), version=9),
    "header_cut": npy(array_header(), bytes(8))[:40],
    "header_huge": npy(array_header(), bytes(8), version=2, length=2**32 - 1),
    "header_long": npy(" " * 20_000 + repr(array_header()), bytes(8)),
    "header_no_literal": npy("__import__('os').system('true')", bytes(8)),
    "header_list": npy("[1, 2]", bytes(8)),
    "header_nested": npy("(" * 9000, bytes(8)),
    "header_odd_keys": npy({"descr": "<f4"}, bytes(8)),
    "header_odd_order": npy(array_header(fortran=3), bytes(8)),
    "dtype_nonsense": npy(array_header(descr="<q9"), bytes(8)),
    "dtype_odd": npy(array_header(descr=[("a", 3)]), bytes(8)),
    "shape_negative": npy(array_header((-2,)), bytes(8)),
    "shape_twice_negative": npy(array_header((-2, -1)), bytes(8)),
    "shape_no_tuple": npy(array_header([2]), bytes(8)),
    "shape_fraction": npy(array_header((2.0,)), bytes(8)),
    "shape_claimed": npy(array_header((HUGE,)), bytes(8)),
    "shape_overflow": npy(array_header((2**40, 2**40)), bytes(8)),
    "shape_zero_by_huge": npy(array_header((0, 2**62))),
    "shape_long": npy(array_header((1,) * 100), bytes(4)),
    "truncated": npy(array_header(), bytes(7)),
    "surplus": npy(array_header(), bytes(9)),
}
for name, data in _NPY.items():
    hostile_bytes(f"{name}.npy", data)


def zipped(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            # Two members of one name make zipfile warn, and that is what some of these files are for.
            archive.NameToInfo.pop(name, None)
            archive.writestr(name, data)
    return buffer.getvalue()


def patched(data: bytes, old: bytes, new: bytes, count: int | None = None) -> bytes:
    """Return the data with `old` replaced, which must be there (so many times)."""
    assert old in data
    assert count is None or data.count(old) == count
    return data.replace(old, new)


_ARRAY = npy(array_header((10_000,)), bytes(i * i // 97 % 256 for i in range(40_000)))
_STORED = zipped([("w.npy", _ARRAY)])
_DEFLATED = zipped([("w.npy", _ARRAY)], zipfile.ZIP_DEFLATED)
_CLAIM = npy(array_header((500_000_000,)), bytes(8))
for name, data in {
    "truncated": _STORED[:-30],
    "cut_in_half": _STORED[: len(_STORED) // 2],
    "directory_cut": _STORED[:-22] + _STORED[-22:-10] + bytes(10),
    "checksum": _STORED[:30_000] + b"!!!" + _STORED[30_003:],
    "deflate_corrupted": _DEFLATED[:-8_000] + bytes(100) + _DEFLATED[-7_900:],
    "names_twice": zipped([("w.npy", _ARRAY), ("w.npy", _ARRAY)]),
    "method_bzip2": zipped([("w.npy", _ARRAY)], zipfile.ZIP_BZIP2),
    "encrypted": patched(_STORED, b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
    # Both directory entries claim two gigabytes.
    "bomb_stored": patched(
        zipped([("w.npy", _CLAIM)]),
        struct.pack("<II", len(_CLAIM), len(_CLAIM)),
        struct.pack("<II", len(_CLAIM), len(_CLAIM) - 8 + 2 * 10**9),
    ),
    "bomb_deflated": patched(
        zipped([("w.npy", _CLAIM)], zipfile.ZIP_DEFLATED),
        struct.pack("<I", len(_CLAIM)),
        struct.pack("<I", len(_CLAIM) - 8 + 2 * 10**9),
    ),
    "member_no_array": zipped([("w.npy", b"no array")]),
    "member_empty": zipped([("w.npy", b"")]),
    **{f"member_{name}": zipped([("v.npy", _ARRAY), ("w.npy", data)]) for name, data in _NPY.items()},
}.items():
    hostile_bytes(f"{name}.npz", data)


# Files of torch.save. Stand-ins make the pickles, so that they can say what torch.save never would.


class Storage:
    def __init__(self, key: str = "0", elements: Any = 4, kind: Any = torch.FloatStorage, *view: Any) -> None:
        self.identity = ("storage", kind, key, "cpu", elements, *view)


class View:
    def __init__(self, storage: Any, offset: Any = 0, shape: Any = (4,), strides: Any = (1,)) -> None:
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Calling:
    """Unpickles to the result of a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Pickler(pickle.Pickler):
    end: tuple[Any, ...] = ()

    def persistent_id(self, value: Any) -> Any:
        return (value.identity + self.end)[:6] if isinstance(value, Storage) else None


class LegacyPickler(Pickler):
    end = (None,)


def pickled(value: Any, kind: type[Pickler] = Pickler) -> bytes:
    buffer = BytesIO()
    kind(buffer, 2).dump(value)
    return buffer.getvalue()


DATA = struct.pack("<4f", 1, 2, 3, 4)


def archive(value: Any, records: Mapping[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    program = value if isinstance(value, bytes) else pickled(value)
    named = {"data.pkl": program, "byteorder": b"little", "data/0": DATA, "version": b"3\n"}
    if records is not None:
        named = dict(records)
    return zipped([(f"archive/{name}", data) for name, data in named.items()], method)


def legacy(value: Any, storages: Sequence[tuple[str, int, bytes]] = (("0", 4, DATA),)) -> bytes:
    start = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled({"little_endian": True})]
    contents = [pickled(value, LegacyPickler), pickled([key for key, _, _ in storages])]
    return b"".join([*start, *contents, *(struct.pack("<q", count) + data for _, count, data in storages)])


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


GOOD = {"w": View(Storage())}
# Both formats, with the same lies.
_VALUES: dict[str, Any] = {
    "storage_claimed": {"w": View(Storage(elements=HUGE), shape=(HUGE,))},
    "storage_claimed_only": {"w": View(Storage(elements=HUGE))},
    "storage_negative": {"w": View(Storage(elements=-4))},
    "storage_fraction": {"w": View(Storage(elements=4.0))},
    "storage_wider": {"w": View(Storage(kind=torch.DoubleStorage))},
    "storage_missing": {"w": View(Storage("1"))},
    "storage_two_sizes": {"v": View(Storage()), "w": View(Storage(elements=5))},
    "storage_view": {"w": View(Storage("0", 4, torch.FloatStorage, ("1", 2, 2)))},
    "storage_no_tuple": {"w": View(None)},
    "shape_beyond_storage": {"w": View(Storage(), shape=(HUGE,))},
    "shape_one_beyond": {"w": View(Storage(), 1)},
    "shape_negative": {"w": View(Storage(), shape=(-4,))},
    "shape_overflow": {"w": View(Storage(), shape=(2**40, 2**40), strides=(0, 0))},
    "shape_long": {"w": View(Storage(), shape=(1,) * 100, strides=(1,) * 100)},
    "shape_no_number": {"w": View(Storage(), shape=("4",))},
    "shape_unlike_strides": {"w": View(Storage(), shape=(2, 2))},
    "offset_negative": {"w": View(Storage(), -1)},
    "stride_negative": {"w": View(Storage(), 3, (4,), (-1,))},
    "stride_beyond": {"w": View(Storage(), 0, (2,), (HUGE,))},
    "repeated": {"w": View(Storage(), 0, (HUGE,), (0,))},
    "no_tensor": "weights",
    "allocating_tensor": {"w": Calling(torch.FloatTensor, HUGE)},
    "allocating_storage": {"w": Calling(torch.UntypedStorage, HUGE)},
    "name_no_unicode": {"\ud800w": View(Storage())},
    "name_no_unicode_inside": {"model": {"w\udfff": View(Storage())}},
    "name_no_unicode_beside": {"state_dict": GOOD, "\udc80": 3},
    "module": torch.nn.Linear(2, 2),
}
for name, value in _VALUES.items():
    hostile_bytes(f"{name}.pt", archive(value))
    hostile_bytes(f"legacy_{name}.pt", legacy(value))

_PICKLES = {
    "pickle_empty": b"",
    "pickle_cut": pickled(GOOD)[:-20],
    "pickle_noise": b"\x80\x02" + bytes(range(40, 240)),
    "pickle_underflow": b"\x80\x02ae.",
    "pickle_no_mark": b"\x80\x02t.",
    "pickle_no_memo": b"\x80\x02h\x07.",
    "pickle_long_text": b"\x80\x02X\xff\xff\xff\xffabc.",
    "pickle_endless_text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "pickle_nested": nested(100_000),
    "pickle_cycle": b"\x80\x02]q\x00h\x00a.",
    "pickle_key_twice": pickled(GOOD)[:-1] + b"X\x01\x00\x00\x00wK\x01s.",
    "pickle_deep_key": b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
    "pickle_extension": b"\x80\x02\x82\x01.",
    "pickle_instance": b"\x80\x02(ios\nsystem\n.",
    "pickle_old_global": b"cos\nsystem\n(S'true'\ntR.",
    "pickle_called_tensor": pickled(torch._utils._rebuild_tensor_v2)[:-1] + b"K\x01R.",
    "pickle_parameters": (
        pickled(torch._utils._rebuild_parameter)[:-1]
        + b"q\x01"
        + b"h\x01" * 20_000
        + b"N"
        + b"N\x89\x87R" * 20_001
        + b"."
    ),
}
for name, program in _PICKLES.items():
    hostile_bytes(f"{name}.pt", archive(program))
    hostile_bytes(f"raw_{name}.pt", program or b"\x80")

_SAVED = archive(GOOD)
_LAST = _SAVED.index(b"archive/data/0") - 30
for name, data in {
    "truncated": _SAVED[:-30],
    "cut_in_half": _SAVED[: len(_SAVED) // 2],
    "checksum": patched(_SAVED, DATA, DATA[:-1] + b"\x00", 1),
    "checksum_of_pickle": patched(_SAVED, b"_rebuild_tensor_v2", b"_rebuild_tensor_v1", 1),
    "compressed": archive(
        {"w": View(Storage(elements=1000), shape=(1000,))},
        {
            "data.pkl": pickled({"w": View(Storage(elements=1000), shape=(1000,))}),
            "data/0": bytes(4000),
        },
        zipfile.ZIP_DEFLATED,
    ),
    "no_pickle": archive(GOOD, {"data/0": DATA}),
    "script": archive(GOOD, {"data.pkl": pickled(GOOD), "constants.pkl": pickled(()), "data/0": DATA}),
    "byte_order": archive(GOOD, {"data.pkl": pickled(GOOD), "byteorder": b"middle", "data/0": DATA}),
    "records_twice": zipped([("a/data.pkl", pickled(GOOD)), ("a/data/0", DATA), ("a/data/0", DATA[::-1])]),
    "records_alike": zipped([("a/data.pkl", pickled(GOOD)), ("a/data/a", DATA), ("a/data/A", DATA[::-1])]),
    "empty_archive": zipped([]),
    "local_header": _SAVED[:_LAST] + b"PK\x03\x05" + _SAVED[_LAST + 4 :],
    "local_name_long": _SAVED[: _LAST + 26] + b"\xff\xff" + _SAVED[_LAST + 28 :],
}.items():
    hostile_bytes(f"archive_{name}.pt", data)

_OLD = legacy(GOOD)
for name, data in {
    "truncated": _OLD[:-5],
    "cut_in_half": _OLD[: len(_OLD) // 2],
    "magic_only": pickled(0x1950A86A20F9469CFC6C),
    "magic_wrong": pickled(1) + _OLD,
    "protocol_wrong": patched(_OLD, pickled(1001), pickled(1002), 1),
    "surplus": _OLD + bytes(3),
    "count_lies": legacy(GOOD, [("0", HUGE, DATA)]),
    "count_negative": legacy(GOOD, [("0", -4, DATA)]),
    "count_short": legacy(GOOD, [("0", 3, DATA)]),
    "key_missing": legacy(GOOD, []),
    "key_foreign": legacy(GOOD, [("0", 4, DATA), ("1", 4, DATA)]),
    "key_twice": legacy(GOOD, [("0", 4, DATA), ("0", 4, DATA)]),
}.items():
    hostile_bytes(f"old_{name}.pt", data)


def plant(name: str, make: Callable[[str], Any]) -> None:
    """Register files whose pickle calls something that makes the planted file."""

    def value(path: Path) -> dict[str, Any]:
        return {**GOOD, "x": make(str(path.parent / PLANTED))}

    hostile(f"{name}.pt")(lambda path: path.write_bytes(archive(value(path))))
    hostile(f"{name}.ckpt")(lambda path: path.write_bytes(legacy(value(path))))
    hostile(f"{name}.bin")(lambda path: path.write_bytes(pickle.dumps(make(str(path.parent / PLANTED)))))


plant("planted_system", lambda target: Calling(os.system, f"touch '{target}'"))
plant("planted_open", lambda target: Calling(open, target, "w"))
plant("planted_exec", lambda target: Calling(builtins.exec, f"open({target!r}, 'w')"))
plant("planted_getattr", lambda target: Calling(builtins.getattr, Calling(builtins.__import__, "os"), "system"))


@hostile("planted_object.npy")
def _(path: Path) -> None:
    with path.open("wb") as file:
        array = np.empty(1, object)
        array[0] = Calling(open, str(path.parent / PLANTED), "w")
        np.save(file, array, allow_pickle=True)
    # The pickle is cut, so that it is refused and not merely skipped.
    path.write_bytes(path.read_bytes()[:90])


# Folders.


def folder_of(files: Mapping[str, Any]) -> Builder:
    def build(path: Path) -> None:
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())

    return build


INDEX = "model.safetensors.index.json"
_SHARD = safetensors({"w": _W}, bytes(8))
_OTHER_SHARD = safetensors({"v": _W}, bytes(8))
for name, files in {
    "without_weights": {"config.json": {}, "notes.txt": b"none"},
    "without_files": {},
    "index_no_json": {INDEX: b"{", "a.safetensors": _SHARD},
    "index_no_text": {INDEX: b"\xff\xfe{", "a.safetensors": _SHARD},
    "index_nested": {INDEX: b"[" * 200_000, "a.safetensors": _SHARD},
    "index_list": {INDEX: [1], "a.safetensors": _SHARD},
    "index_without_map": {INDEX: {"metadata": {}}, "a.safetensors": _SHARD},
    "index_map_list": {INDEX: {"weight_map": ["w"]}, "a.safetensors": _SHARD},
    "index_number": {INDEX: {"weight_map": {"w": 1}}, "a.safetensors": _SHARD},
    "index_above": {INDEX: {"weight_map": {"w": "../surplus.safetensors"}}},
    "index_inside_and_above": {INDEX: {"weight_map": {"w": "a/../../surplus.safetensors"}}},
    "index_absolute": {INDEX: {"weight_map": {"w": "/etc/passwd"}}},
    "index_windows": {INDEX: {"weight_map": {"w": "..\\surplus.safetensors"}}},
    "index_itself": {INDEX: {"weight_map": {"w": "."}}},
    "index_nothing": {INDEX: {"weight_map": {"w": ""}}},
    "index_null": {INDEX: {"weight_map": {"w": "a\0b"}}},
    "index_of_text": {INDEX: {"weight_map": {"w": "a.txt"}}, "a.txt": b"no weights"},
    "index_names_twice": {
        INDEX: b'{"weight_map": {"w": "a.safetensors", "w": "a.safetensors"}}',
        "a.safetensors": _SHARD,
    },
    "shard_missing": {INDEX: {"weight_map": {"w": "a.safetensors"}}},
    "shard_without_tensor": {
        INDEX: {"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}},
        "a.safetensors": _SHARD,
    },
    "shard_broken": {INDEX: {"weight_map": {"w": "a.safetensors"}}, "a.safetensors": _SHARD[:-1]},
    "shards_alike": {"a.safetensors": _SHARD, "b.safetensors": _SHARD},
    "shards_with_a_gap": {"model-00001-of-00003.safetensors": _SHARD, "model-00003-of-00003.safetensors": _OTHER_SHARD},
    "shards_without_the_last": {"model-00001-of-00002.safetensors": _SHARD},
    "shards_of_two_totals": {
        "model-00001-of-00002.safetensors": _SHARD,
        "model-00002-of-00003.safetensors": _OTHER_SHARD,
    },
    "shards_beyond_their_number": {
        "model-00002-of-00002.safetensors": _SHARD,
        "model-00003-of-00002.safetensors": _OTHER_SHARD,
    },
    "shards_of_none": {"model-00000-of-00000.safetensors": _SHARD},
    "indices_two": {"a.safetensors.index.json": {"weight_map": {}}, "b.safetensors.index.json": {"weight_map": {}}},
    "single_broken": {"pytorch_model.bin": archive(_VALUES["repeated"])},
    "single_planted": {"pytorch_model.bin": pickle.dumps(Calling(os.system, "true"))},
}.items():
    hostile(f"folder_{name}")(folder_of(files))


@hostile("folder_index_is_folder")
def _(path: Path) -> None:
    (path / INDEX).mkdir(parents=True)


@hostile("folder_single_loop")
def _(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").symlink_to("model.safetensors")


@hostile("folder_shard_loop")
def _(path: Path) -> None:
    folder_of({INDEX: {"weight_map": {"w": "a.safetensors"}}})(path)
    (path / "a.safetensors").symlink_to("a.safetensors")
