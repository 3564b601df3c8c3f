"""The structure of a checkpoint as bytes: which tensors there are, and how long each one's stream is.

Every decodable description pays for it, so that its bits give back a whole checkpoint and not loose numbers. What is
alike of all tensors stands together (names, dtypes, shapes, lengths ...), as deflate likes it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kcomplex.errors import RefusedStreamError, StreamError
from kcomplex.estimators.duplicates import Original, can_be_duplicate
from kcomplex.weights import DTYPES, Weights, dtype_name

MAGIC = b"kcx2"
_FIRST_MAGIC = b"kcx1"
# The position is the number in streams: only ever append.
_DTYPE_NAMES = (
    "bfloat16",
    "bool",
    "complex128",
    "complex32",
    "complex64",
    "float16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "int16",
    "int32",
    "int64",
    "int8",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
)
_DTYPE_NUMBERS = {name: number for number, name in enumerate(_DTYPE_NAMES)}
# Added to a dtype's number where the tensor is the same as an earlier one, or as its transpose.
_SAME, _TRANSPOSED = 64, 128
# What is told besides: how many pieces each tensor has (else one); what its code chose for each, or for all of them
# (else nothing).
_PIECES, _CHOICES, _ONE_CHOICE = 1, 2, 4
_MOST_FLAGS = _PIECES | _CHOICES | _ONE_CHOICE
# One less than NumPy has: complex numbers are pairs.
_MOST_DIMENSIONS = 63
# What is deflated further is kept as it is: nobody has to unpack more than so many bytes, or so many times the bytes.
_ALWAYS_UNPACKED, _MOST_UNPACKED = 1 << 20, 32


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in the structure.

    Attributes
    ----------
    names
        Its own, then its aliases.
    dtype, shape
        Of the tensor; of a piece of it, that piece's shape.
    lengths, choices
        Bytes of the stream of each of its pieces, and what its code chose for it (0 to 255); none of a tensor that is
        the same as an earlier one.
    original, transposed
        Position of that earlier tensor, and whether this is its transpose; None for a tensor with streams of its own.
    """

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    lengths: tuple[int, ...] = (0,)
    choices: tuple[int, ...] = (0,)
    original: int | None = None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def length(self) -> int:
        """Bytes of all its streams."""
        return sum(self.lengths)

    @property
    def choice(self) -> int:
        """What its code chose for its first piece."""
        return self.choices[0]

    def piece(self, place: int, shape: tuple[int, ...]) -> TensorEntry:
        """Return the entry of one of its pieces."""
        return replace(self, shape=shape, lengths=(self.lengths[place],), choices=(self.choices[place],))


@dataclass(frozen=True)
class Structure:
    """What a stream says before its payload: the estimator's specification, shared bytes, tensors, its own size."""

    spec: str
    shared: int
    tensors: tuple[TensorEntry, ...]
    size: int


def entries_of(
    weights: Weights, originals: Mapping[str, Original], streams: Mapping[str, Sequence[tuple[int, int]]]
) -> list[TensorEntry]:
    """Return the entries of weights.

    Parameters
    ----------
    originals
        Of the tensors that are the same as an earlier one, by name.
    streams
        Of all others: length in bytes and choice of the stream of each of their pieces, by name.
    """
    places = {name: place for place, name in enumerate(weights)}
    entries = []
    for name, handle in weights.items():
        original, told = originals.get(name), streams.get(name, ())
        entries.append(
            TensorEntry(
                (handle.name, *handle.aliases),
                handle.dtype,
                handle.shape,
                tuple(length for length, _ in told),
                tuple(choice for _, choice in told),
                None if original is None else places[original.name],
                original is not None and original.transposed,
            )
        )
    return entries


def claimed_bytes(entries: Iterable[TensorEntry], relative: bool) -> int:
    """Return the bytes of weights that entries claim to be, under all names.

    Parameters
    ----------
    relative
        Whether what has an empty stream is as somebody gave it.
    """
    return sum(
        len(entry.names) * entry.nbytes
        for entry in entries
        if not relative or entry.length or entry.original is not None
    )


