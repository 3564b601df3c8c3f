"""An open file whose bytes are read by mapping windows of it into memory."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kcomplex.sources.formats.guard import Refused

# A mapping costs more than a small read, and is one of the 65,530 that Linux allows a process.
_READ_BELOW = 1 << 16


class MappedFile:
    """A file read in windows.

    Windows are private: who writes to one changes neither the file nor another window. Each is mapped by itself, so
    that a checkpoint may be larger than what the system lets a process map writably.

    Parameters
    ----------
    path
        A regular file; it stays open until `close`, or until nothing refers to this object any more.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        self._reading = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def window(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return bytes of the file; nothing is read before they are used, unless they are few.

        Raises
        ------
        Refused
            The file ends before, or is closed.
        """
        self.check(offset, nbytes)
        if not nbytes:
            return np.empty(0, np.uint8)
        if nbytes < _READ_BELOW:
            with self._reading:
                self._file.seek(offset)
                return np.frombuffer(bytearray(self._file.read(nbytes)), np.uint8)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(self._file.fileno(), offset + nbytes - start, access=mmap.ACCESS_COPY, offset=start)
        return np.frombuffer(mapping, np.uint8, nbytes, offset - start)

    def stream(self, limit: int) -> mmap.mmap:
        """Return the first `limit` bytes as a readable stream that allocates no more than there is to read.

        Raises
        ------
        Refused
            The file is empty or closed.
        """
        self.check(0, 0)
        if not self.size:
            raise Refused("the file is empty")
        return mmap.mmap(self._file.fileno(), min(self.size, limit), access=mmap.ACCESS_READ)

    def check(self, offset: int, nbytes: int) -> None:
        """Refuse a window that the file doesn't have.

        Raises
        ------
        Refused
            The file ends before, or is closed.
        """
        if self._file.closed:
            raise Refused("it was closed: open it again to read it")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise Refused(f"truncated: {nbytes:,} bytes at {offset:,} are beyond the file's {self.size:,} bytes")

    def close(self) -> None:
        """Close the file; windows that were given out stay valid."""
        self._file.close()
