"""The end of a ``.kcz`` file: which tensors there are, where their pieces stand, and the digests of all bytes."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from kcomplex.errors import StreamError
from kcomplex.estimators.structure import (
    Reader,
    Structure,
    TensorEntry,
    decode_structure,
    encode_structure,
    join_lengths,
    varint,
)
from kcomplex.kcz.pieces import Piece, piece_count, pieces_of
from kcomplex.weights import Weights

MAGIC = b"\x89KCZ\r\n\x1a\n"
VERSION = 2
HEAD = MAGIC + bytes([VERSION])
# In which every tensor is one piece.
_FIRST_VERSION = 1
_DIGEST = 8
_INDEX_DIGEST = 16
_TRAILER = 8 + _INDEX_DIGEST
# Deflate makes at most 1032 bytes of one; notes that claim more lie.
_DEFLATE_LIMIT = 1032


@dataclass(frozen=True)
class Notes:
    """What a container tells beside its tensors.

    Attributes
    ----------
    metadata
        Of the safetensors file that was encoded.
    order
        Names in the order in which that file held their data; empty where it is that of the safetensors library.
    inexact
        Sum of squared errors of each tensor that the code doesn't give back bit for bit.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    inexact: Mapping[str, float] = field(default_factory=dict)


class PieceStream(NamedTuple):
    """Where the stream of a piece stands in the file, and its digest.

    Attributes
    ----------
    tensor
        Position of the piece's tensor among the entries.
    """

    tensor: int
    piece: Piece
    offset: int
    length: int
    digest: bytes


class Index(NamedTuple):
    """What a file says before anything is decoded.

    Attributes
    ----------
    spec
        Full specification of the code.
    entries, streams
        Of all tensors, and of all their pieces, in order.
    shared
        Offset, length and digest of the side information that tensors share.
    """

    spec: str
    entries: tuple[TensorEntry, ...]
    streams: tuple[PieceStream, ...]
    shared: tuple[int, int, bytes]
    notes: Notes


def encode_index(
    spec: str,
    weights: Weights,
    shared: int,
    limit: int,
    lengths: Mapping[str, Sequence[int]],
    digests: bytes,
    notes: Notes,
) -> bytes:
    """Return index and trailer.

    Parameters
    ----------
    shared
        Bytes of the side information that tensors share.
    limit
        Weights a piece; 0 for whole tensors.
    lengths
        Bytes of every piece's stream, by tensor.
    digests
        Of the shared side information and of every stream, one after another.
    """
    told = {"metadata": dict(notes.metadata), "order": list(notes.order), "inexact": dict(notes.inexact)}
    packed = zlib.compress(json.dumps({key: value for key, value in told.items() if value}).encode(), 9)
    structure = encode_structure(spec, weights, shared, map(sum, lengths.values()))
    cuts = join_lengths(length for pieces in lengths.values() for length in pieces[:-1])
    index = structure + varint(limit) + cuts + digests + packed
    return index + _trailer(HEAD, index)


def read_index(file: BinaryIO) -> Index:
    """Return what a file says of its streams.

    Raises
    ------
    StreamError
        It is no ``.kcz`` file, or one of a later version, or truncated or corrupted.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(len(HEAD))
    version = head[len(MAGIC) :]
    if not head.startswith(MAGIC):
        raise StreamError("this isn't a .kcz file: it doesn't begin with its magic bytes")
    if not version or not _FIRST_VERSION <= version[0] <= VERSION:
        raise StreamError(f"a .kcz file of version {version.hex()}: this kcomplex reads versions up to {VERSION}")
    if size < len(HEAD) + _TRAILER:
        raise StreamError("the file is truncated")
    file.seek(size - _TRAILER)
    trailer = file.read(_TRAILER)
    length = int.from_bytes(trailer[:8], "little")
    if length > size - len(HEAD) - _TRAILER:
        raise StreamError("the file is truncated or corrupted: its last bytes are no trailer")
    end = size - _TRAILER - length
    file.seek(end)
    data = file.read(length)
    if trailer != _trailer(head, data):
        raise StreamError("the file is truncated or corrupted: its index hasn't the digest that it should have")
    structure = decode_structure(data)
    reader = Reader(data, structure.size)
    limit = 0 if version[0] == _FIRST_VERSION else reader.varint()
    lengths = _piece_lengths(structure, limit, reader)
    shared = (len(HEAD), structure.shared, reader.take(_DIGEST))
    streams, position = [], len(HEAD) + structure.shared
    for place, entry in enumerate(structure.tensors):
        for piece, taken in zip(pieces_of(entry.shape, limit), lengths[place], strict=True):
            streams.append(PieceStream(place, piece, position, taken, reader.take(_DIGEST)))
            position += taken
    if position != end:
        raise StreamError("the file hasn't the length that its index announces")
    notes = _read_notes(reader.rest(), {name for entry in structure.tensors for name in entry.names})
    return Index(structure.spec, structure.tensors, tuple(streams), shared, notes)


def digest_of(data: bytes) -> bytes:
    """Return the digest that a stream is checked by."""
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _piece_lengths(structure: Structure, limit: int, reader: Reader) -> list[list[int]]:
    """Return the lengths of the streams of every tensor's pieces, which sum to its own.

    Raises
    ------
    StreamError
        There are more pieces than the index has digests, or their streams are longer than the tensor's.
    """
    counts = [piece_count(entry.shape, limit) for entry in structure.tensors]
    if (sum(counts) + 1) * _DIGEST > reader.left:
        raise StreamError(f"the index announces {sum(counts)} pieces in {reader.left} bytes")
    lengths = []
    for entry, count in zip(structure.tensors, counts, strict=True):
        found = [reader.varint() for _ in range(count - 1)]
        if sum(found) > entry.length:
            raise StreamError(f"the pieces of the tensor {entry.names[0]!r} are longer than itself")
        lengths.append([*found, entry.length - sum(found)])
    return lengths


def _read_notes(packed: bytes, names: set[str]) -> Notes:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(packed, _DEFLATE_LIMIT * max(len(packed), 1))
        told: dict[str, Any] = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise StreamError(f"the notes of the file are corrupted: {error}") from error
    if not inflater.eof or inflater.unused_data or not isinstance(told, dict):
        raise StreamError("the notes of the file are corrupted")
    metadata, order, inexact = told.get("metadata", {}), told.get("order", []), told.get("inexact", {})
    if not (
        isinstance(metadata, dict)
        and all(isinstance(value, str) for value in metadata.values())
        and isinstance(order, list)
        and all(isinstance(name, str) and name in names for name in order)
        and len(set(order)) == len(order)
        and isinstance(inexact, dict)
        and all(name in names and isinstance(error, (int, float)) and error >= 0 for name, error in inexact.items())
    ):
        raise StreamError("the notes of the file are corrupted")
    return Notes(metadata, tuple(order), inexact)


def _trailer(head: bytes, index: bytes) -> bytes:
    length = len(index).to_bytes(8, "little")
    return length + hashlib.blake2b(head + index + length, digest_size=_INDEX_DIGEST).digest()
