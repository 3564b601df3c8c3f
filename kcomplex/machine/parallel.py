"""Threads that keep order and hold little."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from kcomplex.errors import SpecError

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(jobs: object) -> int:
    """Return the number of threads that ``jobs`` stands for: itself, or one a core for -1.

    Raises
    ------
    SpecError
        It isn't a whole number, is 0, or below -1.
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs == 0 or jobs < -1:
        raise SpecError(f"jobs is a number of threads (or -1 for one a core), not {jobs!r:.80}")
    return os.cpu_count() or 1 if jobs == -1 else jobs


def in_order(function: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """Yield `function` of every item in order, from threads; see `thread_count`.

    Items are taken, and results kept, at most two a thread ahead of whoever consumes the results (with one thread, none
    ahead): memory stays bounded however slow that is. Whoever stops early, by Ctrl-C for example, doesn't wait for what
    the threads have in work: the caller's thread runs nothing that couldn't be interrupted.

    Raises
    ------
    SpecError
        ``jobs`` makes no sense.
    """
    return _threaded(function, items, thread_count(jobs))


def _threaded(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    most = 2 * threads if threads > 1 else 1
    pool = ThreadPoolExecutor(threads)
    finished = False
    try:
        for item in items:
            # As the caller would: NumPy's handling of overflow, for one, belongs to a context.
            waiting.append(_submitted(pool, partial(copy_context().run, function, item)))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        finished = True
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, call: Callable[[], Result]) -> Future[Result]:
    try:
        return pool.submit(call)
    except RuntimeError:
        # While the interpreter ends, no thread starts any more.
        done: Future[Result] = Future()
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)
        return done
