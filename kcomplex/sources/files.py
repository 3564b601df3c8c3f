"""The file or folder at a path, read by whichever format recognises it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Protocol

from kcomplex.errors import FormatError, PluginError, SourceNotFoundError
from kcomplex.registry import registry
from kcomplex.sources.folders import contents_of, part_of
from kcomplex.sources.formats.content import foreign_kind
from kcomplex.sources.formats.guard import brief
from kcomplex.weights import Weights


class Format(Protocol):
    """A checkpoint format: a class with these two static methods is a reader."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Return whether the path holds this format, judged by content before name, without reading the tensors."""
        ...

    @staticmethod
    def open(path: Path, root: str) -> Weights:
        """Return the weights, reading headers only.

        Where the format nests mappings, `root` is the way to the network in them, keys joined with dots; elsewhere,
        the beginning of the names to be read, for `below`. It is empty where the user gave none.

        Raises
        ------
        FormatError
            The file is truncated, corrupted or hostile.
        """
        ...


def open_path(path: str, root: str = "") -> Weights:
    """Return the weights of a file or folder of any known format.

    Parameters
    ----------
    path
        Of the file or folder.
    root
        The part of a file that is the network: keys joined with dots, at any depth; see `find_network`.

    Raises
    ------
    SourceNotFoundError
        There is nothing at the path.
    FormatError
        No format recognises it, or it is broken.
    """
    if not path:
        raise SourceNotFoundError("the path is empty")
    where = Path(path)
    try:
        status = where.stat()
    # ValueError: a null character in the path.
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if "://" in path:
            raise FormatError(f"{path}: addresses can't be read; download it and give its path here") from error
        raise SourceNotFoundError(f"{path!r}: no such file or folder") from error
    except OSError as error:
        raise FormatError(f"{path}: can't be read: {error.strerror or error}") from error
    # Opening a pipe or a device could wait for ever.
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise FormatError(f"{path}: neither a file nor a folder but a device, pipe or socket")
    if stat.S_ISREG(status.st_mode):
        if status.st_size == 0:
            raise FormatError(f"{path}: the file is empty")
        whole = part_of(where)
        if whole:
            raise FormatError(f"{path}: {whole}")
    formats = registry("kcomplex.formats")
    broken = []
    for name in formats.names():
        try:
            reader: Format = formats.load(name)
        except PluginError as error:
            broken.append(str(error))
            continue
        try:
            if reader.recognises(where):
                return reader.open(where, root)
        except OSError as error:
            raise FormatError(f"{path}: can't be read: {error.strerror or error}") from error
    try:
        what = contents_of(where) if where.is_dir() else foreign_kind(where)
    except OSError as error:
        raise FormatError(f"{path}: can't be read: {error.strerror or error}") from error
    kind = "folder" if where.is_dir() else "file"
    what = what or f"a {kind} of no known format. Known: {', '.join(formats.names())}"
    raise FormatError("; ".join([f"{path}: {brief(what, 700)}", *broken]))
