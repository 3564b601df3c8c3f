"""Compilation of the inner loops: one decorator, so that every kernel keeps the same promises."""

from __future__ import annotations

import gc
import hashlib
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic
from numpy.typing import ArrayLike

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_PROMISES = {"nogil": True, "cache": True, "error_model": "numpy", "no_cfunc_wrapper": True}
# Its types lack options that numba documents, and all of the caches.
_njit: Callable[..., Any] = numba.njit
_logger = logging.getLogger(__name__)
# The files that each compiled function is made from.
_sources: dict[Dispatcher, frozenset[str]] = {}


def compiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function compiled on its first call; later processes find it in a cache.

    Compiled functions that it calls become a part of it: handing over a model's many arrays takes longer than what is
    done with them. It runs without the interpreter's lock, so that threads run in parallel. Floating-point operations
    are neither reordered nor fused (no ``fastmath``): sums, products, quotients and square roots are those of IEEE 754
    on every machine, which streams rely on. What libraries approximate (``exp``, ``log``) isn't, and must not decide a
    stream.
    """
    return _compiled(function, forceinline=True)


def compiled_in_place(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function compiled as `compiled` does, but that makes no arrays, nor returns any.

    It doesn't count who uses its arrays: in models that hand many of them around, counting takes as long as the model.
    """
    return _compiled(function, _nrt=False, forceinline=True)


def inlined(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a part of functions that are `compiled_in_place`: only they can call it, and it compiles sooner."""
    return _compiled(function, _nrt=False, forceinline=True, no_cpython_wrapper=True)


def called(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return what `inlined` does for a large function with few arguments: compiled once, however often it is called."""
    # Without a word, it would be as its callers are.
    return _compiled(function, _nrt=False, forceinline=False, no_cpython_wrapper=True)


def _compiled(function: Callable[Parameters, Result], **options: bool) -> Callable[Parameters, Result]:
    dispatcher = _njit(**_PROMISES, **options)(function)
    others = (_sources.get(value) for value in function.__globals__.values() if isinstance(value, Dispatcher))
    _sources[dispatcher] = frozenset({__file__, function.__code__.co_filename}).union(*filter(None, others))
    cache = dispatcher._cache
    # By itself, the cache is as old as the function's own file, whatever has changed in those it calls.
    stamp = [numba.__version__, *map(_digest, sorted(_sources[dispatcher]))]
    # Numbers of other files are frozen into it.
    stamp += [f"{name}={value!r}" for name, value in sorted(function.__globals__.items()) if _is_constant(value)]
    cache._cache_file = _FileASignature(cache._cache_path, cache._impl.filename_base, stamp)
    load = cache.load_overload

    def load_or_tell(signature: Any, context: Any) -> Any:
        found = load(signature, context)
        if found is None:
            _tell_once()
        return found

    cache.load_overload = load_or_tell
    compile_for = dispatcher.compile

    def compile_at_once(signature: Any) -> Any:
        with _garbage_left():
            return compile_for(signature)

    dispatcher.compile = compile_at_once
    return cast(Callable[Parameters, Result], dispatcher)


_CacheFile: Any = IndexDataCacheFile


class _FileASignature(_CacheFile):  # type: ignore[misc]
    """Keeps what was compiled for each signature in a file of its own.

    By themselves, these files are numbered in an index. Two processes that compile at the same time overwrite it for
    one another, and a later one is handed what was compiled for other arguments.
    """

    def __init__(self, folder: str, base: str, stamp: Sequence[str]) -> None:
        super().__init__(folder, base, stamp)
        self._prefix = f"{base}.{_short_digest(stamp)}"
        self._older = re.compile(rf"{re.escape(base)}\.[0-9a-f]+\.[0-9a-f]+\.nbc")

    def save(self, key: Any, data: Any) -> None:
        """Keep what was compiled for a signature, where there is room; what was made from other sources goes."""
        with suppress(OSError):
            self._save_data(self._name(key), data)
            for file in Path(self._cache_path).iterdir():
                if self._older.fullmatch(file.name) and not file.name.startswith(self._prefix):
                    file.unlink(missing_ok=True)

    def load(self, key: Any) -> Any:
        """Return what was compiled for a signature; None where there is nothing yet, or half of it."""
        try:
            return self._load_data(self._name(key))
        except (OSError, EOFError, pickle.UnpicklingError):
            return None

    def _name(self, key: Any) -> str:
        return f"{self._prefix}.{_short_digest(key)}.nbc"


def _short_digest(told: object) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Collect no garbage: to look for it takes a tenth of the time of compiling, and there is next to none."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _is_constant(value: object) -> bool:
    return isinstance(value, (bool, int, float, tuple)) and "object at" not in repr(value)


@lru_cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def _tell_once() -> None:
    _logger.info("compiling numerical kernels (once; kept for later runs)")


def record(**fields: ArrayLike) -> np.record:
    """Return numbers and arrays as one record, whose fields functions that are `compiled_in_place` read and write.

    It is handed over as one pointer: many arrays take long to compile and to call with.
    """
    arrays = {name: np.asarray(field) for name, field in fields.items()}
    dtype = np.dtype([(name, array.dtype, array.shape) for name, array in arrays.items()], align=True)
    # Fresh zeros cost nothing until they are used.
    one = np.zeros(1, np.dtype((np.record, dtype)))
    for name, array in arrays.items():
        if array.any():
            one[name] = array
    return cast(np.record, one[0])


def _leading_zeros(typing_context: Any, number: Any) -> Any:
    from llvmlite import ir

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), generate


# How many of the highest bits of an int64 are zero: one instruction, for compiled functions only.
leading_zeros = cast(Callable[[int], int], intrinsic(_leading_zeros))
