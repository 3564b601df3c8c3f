"""What a file is, judged by its first bytes: the question that the readers' ``recognises`` have in common."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Literal, TypeAlias

from kcomplex.sources.formats.guard import Refused

Kind: TypeAlias = Literal["npy", "zip", "pickle", "safetensors", "foreign", "unknown"]

# The safetensors library refuses longer headers; here, they bound every other table of contents too.
MAX_HEADER_BYTES = 100_000_000
_HEAD_BYTES = 512
_OTHER = "give the checkpoint in safetensors, PyTorch or NumPy format that it was made of"
_UNPACK = "compressed or packed: unpack it, and give the checkpoint that was in it"
_PAGE = "a web page or XML, not a checkpoint: the download failed, or needs a login; download the file itself"
# Where a file's first bytes differ from any that is read: their place, what they are, and what the file is.
_FOREIGN: tuple[tuple[int, tuple[bytes, ...], str], ...] = (
    (0, (b"GGUF", b"lmgg", b"fmgg", b"tjgg", b"algg"), f"a GGUF or GGML file, which isn't read: {_OTHER}"),
    (0, (b"\x89HDF\r\n\x1a\n",), f"an HDF5 file, as Keras writes, which isn't read: {_OTHER}"),
    (
        0,
        (b"version https://git-lfs", b"version https://hawser"),
        "a pointer of Git LFS: run `git lfs pull` there",
    ),
    (0, (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--", b"<error"), _PAGE),
    (
        0,
        (b"\x89KCZ\r\n\x1a\n",),
        "a .kcz file: `kcomplex decode FILE -o model.safetensors` gives the checkpoint to measure",
    ),
    (0, (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"), _UNPACK),
    (0, (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a"), _UNPACK),
    (257, (b"ustar",), "a tar file: unpack it, and give the checkpoint that was in it"),
    (4, (b"TFL3",), f"a TensorFlow Lite model, which isn't read: {_OTHER}"),
    (4, (b"ET12",), f"an ExecuTorch program, which isn't read: {_OTHER}"),
    (0, (b"model_checkpoint_path:",), f"the list of a folder of TensorFlow checkpoints, which aren't read: {_OTHER}"),
    (0, (b"SQLite format 3\0",), "a SQLite database; `kcomplex runs FOLDER` reads a run store"),
    (0, (b"PAR1", b"ARROW1", b"Obj\x01"), "a table of data (Parquet, Arrow or Avro), not a checkpoint"),
    (0, (b"MATLAB 5.0",), f"a MATLAB file, which isn't read: {_OTHER}"),
    (0, (b"\x7fELF", b"MZ\x90", b"\xcf\xfa\xed\xfe"), "a program or library of the system, not a checkpoint"),
    (0, (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"%PDF"), "a picture or a document, not a checkpoint"),
    (0, (b"{", b"["), "JSON text: give the folder or the file of weights that it belongs to"),
)
# What ends a zip file, but for its comment; a count of members of 0xFFFF stands for one that doesn't fit.
_END_RECORD_BYTES = 22
_MANY_MEMBERS = 0xFFFF


def kind_of(path: Path) -> Kind:
    """Return what the first bytes of a regular file say: ``foreign`` for what no reader here reads, but is known.

    ``unknown`` for anything else.
    """
    if not path.is_file():
        return "unknown"
    head = _head(path)
    # First, for the length of a safetensors header may begin with the bytes of a pickle's.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head[:1] == b"\x80" and 2 <= int.from_bytes(head[1:2], "little") <= 5:
        return "pickle"
    return "foreign" if _foreign(head) else "unknown"


def foreign_kind(path: Path) -> str:
    """Return what a file is that no reader here reads, and what to give instead; empty where nothing is known."""
    if kind_of(path) == "zip":
        return _foreign_zip(zip_names(path))
    return _foreign(_head(path))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _foreign(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for offset, beginnings, kind in _FOREIGN:
        if head.startswith(beginnings, offset) or (not offset and text.lower().startswith(beginnings)):
            return kind
    # A protocol buffer whose first field is a small version, and whose next is a text: ONNX and TensorFlow graphs.
    if re.match(rb"\x08[\x01-\x14][\x12\x1a\x22\x3a\x42\x7a]", head):
        return f"perhaps an ONNX or TensorFlow graph, which isn't read: {_OTHER}"
    # A map of MessagePack whose first key is a short text: Flax.
    if re.match(rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa1-\xbf]|\xd9.)[A-Za-z_]", head, re.DOTALL):
        return f"MessagePack, as Flax writes it, which isn't read: {_OTHER}"
    if re.match(rb"[0-9]+ [0-9]+\n", head):
        return f"word vectors of word2vec, which aren't read: {_OTHER}"
    return ""


def _foreign_zip(names: list[str]) -> str:
    weights = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".bin", ".h5", ".ckpt", ".npz"))]
    if "model.weights.h5" in names:
        return f"a Keras model, which isn't read: {_OTHER}"
    if any(name.endswith("serialized_state_dict.pt") or name.endswith("/archive_format") for name in names):
        return "a program of torch.export, which isn't read: save the module's state_dict() and give that"
    held = ", ".join(f"{name!r:.100}" for name in (weights or names)[:5])
    return f"a zip file of other files ({held or 'empty or broken'}): unpack it, and give the checkpoint that was in it"


def check_whole(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse a zip file that isn't one archive from the first byte to the last, or that lost members.

    Neither does zipfile notice: of several archives in a file it reads the last.

    Raises
    ------
    Refused
        Something stands before or behind the archive, or its table of contents is shorter than it says.
    """
    members = archive.infolist()
    end = path.stat().st_size - _END_RECORD_BYTES - len(archive.comment)
    with path.open("rb") as file:
        file.seek(max(end, 0))
        record = file.read(_END_RECORD_BYTES)
    count = int.from_bytes(record[10:12], "little")
    if record[:4] != b"PK\x05\x06":
        raise Refused("corrupted: something follows its table of contents")
    if count not in (len(members), _MANY_MEMBERS) or (not members and end > 0):
        raise Refused(f"corrupted: its table of contents lists {len(members)} members, not {count}")
    if members and (first := min(member.header_offset for member in members)):
        raise Refused(
            f"{first:,} bytes stand before the archive: if several objects were saved to one file, save each to a "
            "file of its own"
        )


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
