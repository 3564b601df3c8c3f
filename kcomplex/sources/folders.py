"""Folders and files that are not one checkpoint: what is in them, and which path to give instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

# What checkpoints are called.
CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")
NUMBERED = re.compile(r"(.*)-([0-9]+)-of-([0-9]+)(.*)", re.DOTALL)
# Parts that model-parallel runs write, each with a piece of every tensor: a number alone tells them apart.
_RANKED = re.compile(r"((?:.*[._-])?(?:consolidated\.|mp_rank_|pp_rank_|tp_rank_|rank_?))([0-9]+)(.*)", re.DOTALL)
_DEPTH, _ENTRIES, _TOLD = 3, 2_000, 5
_KINDS = {
    ".metadata": (
        "a folder of torch.distributed.checkpoint: convert it with `python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt` and give model.pt"
    ),
    "zero_to_fp32.py": (
        "a DeepSpeed checkpoint whose weights may be cut over ranks: join them with the script zero_to_fp32.py in it "
        "and give the result"
    ),
    "saved_model.pb": "a TensorFlow SavedModel, which isn't read: save its arrays with numpy.savez and give that",
    "manifest.ocdbt": "an Orbax checkpoint, which isn't read: save its arrays with numpy.savez and give that",
    "_CHECKPOINT_METADATA": "an Orbax checkpoint, which isn't read: save its arrays with numpy.savez and give that",
}


def contents_of(folder: Path) -> str:
    """Return what a folder is that no format reads, and what to give instead; empty where nothing is known."""
    for name, kind in _KINDS.items():
        if (folder / name).exists():
            return kind
    found = list(islice(checkpoints_in(folder), _TOLD + 1))
    if not found:
        return ""
    shown = ", ".join(f"{_place(path)!r:.200}" for path in found[:_TOLD])
    return f"not one checkpoint but a folder that holds some. Give one of: {shown}{' ...' if found[_TOLD:] else ''}"


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder, and in those in it, that are called as checkpoints are; hidden ones aren't."""
    entries = 0
    for place, folders, files in os.walk(folder):
        deep = len(Path(place).relative_to(folder).parts) >= _DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            entries += 1
            if entries > _ENTRIES:
                return
            if name.endswith(CHECKPOINTS) and not name.startswith("."):
                yield Path(place, name)


def part_of(path: Path) -> str:
    """Return of what a file is only a part, judged by its name and those beside it; empty for a whole file."""
    numbered = NUMBERED.fullmatch(path.name)
    if numbered and int(numbered[3][:9]) > 1 and path.name.endswith(CHECKPOINTS):
        return (
            f"one of {int(numbered[3][:9])} shards of a model: give the folder {str(path.parent)!r:.300}, or a copy of "
            "the shard under another name to measure it alone"
        )
    ranked = _RANKED.fullmatch(path.name)
    # Who may read a file may not always list its folder.
    if ranked and os.access(path.parent, os.R_OK):
        others = (_RANKED.fullmatch(name) for name in sorted(entry.name for entry in path.parent.iterdir()))
        parts = [other[0] for other in others if other and (other[1], other[3]) == (ranked[1], ranked[3])]
        if len(parts) > 1:
            return (
                f"one of {len(parts)} parts, such as {parts[-1]!r:.100}, over which every tensor is cut: join them "
                "with the tool of the library that wrote them, or give a copy under another name to measure it alone"
            )
    return ""


def _place(path: Path) -> str:
    """Return the path to give for a file: its folder where the file is a shard or has the usual name of one model."""
    whole = NUMBERED.fullmatch(path.name) or path.stem in ("model", "pytorch_model", "diffusion_pytorch_model")
    return str(path.parent if whole else path)