def encode_structure(spec: str, shared: int, entries: Sequence[TensorEntry]) -> bytes:
    """Return the structure's bytes: magic, length, and the deflated table of tensors.

    Parameters
    ----------
    spec
        Specification of the estimator that decodes.
    shared
        Length in bytes of the side information shared by all tensors.
    """
    body = bytearray()
    body += text_bytes(spec)
    own = [entry for entry in entries if entry.original is None]
    counts = [len(entry.lengths) for entry in own]
    choices = [choice for entry in own for choice in entry.choices]
    flags = _PIECES if any(count != 1 for count in counts) else 0
    if any(choices):
        flags |= _ONE_CHOICE if len(set(choices)) == 1 else _CHOICES
    body += join_lengths([shared, flags, len(entries)])
    body += join_lengths(len(entry.names) for entry in entries)
    for entry in entries:
        for name in entry.names:
            body += text_bytes(name)
    for entry in entries:
        marks = 0 if entry.original is None else _SAME | (_TRANSPOSED if entry.transposed else 0)
        body.append(_DTYPE_NUMBERS[dtype_name(entry.dtype)] | marks)
    body += join_lengths(len(entry.shape) for entry in entries)
    body += join_lengths(side for entry in entries for side in entry.shape)
    body += join_lengths(place - entry.original for place, entry in enumerate(entries) if entry.original is not None)
    if flags & _PIECES:
        body += join_lengths(counts)
    body += join_lengths(length for entry in own for length in entry.lengths)
    body += bytes(choices if flags & _CHOICES else choices[:1] if flags & _ONE_CHOICE else [])
    packed = deflated(bytes(body))
    return MAGIC + varint(len(body)) + varint(len(packed)) + packed


def decode_structure(data: bytes) -> Structure:
    """Return the structure at the beginning of a stream.

    Raises
    ------
    RefusedStreamError
        The bytes aren't a stream of kcomplex, or one of another version.
    StreamError
        They are truncated or corrupted.
    """
    if data.startswith(_FIRST_MAGIC):
        raise RefusedStreamError("a stream of version 1, which this kcomplex no longer reads: encode the weights anew")
    if not data.startswith(MAGIC):
        raise RefusedStreamError("this isn't a kcomplex stream: it doesn't begin with its magic bytes")
    outer = Reader(data, len(MAGIC))
    unpacked_size, packed_size = outer.varint(), outer.varint()
    body = inflated(outer.take(packed_size), "the structure of the stream")
    if len(body) != unpacked_size:
        raise StreamError("the structure of the stream hasn't the length that it claims")
    reader = Reader(body)
    spec, shared, flags = reader.text(), reader.varint(), reader.varint()
    if flags > _MOST_FLAGS or (flags & _CHOICES and flags & _ONE_CHOICE):
        raise StreamError(f"the structure of the stream has unknown flags: {flags}")
    # Names, being different, take a byte each however well they are deflated.
    entries = _bare_entries(reader, packed_size)
    own = [place for place, entry in enumerate(entries) if entry.original is None]
    counts = [reader.count() for _ in own] if flags & _PIECES else [1] * len(own)
    # The streams of pieces follow, of a byte or more where there are weights.
    _require_at_most(len(own) + len(data) - outer.position, sum(counts), "pieces")
    lengths = [[reader.varint() for _ in range(count)] for count in counts]
    common = reader.take(1) if flags & _ONE_CHOICE else b"\0"
    choices = [tuple(reader.take(count) if flags & _CHOICES else common * count) for count in counts]
    for place, found, chosen in zip(own, lengths, choices, strict=True):
        entries[place] = replace(entries[place], lengths=tuple(found), choices=chosen)
    if reader.left:
        raise StreamError("the structure of the stream has bytes left over")
    return Structure(spec, shared, tuple(entries), outer.position)


