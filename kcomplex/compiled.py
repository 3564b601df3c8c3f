"""Compilation of the inner loops: one decorator, so that every kernel keeps the same promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def compiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function compiled on its first call; later processes find it in a cache.

    It runs without the interpreter's lock, so that threads run in parallel. Floating-point operations are neither
    reordered nor fused (no ``fastmath``): sums, products, quotients and square roots are those of IEEE 754 on every
    machine, which streams rely on. What libraries approximate (``exp``, ``log``) isn't, and must not decide a stream.
    """
    kernel: Callable[Parameters, Result] = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    return kernel
