"""Threads that keep order and hold little."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kcomplex.errors import SpecError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """Yield `function` of every item in order, from threads where ``jobs`` isn't 1; -1 stands for one a core.

    Items are taken, and results kept, at most two a thread ahead of whoever consumes the results: memory stays bounded
    however slow that is.

    Raises
    ------
    SpecError
        ``jobs`` is 0 or below -1.
    """
    if not isinstance(jobs, int) or jobs == 0 or jobs < -1:
        raise SpecError(f"jobs is a number of threads (or -1 for one a core), not {jobs!r}")
    threads = os.cpu_count() or 1 if jobs == -1 else jobs
    return map(function, items) if threads == 1 else _threaded(function, items, threads)


def _threaded(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