def _bare_entries(reader: Reader, most_names: int) -> list[TensorEntry]:
    """Return the entries in a structure, without the lengths of their streams."""
    total = reader.varint()
    if not total:
        raise StreamError("the structure of the stream announces no tensor: there is nothing in it")
    _require_at_most(most_names, total, "tensors")
    counts = [reader.varint() for _ in range(total)]
    _require_at_most(most_names, sum(counts), "names")
    names = [tuple(reader.text() for _ in range(count)) for count in counts]
    if not all(counts):
        raise StreamError("the structure of the stream has a tensor without a name")
    if len({name for own in names for name in own}) < sum(counts):
        raise StreamError("the structure of the stream gives one name to two tensors")
    marked = reader.take(total)
    dimensions = [reader.varint() for _ in range(total)]
    _require_at_most(_MOST_DIMENSIONS, max(dimensions, default=0), "dimensions")
    shapes = [tuple(reader.varint() for _ in range(count)) for count in dimensions]
    entries: list[TensorEntry] = []
    for place, (own, mark, shape) in enumerate(zip(names, marked, shapes, strict=True)):
        number = mark & ~(_SAME | _TRANSPOSED)
        if number >= len(_DTYPE_NAMES) or (mark & _TRANSPOSED and not mark & _SAME):
            raise StreamError(f"the structure of the stream gives the tensor {own[0]!r} an unknown dtype ({mark})")
        if math.prod(max(side, 1) for side in shape) >= 1 << 60:
            raise StreamError(f"the tensor {own[0]!r} claims the impossible shape {shape}")
        entry = TensorEntry(own, DTYPES[_DTYPE_NAMES[number]], shape)
        if mark & _SAME:
            original = place - reader.varint()
            transposed = bool(mark & _TRANSPOSED)
            if not 0 <= original < place or not _is_original(entries[original], entry, transposed):
                raise StreamError(f"the tensor {own[0]!r} is said to be the same as one that it can't be the same as")
            entry = replace(entry, lengths=(), choices=(), original=original, transposed=transposed)
        entries.append(entry)
    return entries


def _require_at_most(most: int, count: int, what: str) -> None:
    if count > most:
        raise StreamError(f"the structure of the stream announces {count} {what} where there can be {most}")


def _is_original(other: TensorEntry, entry: TensorEntry, transposed: bool) -> bool:
    alike = other.original is None and other.dtype == entry.dtype
    return alike and can_be_duplicate(entry.shape, other.shape, transposed)


def deflated(data: bytes) -> bytes:
    """Return data deflated, but for what would be so short that `inflated` refused it."""
    packed = zlib.compress(data, 9)
    return packed if len(data) <= _most_unpacked(len(packed)) else zlib.compress(data, 0)


def inflated(packed: bytes, what: str) -> bytes:
    """Return what `deflated` was given.

    Raises
    ------
    StreamError
        The bytes are corrupted, or claim to be more than a megabyte and than 32 times themselves; the message names
        ``what`` they are.
    """
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(packed, _most_unpacked(len(packed)) + 1)
    except zlib.error as error:
        raise StreamError(f"{what}: the bytes are corrupted: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise StreamError(f"{what}: {len(packed)} bytes that are corrupted, or claim more than they can hold")
    return data


def _most_unpacked(packed: int) -> int:
    return max(_ALWAYS_UNPACKED, _MOST_UNPACKED * packed)


class Reader:
    """Reads varints, texts and byte strings; refuses to read past the end."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data = data
        self.position = position

    @property
    def left(self) -> int:
        """Bytes that haven't been read."""
        return len(self.data) - self.position

    def take(self, length: int) -> bytes:
        """Return the next bytes.

        Raises
        ------
        StreamError
            There are fewer than that.
        """
        if not 0 <= length <= self.left:
            raise StreamError(f"the stream ends after {self.left} of the {length} bytes that it announces")
        self.position += length
        return self.data[self.position - length : self.position]

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(self.left)

    def varint(self) -> int:
        """Return the next variable-length integer (seven bits a byte, low bits first)."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise StreamError("the stream holds an integer longer than 64 bits")

    def count(self) -> int:
        """Return the next integer as a number of items, each of which takes at least a byte."""
        count = self.varint()
        if count > self.left:
            raise StreamError(f"the stream announces {count} items in {self.left} bytes")
        return count

    def text(self) -> str:
        """Return the next text: length, then UTF-8."""
        try:
            return self.take(self.varint()).decode()
        except UnicodeDecodeError as error:
            raise StreamError("the stream holds a name that isn't UTF-8") from error


def varint(value: int) -> bytes:
    """Return a non-negative integer in seven bits a byte, low bits first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def join_lengths(lengths: Iterable[int]) -> bytes:
    """Return lengths as varints, to stand before pieces of which the last needs no length."""
    return b"".join(varint(length) for length in lengths)


def split_lengths(data: bytes, count: int) -> list[bytes]:
    """Return ``count`` pieces of bytes that begin with the lengths of all but the last.

    Raises
    ------
    StreamError
        The bytes are fewer than the lengths say.
    """
    reader = Reader(data)
    lengths = [reader.varint() for _ in range(count - 1)]
    return [*(reader.take(length) for length in lengths), reader.rest()]


def text_bytes(text: str) -> bytes:
    """Return a text: length, then UTF-8."""
    encoded = text.encode()
    return varint(len(encoded)) + encoded
