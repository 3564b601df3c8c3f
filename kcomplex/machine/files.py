"""Writing files so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kcomplex.errors import KComplexError


def refuse_overwriting(target: Path, *sources: object) -> None:
    """Check that a file to be written isn't one of those that it is made of.

    Raises
    ------
    KComplexError
        It is.
    """
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        # Neither needs to exist, and a recipe is no path.
        with suppress(OSError):
            if target.samefile(source):
                raise KComplexError(f"{target}: writing it would destroy what it is made of: take another name")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, with the same suffix; on success it takes the place of ``path``.

    The folder is made if it doesn't exist. On an error the temporary file is removed and ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
