"""Writing files so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kcomplex.errors import KComplexError

# What no reader takes for a part of a checkpoint in a folder, and may be written anew beside one.
_OWN_SUFFIX = ".kcz"


def refuse_overwriting(target: Path, *sources: object) -> None:
    """Check that a file to be written isn't one of those that it is made of, or in a folder that it is made of.

    In such a folder it may be a new file, or a ``.kcz`` file.

    Raises
    ------
    KComplexError
        It is.
    """
    if not target.exists():
        return
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        folder = Path(source)
        members = (path for path in folder.rglob("*") if path.suffix != _OWN_SUFFIX) if _is_folder(folder) else ()
        if any(_is_same(target, path) for path in (folder, *members)):
            raise KComplexError(f"{target}: writing it would destroy what it is made of: take another name")


def _is_folder(path: Path) -> bool:
    # A recipe is no path.
    with suppress(OSError, ValueError):
        return path.is_dir()
    return False


def _is_same(target: Path, path: Path) -> bool:
    # Neither needs to exist.
    with suppress(OSError, ValueError):
        return target.samefile(path)
    return False


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield another path in the same folder; what is there at the end is removed."""
    other = path.with_name(f"{path.name}.other")
    try:
        yield other
    finally:
        other.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, with the same suffix; on success it takes the place of ``path``.

    The folder is made if it doesn't exist. On an error the temporary file is removed and ``path`` stays as it was.
    """
    if not path.name:
        raise KComplexError("the name of the file to write is empty: give one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
