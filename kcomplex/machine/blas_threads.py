"""The threads of the linear-algebra library under NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

from threadpoolctl import ThreadpoolController

_LOCK = RLock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep the library to one thread inside the block.

    For work that is parallel by itself, or on matrices so small that the library's threads wait for each other at every
    product: that makes them many times slower than one on a machine that is busy. The number is the whole process's: of
    two that set it at the same time, the later one would take the other's limit for the original and restore that. So
    one waits for the other.
    """
    with _LOCK, _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> Any:
    # Finding the libraries takes milliseconds; they stay loaded.
    return ThreadpoolController()
