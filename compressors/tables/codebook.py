"""Codebooks of motifs as bytes, their values in the narrowest float that holds them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import StreamError
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape
from kcomplex.weights import Words, tensor_from_words, values_of, word_dtype, words_of

# The position of a dtype is its number in streams: append only.
_FLOATS = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)
_DEFLATED = 128
# Deflate makes at most 1032 bytes of one; a codebook that claims more lies.
_DEFLATE_LIMIT = 1032


def bits_of(values: NDArray[np.floating[Any]]) -> Words:
    """Return the bit patterns of float32 or float64 values, in their shape."""
    words: Words = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    return words


def narrow(values: NDArray[np.floating[Any]]) -> tuple[int, Words]:
    """Return the number of the narrowest float dtype that holds every value bit for bit, and the words in it.

    A checkpoint in a short dtype reaches a quantiser as float32: this gives its own words back, or shorter ones.

    Parameters
    ----------
    values
        float32 or float64, of any shape, which the words have too. Machines differ in what they make of a NaN in
        another dtype: where there is one, the values keep theirs.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    head = tensor.reshape(-1)[:4096]
    shortest = values.dtype.itemsize if bool(tensor.isnan().any()) else 1
    for number, dtype in enumerate(_FLOATS):
        if shortest <= dtype.itemsize <= values.dtype.itemsize and _survives(head, dtype) and _survives(tensor, dtype):
            return number, words_of(tensor.to(dtype)).reshape(values.shape)
    raise AssertionError(f"{values.dtype} isn't a dtype of values")


def widen(number: int, words: NDArray[np.integer[Any]], dtype: np.dtype[Any]) -> NDArray[np.floating[Any]]:
    """Return the values of words that `narrow` made of float32 or float64 values, in that dtype."""
    return values_of(tensor_from_words(words, _FLOATS[number], words.shape)).astype(dtype, copy=False)


def narrow_word_dtype(number: int, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the words that `narrow` made of values of a dtype.

    Raises
    ------
    StreamError
        No dtype has this number, or `narrow` wouldn't have chosen it.
    """
    if number >= len(_FLOATS) or _FLOATS[number].itemsize > dtype.itemsize:
        raise StreamError(f"{number} isn't the number of a float dtype that fits in {dtype}")
    return word_dtype(_FLOATS[number])


def pack_codebook(rows: NDArray[np.floating[Any]]) -> bytes:
    """Return the bytes of a codebook of float32 or float64 rows of shape (k, s), self-delimiting.

    The order of the rows is free to choose: `sorted_rows` is the one that is short. Sorted rows are stored column by
    column in byte planes, the first column as differences, and deflated where that is shorter than the plain words.
    """
    if not len(rows):
        return varint(0)
    number, words = narrow(rows)
    plain = words.astype(words.dtype.newbyteorder("<")).tobytes()
    columns = words.T.copy()
    columns[0, 1:] = words[1:, 0] - words[:-1, 0]
    deflater = zlib.compressobj(9, wbits=-15)
    packed = deflater.compress(_planes(columns)) + deflater.flush()
    packed = varint(len(packed)) + packed
    head = varint(len(rows))
    return head + (bytes([number]) + plain if len(plain) <= len(packed) else bytes([number | _DEFLATED]) + packed)


def sorted_rows(rows: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return rows in the order of their words in the narrowest dtype, the first column first."""
    _, words = narrow(rows)
    return rows[np.lexsort(words.T[::-1])]


def unpack_codebook(reader: Reader, size: int, dtype: np.dtype[Any]) -> NDArray[np.floating[Any]]:
    """Return the rows of shape (k, size) that `pack_codebook` made bytes of, in their dtype.

    Raises
    ------
    StreamError
        The bytes are truncated or corrupted.
    """
    count = reader.varint()
    if not count:
        return np.zeros((0, size), dtype)
    flag = reader.take(1)[0]
    number = flag & ~_DEFLATED
    word = narrow_word_dtype(number, dtype)
    length = count * size * word.itemsize
    if flag & _DEFLATED:
        columns = _from_planes(_inflate(reader.take(reader.varint()), length), (size, count), word)
        columns[0] = np.cumsum(columns[0], dtype=word)
        words = columns.T
    else:
        words = np.frombuffer(reader.take(length), word.newbyteorder("<")).reshape(count, size).astype(word)
    return widen(number, words, dtype)


def _survives(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(_integers(tensor.to(dtype).to(tensor.dtype)), _integers(tensor))


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int64 if tensor.dtype is torch.float64 else torch.int32)


def _planes(words: Words) -> bytes:
    little = words.astype(words.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).view(np.uint8).reshape(len(words), -1, words.itemsize).swapaxes(1, 2).tobytes()


def _from_planes(data: bytes, shape: Shape, word: np.dtype[Any]) -> Words:
    planes = np.frombuffer(data, np.uint8).reshape(shape[0], word.itemsize, shape[1])
    little = np.ascontiguousarray(planes.swapaxes(1, 2)).view(word.newbyteorder("<"))
    return little.reshape(shape).astype(word)


def _inflate(packed: bytes, length: int) -> bytes:
    if length > _DEFLATE_LIMIT * max(len(packed), 1):
        raise StreamError(f"the codebook claims {length} bytes in {len(packed)}: the stream is corrupted")
    inflater = zlib.decompressobj(wbits=-15)
    try:
        data = inflater.decompress(packed, length + 1)
    except zlib.error as error:
        raise StreamError(f"the codebook is corrupted: {error}") from error
    if len(data) != length or not inflater.eof or inflater.unused_data:
        raise StreamError("the codebook hasn't the length that it claims")
    return data
