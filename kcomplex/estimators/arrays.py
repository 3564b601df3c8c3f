"""The arrays of integers that a stage made of others: how many, of which shapes and dtypes, as a stream tells them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np

from kcomplex.errors import StreamError, WeightsError
from kcomplex.estimators.structure import Reader, join_lengths, varint
from kcomplex.estimators.symbols import Shape, Symbols

Form: TypeAlias = tuple[Shape, np.dtype[Any]]

# The usual arrays have a number of their own and are hardly told: one as before; one of uint8 in the former shape; as
# many of those as the former integers have bytes, or, if that is one, a flat one whose length follows. Any others
# follow.
_AS_BEFORE, _BYTES, _BYTE_PLANES, _TOLD = range(4)
FORMS = 4
_BYTE = np.dtype(np.uint8)
_DTYPES = tuple(np.dtype(name) for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"))
# Added to a dtype's number: the shape is the former one; what follows is alike.
_SAME_SHAPE, _ALL_ALIKE = 8, 16
_MOST_ARRAYS = 64
# Stages in a row make at most so many times the bytes, and some, of what the first of them was given.
_MOST_GROWTH, _SMALL = 8, 1 << 12
_first: ContextVar[int | None] = ContextVar("first", default=None)
_MOST_DIMENSIONS = 64


def tell_arrays(arrays: Sequence[Symbols], shape: Shape, dtype: np.dtype[Any]) -> tuple[int, bytes]:
    """Return the number of a form, below `FORMS`, and the bytes that it needs besides.

    Parameters
    ----------
    arrays
        1 to 64, of native integer dtypes.
    shape, dtype
        Of the integers that the arrays were made of.

    Raises
    ------
    WeightsError
        There are none, or too many, or they are too large or of another dtype.
    """
    forms = [_form(array) for array in arrays]
    if not 1 <= len(forms) <= _MOST_ARRAYS or any(own not in _DTYPES for _, own in forms):
        found = ", ".join(f"{own} {own_shape}" for own_shape, own in forms[:3])
        raise WeightsError(
            f"a stage made {len(forms)} arrays ({found}): it may make 1 to {_MOST_ARRAYS} of native integers"
        )
    try:
        _require_size(forms, shape, dtype)
    except StreamError as error:
        raise WeightsError(f"a stage made arrays that can't be told: {error}") from error
    for number in (_AS_BEFORE, _BYTES, _BYTE_PLANES):
        if forms == _usual(number, shape, dtype):
            return number, b""
    if dtype.itemsize == 1 and len(forms) == 1 and forms[0][1] == _BYTE and len(forms[0][0]) == 1:
        return _BYTE_PLANES, varint(forms[0][0][0])
    told = varint(len(forms))
    for place, (own_shape, own_dtype) in enumerate(forms):
        alike = all(form == forms[place] for form in forms[place:])
        same = own_shape == shape
        told += bytes([_DTYPES.index(own_dtype) | (_SAME_SHAPE if same else 0) | (_ALL_ALIKE if alike else 0)])
        if not same:
            told += join_lengths([len(own_shape), *own_shape])
        if alike:
            break
    return _TOLD, told


def read_arrays(number: int, reader: Reader, shape: Shape, dtype: np.dtype[Any]) -> list[Form]:
    """Return shape and dtype of each array that `tell_arrays` told.

    Raises
    ------
    StreamError
        They are more than integers of that shape can have been made into, or none at all.
    """
    forms = _read_forms(number, reader, shape, dtype)
    _require_size(forms, shape, dtype)
    return forms


def _read_forms(number: int, reader: Reader, shape: Shape, dtype: np.dtype[Any]) -> list[Form]:
    if number == _BYTE_PLANES and dtype.itemsize == 1:
        return [(_possible((reader.varint(),), shape), _BYTE)]
    if number != _TOLD:
        return _usual(number, shape, dtype)
    count = reader.varint()
    if not 1 <= count <= _MOST_ARRAYS:
        raise StreamError(f"a stage made {count} arrays of one: the stream is corrupted")
    forms: list[Form] = []
    while len(forms) < count:
        mark = reader.take(1)[0]
        if mark >= 2 * _ALL_ALIKE:
            raise StreamError(f"an array of the unknown dtype {mark}: the stream is corrupted")
        own = shape if mark & _SAME_SHAPE else _read_shape(reader, shape)
        form = own, _DTYPES[mark % len(_DTYPES)]
        forms += [form] * (count - len(forms) if mark & _ALL_ALIKE else 1)
    return forms


@contextmanager
def made_of(size: int) -> Iterator[None]:
    """Let all stages of a block, or of the one around it, make no more than may be made of so many bytes together."""
    token = _first.set(size) if _first.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _first.reset(token)


def require_forms(name: str, arrays: Sequence[Symbols], forms: Sequence[Form]) -> None:
    """Refuse arrays that a stage can't have made.

    Raises
    ------
    StreamError
        Their number, a shape or a dtype is another.
    """
    found = [_form(array) for array in arrays]
    if found != list(forms):
        told = ", ".join(f"{dtype} {shape}" for shape, dtype in found[:3])
        raise StreamError(f"{name}: its arrays can't be {told}: the stream is corrupted")


def _form(array: Symbols) -> Form:
    return array.shape, array.dtype


def _usual(number: int, shape: Shape, dtype: np.dtype[Any]) -> list[Form]:
    if number == _AS_BEFORE:
        return [(shape, dtype)]
    return [(shape, _BYTE)] * (1 if number == _BYTES else dtype.itemsize)


def _read_shape(reader: Reader, shape: Shape) -> Shape:
    dimensions = reader.varint()
    if dimensions > _MOST_DIMENSIONS:
        raise StreamError(f"an array of {dimensions} dimensions: the stream is corrupted")
    return _possible(tuple(reader.varint() for _ in range(dimensions)), shape)


def _possible(own: Shape, shape: Shape) -> Shape:
    """Return a shape after checking that no stage makes more of integers than an array of their bits."""
    if math.prod(max(side, 1) for side in own) > 64 * (math.prod(shape) + 1):
        raise StreamError(f"an array of shape {own} made of {math.prod(shape)} integers: the stream is corrupted")
    return own


def _require_size(forms: Sequence[Form], shape: Shape, dtype: np.dtype[Any]) -> None:
    """Refuse arrays that take much more memory than what they were made of."""
    size = sum(math.prod(own) * kind.itemsize for own, kind in forms)
    first = _first.get()
    before = math.prod(shape) * dtype.itemsize if first is None else first
    if size > _MOST_GROWTH * before + _SMALL:
        raise StreamError(f"arrays of {size} bytes made of {before} bytes: the stream is corrupted")
