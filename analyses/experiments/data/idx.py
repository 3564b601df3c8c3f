"""The idx format of MNIST: big-endian header of type and sides, then the elements; plain or gzipped.

Layout (LeCun, Cortes and Burges, the MNIST database): two zero bytes, element type, number of dimensions, each side
as a 32-bit integer, elements in C order. Only unsigned bytes are read, the type of every published image set.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import DataError

_UNSIGNED_BYTE = 8
_MOST_DIMENSIONS = 4
# Deflate makes at most 1032 bytes of one: a header that announces more than that lies.
_DEFLATE_LIMIT = 1032
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, md5: str | None = None) -> NDArray[np.uint8]:
    """Return the array of an idx file of unsigned bytes.

    Parameters
    ----------
    path
        Raw, or gzipped (judged by content).
    md5
        Hexadecimal MD5 that the decompressed file must have; None for any.

    Raises
    ------
    DataError
        The file is missing, isn't idx, is shorter or longer than its header announces, or has another MD5.
        Nothing is allocated before the announced size was checked against the size of the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(2) == _GZIP_MAGIC:
                file.seek(0)
                # GzipFile reads like any binary file, but typeshed doesn't say that it is one.
                with gzip.open(file) as unpacked:
                    return _read(cast("IO[bytes]", unpacked), path, _DEFLATE_LIMIT * size, md5)
            file.seek(0)
            return _read(file, path, size, md5)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip stream is broken ({error}): fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _read(file: IO[bytes], path: Path, most: int, md5: str | None) -> NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(f"{path}: not an idx file: it doesn't begin with two zero bytes and a type")
    kind, dimensions = magic[2], magic[3]
    if kind != _UNSIGNED_BYTE or not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise DataError(f"{path}: an idx file of type {kind} with {dimensions} dimensions, not of unsigned bytes")
    sides = file.read(4 * dimensions)
    if len(sides) < 4 * dimensions:
        raise DataError(f"{path}: ends inside its header")
    shape = tuple(int(side) for side in np.frombuffer(sides, ">u4"))
    count = math.prod(shape)
    if count > most:
        raise DataError(f"{path}: announces {count:,} bytes, which a file of its size can't hold")
    body = file.read(count + 1)
    if len(body) != count:
        what = "holds more than" if len(body) > count else f"holds {len(body):,} of"
        raise DataError(f"{path}: {what} the {count:,} bytes that it announces")
    if md5 is not None:
        found = hashlib.md5(magic + sides + body, usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(f"{path}: its content has MD5 {found}, not the published {md5}: fetch the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)
