"""Folders as Hugging Face's libraries save models: one file, or shards with an index."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from kcomplex.sources.folders import NUMBERED, checkpoints_in
from kcomplex.sources.formats.content import MAX_HEADER_BYTES
from kcomplex.sources.formats.guard import Refused, check_distinct, guarded
from kcomplex.sources.formats.pytorch_file import PyTorchFile
from kcomplex.sources.formats.safetensors_file import SafetensorsFile
from kcomplex.sources.state_dicts import below
from kcomplex.weights import SkippedTensor, TensorHandle, Weights, dtype_name

_SINGLE = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "adapter_model.bin",
)
# What torch.distributed.checkpoint leaves in a folder, beside which single files are not the model.
_DISTRIBUTED = ".metadata"
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")


class HuggingFaceFolder:
    """A folder with an index and shards, a single file of a usual name, or shards without an index.

    Hidden files don't count: they are what a program that was stopped left behind.
    """

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether there is an index, a file of a usual name, or a shard in the folder."""
        return path.is_dir() and not (path / _DISTRIBUTED).exists() and bool(_index_names(path) or _shards(path))

    @staticmethod
    def open(path: Path, root: str = "") -> Weights:
        """Return the weights, reading the index and the headers of the shards only.

        An index goes before a single file, safetensors before pickles.

        Raises
        ------
        FormatError
            A shard is missing (by the index or, without one, by the numbers in the shards' names), broken or outside
            of the folder, the index is broken, or there are several.
        """
        with guarded(path), ExitStack() as stack:
            index = _index(path)
            places = _read_index(index) if index else None
            shards = sorted(set(places.values())) if places is not None else _shards(path)
            _check_complete(shards if places is None else ())
            tensors: list[TensorHandle] = []
            skipped = [
                SkippedTensor(name, "a file that doesn't belong to the model", role="other")
                for name in _strays(path, set(shards))
            ]
            # One file may nest the network in other things; over several, names alone tell what belongs together.
            inner, outer = (root, "") if len(shards) == 1 and places is None else ("", root)
            for shard in shards:
                weights = stack.enter_context(_open_shard(path / shard, inner))
                found, left_out = list(weights.values()), list(weights.skipped)
                if places is not None and index is not None:
                    wanted = {name for name, place in places.items() if place == shard}
                    found, unlisted = _listed(weights, wanted, index.name)
                    left_out += unlisted
                    there = {name for handle in found for name in (handle.name, *handle.aliases)}
                    missing = sorted(wanted - there - {item.name for item in left_out})
                    if missing:
                        raise Refused(f"{index.name} says that {shard} holds {missing[0]!r:.200}, but it doesn't")
                tensors += found
                skipped += left_out
            check_distinct([name for handle in tensors for name in (handle.name, *handle.aliases)])
            resources = stack.pop_all()
        return below(Weights(tensors, skipped, str(path), resources), outer)


def _index_names(folder: Path) -> list[str]:
    """Return the names of the indices, those that count first."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return [name for suffix in _INDEX_SUFFIXES for name in names if name.endswith(suffix)]


def _index(folder: Path) -> Path | None:
    """Return the index that counts, if there is one."""
    names = _index_names(folder)
    rivals = [name for name in names if name.endswith(".bin.index.json") == names[0].endswith(".bin.index.json")]
    if len(rivals) > 1:
        raise Refused(f"several indices ({', '.join(rivals)}): keep the one that counts, or give the path of one file")
    return folder / names[0] if names else None


def _shards(folder: Path) -> list[str]:
    """Return the files of a folder without an index: one of a usual name, safetensors, or numbered pickles."""
    for name in _SINGLE:
        if (folder / name).exists() or (folder / name).is_symlink():
            return [name]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    shards = [name for name in names if name.endswith(".safetensors")]
    return shards or [name for name in names if name.endswith(".bin") and NUMBERED.fullmatch(name)]


def _check_complete(shards: Sequence[str]) -> None:
    """Refuse numbered shards of which some are missing: where there is no index, only their names tell."""
    families: dict[tuple[str, str], dict[int, set[int]]] = {}
    for shard in shards:
        if numbered := NUMBERED.fullmatch(shard):
            before, number, total, after = numbered.groups()
            families.setdefault((before, after), {}).setdefault(int(total), set()).add(int(number))
    for (before, after), totals in families.items():
        pattern = f"{before}-*-of-*{after}"
        if len(totals) > 1:
            raise Refused(f"the shards {pattern!r:.200} disagree about how many they are: {sorted(totals)}")
        [(total, numbers)] = totals.items()
        # Some writers count from zero.
        if len(numbers) != total or (min(numbers), max(numbers)) not in ((1, total), (0, total - 1)):
            found = ", ".join(map(str, sorted(numbers)[:20]))
            raise Refused(
                f"there is no index, and of the {total} shards {pattern!r:.200} only these are there: {found}"
            )


def _strays(folder: Path, shards: set[str]) -> Iterator[str]:
    for path in checkpoints_in(folder):
        name = path.relative_to(folder).as_posix()
        if name not in shards:
            yield name


def _read_index(index: Path) -> dict[str, str]:
    """Return the shard of every tensor, each a path inside the folder."""
    with guarded(index):
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise Refused(f"an index of {index.stat().st_size:,} bytes")
        contents = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
        places = contents.get("weight_map") if isinstance(contents, dict) else None
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise Refused('an index must have a "weight_map" from the names of tensors to the names of files')
        for name, place in places.items():
            if not _inside(place):
                raise Refused(f"{place!r:.200}, where {name!r:.200} should be, isn't a file inside of the folder")
    return places


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_distinct([name for name, _ in pairs])
    return dict(pairs)


def _inside(place: str) -> bool:
    """Return whether a path stays below its folder by its words; links in a cache may still lead elsewhere."""
    paths = PurePosixPath(place), PureWindowsPath(place)
    return place.isprintable() and not any(path.anchor or ".." in path.parts or not path.parts for path in paths)


def _open_shard(shard: Path, root: str) -> Weights:
    with guarded(shard):
        try:
            mode = shard.stat().st_mode
        except FileNotFoundError:
            raise Refused("the shard is missing") from None
        if not stat.S_ISREG(mode):
            raise Refused("the shard isn't a regular file")
        reader = next((reader for reader in (SafetensorsFile, PyTorchFile) if reader.recognises(shard)), None)
        if reader is None:
            raise Refused("neither a safetensors file nor one of torch.save")
    return reader.open(shard, root)


def _listed(weights: Weights, wanted: set[str], index: str) -> tuple[list[TensorHandle], list[SkippedTensor]]:
    """Return the tensors under the names that the index lists for their shard, and the names that it doesn't."""
    kept, skipped = [], []
    for handle in weights.values():
        names = sorted((handle.name, *handle.aliases))
        listed = [name for name in names if name in wanted]
        skipped += [
            SkippedTensor(name, f"not listed in {index}", handle.shape, dtype_name(handle.dtype))
            for name in names
            if name not in wanted
        ]
        if listed:
            kept.append(replace(handle, name=listed[0], aliases=tuple(listed[1:])))
    return kept, skipped
