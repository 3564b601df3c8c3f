"""A file whose bytes are read on demand, and that is checked to be the same file each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.sources.formats.guard import Refused

_CHUNK_BYTES = 1 << 26


class StoredFile:
    """A file read in windows, each into memory of its own.

    It is open only while a window is read: a folder may have more shards than a process may have open files. It isn't
    mapped into memory either: whoever shortens a mapped file ends every process that looks at it.

    Parameters
    ----------
    path
        A regular file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        with path.open("rb") as file:
            self._identity = _identity(file)
        self.size = self._identity[2]

    def window(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return bytes of the file.

        Raises
        ------
        Refused
            The file ends before, is closed, or isn't the one any more that was opened.
        """
        self.check(offset, nbytes)
        data = np.empty(nbytes, np.uint8)
        done = 0
        with self._same() as file:
            file.seek(offset)
            # One call to the system reads two gigabytes at most.
            while done < nbytes and (count := file.readinto(data[done:].data)):
                done += count
        if done < nbytes:
            raise Refused(f"truncated: {nbytes - done:,} of {nbytes:,} bytes are missing")
        return data

    def elements(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return elements that stand one behind the other, as a flat tensor; see `window`."""
        data = torch.from_numpy(self.window(offset, count * dtype.itemsize))
        # An empty array has no stride that a view takes.
        return data.view(dtype) if count else torch.empty(0, dtype=torch.uint8).view(dtype)

    def chunks(self, offset: int, nbytes: int) -> Iterator[NDArray[np.uint8]]:
        """Yield bytes of the file in pieces of a bounded size."""
        for start in range(offset, offset + nbytes, _CHUNK_BYTES):
            yield self.window(start, min(_CHUNK_BYTES, offset + nbytes - start))

    def head(self, limit: int) -> BytesIO:
        """Return the first bytes, `limit` at most, as a stream."""
        return BytesIO(self.window(0, min(self.size, limit)).data)

    def check(self, offset: int, nbytes: int) -> None:
        """Refuse a window that the file doesn't have.

        Raises
        ------
        Refused
            The file ends before, or is closed.
        """
        if self._closed:
            raise Refused("it was closed: open it again to read it")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise Refused(f"truncated: {nbytes:,} bytes at {offset:,} are beyond the file's {self.size:,} bytes")

    @contextmanager
    def _same(self) -> Iterator[FileIO]:
        """Yield the file, opened; refuse one that was written or replaced since, before or while it is read."""
        with self._path.open("rb", buffering=0) as file:
            try:
                yield file
            finally:
                if _identity(file) != self._identity:
                    raise Refused("it was changed while it was read: open it again")

    def close(self) -> None:
        """Refuse to read any more; what was read stays valid."""
        self._closed = True


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
