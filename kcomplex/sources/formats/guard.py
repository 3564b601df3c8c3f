"""The boundary between a file's bytes and kcomplex: whatever goes wrong behind it becomes one `FormatError`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kcomplex.errors import FormatError, KComplexError

# What torch and NumPy can hold: 64 dimensions, and sizes in bytes that fit a signed 64-bit integer.
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = (2**63 - 1) // 16


class Refused(Exception):
    """What is wrong with a file; `guarded` adds which file and tensor."""


@contextmanager
def guarded(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Turn every error of a block, or of a function, into a `FormatError` that names the file and maybe the tensor."""
    where = str(path) if tensor is None else f"{path}: tensor {brief(repr(tensor))}"
    try:
        yield
    except KComplexError:
        raise
    except Refused as error:
        raise FormatError(f"{where}: {brief(str(error), 700)}") from error.__cause__
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise FormatError(f"{where}: can't be read: not enough memory") from error
    # Parsers raise nearly anything on hostile bytes: KeyError, RecursionError, zlib.error, SafetensorError ...
    except Exception as error:
        raise FormatError(f"{where}: can't be read: {brief(str(error)) or type(error).__name__}") from error


def check_shape(shape: Sequence[int]) -> None:
    """Refuse a shape that no tensor can have.

    Raises
    ------
    Refused
        A negative size, more dimensions or more elements than torch and NumPy can address.
    """
    if len(shape) > _MAX_DIMENSIONS:
        raise Refused(f"a shape of {len(shape)} dimensions; at most {_MAX_DIMENSIONS} are possible")
    if any(size < 0 for size in shape):
        raise Refused(f"the shape {brief(str(tuple(shape)))} has a negative size")
    # Sizes beside a zero count too: they overflow strides.
    if math.prod(min(size, _MAX_ELEMENTS + 1) for size in shape if size) > _MAX_ELEMENTS:
        raise Refused(f"the shape {brief(str(tuple(shape)))} has more elements than can be addressed")


def check_distinct(names: Sequence[str]) -> None:
    """Refuse names that occur twice, for readers would disagree about which one counts.

    Raises
    ------
    Refused
        A name occurs twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Refused(f"the name {brief(repr(name))} occurs twice")
        seen.add(name)


def brief(text: str, limit: int = 300) -> str:
    """Return text on one line, cut where a hostile file would flood the terminal."""
    line = " ".join(text[: 2 * limit].split())
    return line if len(line) <= limit else f"{line[:limit]} ..."
