"""The end of a ``.kcz`` file: which tensors there are, where their pieces stand, and the digests of all bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from kcomplex.errors import RefusedStreamError, StreamError
from kcomplex.estimators.pieces import Piece, piece_count, pieces_of
from kcomplex.estimators.structure import (
    Reader,
    Structure,
    TensorEntry,
    decode_structure,
    deflated,
    inflated,
    varint,
)

MAGIC = b"\x89KCZ\r\n\x1a\n"
VERSION = 3
HEAD = MAGIC + bytes([VERSION])
_DIGEST = 8
_INDEX_DIGEST = 16
_TRAILER = 8 + _INDEX_DIGEST


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
    entry
        Of the piece as a tensor of its own.
    """

    tensor: int
    piece: Piece
    entry: TensorEntry
    offset: int
    digest: bytes


class Index(NamedTuple):
    """What a file says before anything is decoded.

    Attributes
    ----------
    spec
        Full specification of the code.
    entries, streams
        Of all tensors, and of all their pieces, in order.
    limit
        Weights a piece; 0 for whole tensors.
    shared
        Offset, length and digest of the side information that tensors share.
    """

    spec: str
    entries: tuple[TensorEntry, ...]
    streams: tuple[PieceStream, ...]
    limit: int
    shared: tuple[int, int, bytes]
    notes: Notes


def encode_index(structure: bytes, limit: int, digests: bytes, notes: Notes) -> bytes:
    """Return index and trailer.

    Parameters
    ----------
    limit
        Weights a piece; 0 for whole tensors.
    digests
        Of the shared side information and of every stream, one after another.
    """
    told = {"metadata": dict(notes.metadata), "order": list(notes.order), "inexact": dict(notes.inexact)}
    packed = deflated(json.dumps({key: value for key, value in told.items() if value}).encode())
    index = structure + varint(limit) + digests + packed
    return index + _trailer(HEAD, index)


def read_index(file: BinaryIO) -> Index:
    """Return what a file says of its streams.

    Raises
    ------
    RefusedStreamError
        It is no ``.kcz`` file, or one of another version.
    StreamError
        It is truncated or corrupted.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(len(HEAD))
    version = head[len(MAGIC) :]
    if not head.startswith(MAGIC):
        raise RefusedStreamError("this isn't a .kcz file: it doesn't begin with its magic bytes")
    if not version or version[0] > VERSION:
        raise RefusedStreamError(f"a .kcz file of version {version.hex()}: this kcomplex reads version {VERSION}")
    if version[0] < VERSION:
        raise RefusedStreamError(
            f"a .kcz file of version {version[0]}, which this kcomplex ({VERSION}) no longer reads: decode it with the "
            "kcomplex that wrote it, and encode it anew"
        )
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
    limit = reader.varint()
    _require_pieces(structure, limit, reader)
    shared = (len(HEAD), structure.shared, reader.take(_DIGEST))
    streams, position = [], len(HEAD) + structure.shared
    for place, entry in enumerate(structure.tensors):
        if entry.original is not None:
            continue
        for number, piece in enumerate(pieces_of(entry.shape, limit)):
            told = entry.piece(number, piece.shape)
            streams.append(PieceStream(place, piece, told, position, reader.take(_DIGEST)))
            position += told.length
    if position != end:
        raise StreamError("the file hasn't the length that its index announces")
    notes = _read_notes(reader.rest(), {name for entry in structure.tensors for name in entry.names})
    return Index(structure.spec, structure.tensors, tuple(streams), limit, shared, notes)


def digest_of(data: bytes) -> bytes:
    """Return the digest that a stream is checked by."""
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _require_pieces(structure: Structure, limit: int, reader: Reader) -> None:
    """Refuse an index whose tensors haven't as many streams as pieces.

    Raises
    ------
    StreamError
        They haven't, or there are more of them than digests.
    """
    own = [entry for entry in structure.tensors if entry.original is None]
    total = sum(len(entry.lengths) for entry in own)
    if (total + 1) * _DIGEST > reader.left:
        raise StreamError(f"the index announces {total} pieces in {reader.left} bytes")
    for entry in own:
        if piece_count(entry.shape, limit) != len(entry.lengths):
            raise StreamError(f"the tensor {entry.names[0]!r} isn't in as many pieces as the index announces")


def _read_notes(packed: bytes, names: set[str]) -> Notes:
    text = inflated(packed, "the notes of the file")
    try:
        told: dict[str, Any] = json.loads(text)
        # Escapes make halves of a letter, which no file can be written with.
        json.dumps(told, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise StreamError(f"the notes of the file are corrupted: {error}") from error
    if not isinstance(told, dict):
        raise StreamError("the notes of the file are corrupted")
    metadata, order, inexact = told.get("metadata", {}), told.get("order", []), told.get("inexact", {})
    if not (
        isinstance(metadata, dict)
        and all(isinstance(value, str) for value in metadata.values())
        and isinstance(order, list)
        and all(isinstance(name, str) and name in names for name in order)
        and len(set(order)) == len(order)
        and isinstance(inexact, dict)
        and all(name in names and isinstance(error, float) and error >= 0 for name, error in inexact.items())
    ):
        raise StreamError("the notes of the file are corrupted")
    return Notes(metadata, tuple(order), inexact)


def _trailer(head: bytes, index: bytes) -> bytes:
    length = len(index).to_bytes(8, "little")
    return length + hashlib.blake2b(head + index + length, digest_size=_INDEX_DIGEST).digest()
