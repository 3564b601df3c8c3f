"""Writing files so that a reader sees the old one or the new one, never half of either; and reading regular ones."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kcomplex.errors import KComplexError, RefusedStreamError, SourceNotFoundError

# What no reader takes for a part of a checkpoint in a folder, and may be written anew beside one.
_OWN_SUFFIX = ".kcz"
# Of temporary files, which killed processes leave behind.
PARTIAL_SUFFIX = ".partial"


def path_of(path: object) -> Path:
    """Return a path; whatever else is given is an error of kcomplex.

    Raises
    ------
    KComplexError
        It is neither text nor a path, or holds a null character.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise KComplexError(f"{path!r:.80} is no path: give a text or a pathlib.Path")
    return Path(path)


def output_path(path: object, *sources: object) -> Path:
    """Return the path of a file that may be written: a new one, or one in place of a regular file.

    Parameters
    ----------
    path
        Text or path.
    sources
        What the file is made of. Those that are paths are protected under whatever name, and all that is in folders,
        but for ``.kcz`` files there.

    Raises
    ------
    KComplexError
        The name is empty; a folder, a link, a device or a pipe is there; or it is one of the sources.
    """
    target = path_of(path)
    if not target.name:
        raise KComplexError("the name of the file to write is empty: give one")
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return target
    except OSError as error:
        raise _not_written(target, error) from error
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        where = Path(source)
        members = (file for file in where.rglob("*") if file.suffix != _OWN_SUFFIX) if _is_folder(where) else ()
        if any(_is_same(target, file) for file in (where, *members)):
            raise KComplexError(f"{target}: writing it would destroy what it is made of: take another name")
    if stat.S_ISLNK(mode):
        raise KComplexError(f"{target}: a link isn't written over: give the path that it leads to, or another one")
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"
        raise KComplexError(f"{target}: a {kind} isn't written over: give the path of a file")
    return target


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


def _not_written(target: Path, error: BaseException) -> KComplexError:
    return KComplexError(f"{target}: can't be written: {getattr(error, 'strerror', None) or error}")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a new, empty file in the same folder; what is there at the end is removed.

    It is hidden, has a name that nobody else takes and that no reader of folders looks for, and is no more readable for
    others than a file at the path is.
    """
    other = path.with_name(f".kcomplex-{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    mode = _permissions(path)
    try:
        os.close(
            os.open(
                other,
                os.O_CREAT | os.O_EXCL | os.O_WRONLY,
                0o666 if mode is None else mode | stat.S_IRUSR | stat.S_IWUSR,
            )
        )
        yield other
    finally:
        other.unlink(missing_ok=True)


def _permissions(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
    return None


@contextmanager
def replacing(path: object, *sources: object, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a temporary file in the same folder; on success it takes the place of ``path``, and its permissions.

    The folder is made if it doesn't exist. All is on the disk before the name is given, and the name before the block
    is left: after a power cut, too, the path holds the old file or the new one. On an error the temporary file and the
    folders made for it are removed, and ``path`` stays as it was. A process that is killed leaves a hidden file
    ``.kcomplex-*.partial``, which no reader takes for anything.

    Parameters
    ----------
    path, sources
        See `output_path`.
    failures
        What the library that writes raises, beside OSError, where the disk is full.

    Raises
    ------
    KComplexError
        The path can't be written, or may not be.
    """
    target = output_path(path, *sources)
    made: list[Path] = []
    try:
        for folder in (*reversed(target.parent.parents), target.parent):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        with beside(target) as temporary:
            yield temporary
            _sync(temporary, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
            mode = _permissions(target)
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(output_path(target, *sources))
        if os.name == "posix":
            for folder in {target.parent, *(folder.parent for folder in made)}:
                # The file is written; some file systems can't promise its name.
                with suppress(OSError):
                    _sync(folder, os.O_RDONLY)
    except BaseException as error:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        # An error of kcomplex may be an OSError, too.
        if isinstance(error, (OSError, *failures)) and not isinstance(error, KComplexError):
            raise _not_written(target, error) from error
        raise


def _sync(path: Path, flags: int) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Return a file that is opened for reading.

    Raises
    ------
    SourceNotFoundError
        There is none.
    RefusedStreamError
        It can't be read, or is a folder, a device, or a pipe, which could wait for ever.
    """
    try:
        # Opening a pipe that nobody writes to would wait.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: there is no such file") from error
    # ValueError: a null character.
    except (OSError, ValueError) as error:
        raise RefusedStreamError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedStreamError(f"{path}: it is no regular file, but a folder, device, pipe or socket")
    return os.fdopen(descriptor, "rb")
