"""Texts as windows of characters, each to be predicted from those before it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import DataError


def read_characters(path: Path, md5: str | None = None) -> tuple[NDArray[np.int64], int]:
    """Return a text as positions in its alphabet, shape (n,), and the size of the alphabet: the text's own characters.

    Raises
    ------
    DataError
        The file can't be read, isn't UTF-8, is empty, or has another MD5.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: isn't UTF-8 text: {error}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise DataError(f"{path}: has the MD5 {found}, not the published {md5}")
    if not text:
        raise DataError(f"{path}: is empty")
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    alphabet, positions = np.unique(points, return_inverse=True)
    return positions.astype(np.int64), len(alphabet)


def windows(characters: NDArray[np.int64], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows that follow one another and what comes next at each of their places, both (n, length), int64.

    Every character but the first is predicted once; fewer than ``length`` are left over at the end.
    """
    count = (len(characters) - 1) // length
    pairs = (characters[start : start + count * length].reshape(count, length) for start in (0, 1))
    inputs, following = (torch.from_numpy(np.ascontiguousarray(values)) for values in pairs)
    return inputs, following
