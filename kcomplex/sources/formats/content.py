"""What a file is, judged by its first bytes: the question that the readers' ``recognises`` have in common."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["npy", "zip", "pickle", "safetensors", "unknown"]

# The safetensors library refuses longer headers; here, they bound every other table of contents too.
MAX_HEADER_BYTES = 100_000_000


def kind_of(path: Path) -> Kind:
    """Return what the first bytes of a regular file say; ``unknown`` for anything else."""
    if not path.is_file():
        return "unknown"
    with path.open("rb") as file:
        head = file.read(9)
    # First, for the length of a safetensors header may begin with the bytes of a pickle's.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head[:1] == b"\x80" and 2 <= int.from_bytes(head[1:2], "little") <= 5:
        return "pickle"
    return "unknown"


def zip_names(path: Path) -> list[str]:
    """Return the names of a zip file's members; none where its directory is broken."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    # On hostile bytes zipfile raises more than BadZipFile: UnicodeDecodeError, NotImplementedError, struct.error ...
    # A reader that opens the file by its name says what is wrong with it.
    except Exception:
        return []


def is_torch_archive(names: list[str]) -> bool:
    """Return whether members of a zip file are the records of a torch checkpoint."""
    return any(name.split("/")[1:] == ["data.pkl"] for name in names)
