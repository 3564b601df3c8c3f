"""Compilation of the inner loops: one decorator, so that every kernel keeps the same promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba.core import types
from numba.extending import intrinsic

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_PROMISES = {"nogil": True, "cache": True, "error_model": "numpy", "forceinline": True}
# Its stubs lack options that numba documents.
_njit: Callable[..., Any] = numba.njit


def compiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function compiled on its first call; later processes find it in a cache.

    Compiled functions that it calls become a part of it: handing over a model's many arrays takes longer than what is
    done with them. It runs without the interpreter's lock, so that threads run in parallel. Floating-point operations
    are neither reordered nor fused (no ``fastmath``): sums, products, quotients and square roots are those of IEEE 754
    on every machine, which streams rely on. What libraries approximate (``exp``, ``log``) isn't, and must not decide a
    stream.
    """
    return cast(Callable[Parameters, Result], _njit(**_PROMISES)(function))


def compiled_in_place(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function compiled as `compiled` does, but that makes no arrays, nor returns any.

    It doesn't count who uses its arrays: in models that hand many of them around, counting takes as long as the model.
    """
    return cast(Callable[Parameters, Result], _njit(_nrt=False, **_PROMISES)(function))


def inlined(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a part of functions that are `compiled_in_place`: only they can call it, and it compiles sooner."""
    decorate = _njit(_nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_PROMISES)
    return cast(Callable[Parameters, Result], decorate(function))


def _leading_zeros(typing_context: Any, number: Any) -> Any:
    from llvmlite import ir

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), generate


# How many of the highest bits of an int64 are zero: one instruction, for compiled functions only.
leading_zeros = cast(Callable[[int], int], intrinsic(_leading_zeros))
