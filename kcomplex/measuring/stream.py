"""A checkpoint as one stream of bytes, and back: the proof behind every number of kind ``code``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch

from kcomplex.errors import RefusedStreamError, StreamError, VerificationError, WeightsError
from kcomplex.estimators.code import Code, EncodedTensor, Encoding, Memory, Outcome, shortest
from kcomplex.estimators.coder import Coder
from kcomplex.estimators.description import Description, TensorDescription
from kcomplex.estimators.duplicates import Distinct, distinct_weights, duplicate
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import GivenSource
from kcomplex.estimators.pieces import handles_of, joined, piece_count, piece_limit, pieces_of
from kcomplex.estimators.pipeline import build_decoder, build_encoder
from kcomplex.estimators.relative import GivenCode
from kcomplex.estimators.structure import Reader, TensorEntry, claimed_bytes, decode_structure
from kcomplex.machine.limits import require_claim, require_memory
from kcomplex.sources.open import Choices, Source, opened
from kcomplex.weights import TensorHandle, Weights, squared_error, words_of


def encode_checkpoint(
    source: Source,
    estimator: str | Estimator | Coder,
    *,
    given: GivenSource | None = None,
    partial: bool = False,
    **choices: Unpack[Choices],
) -> bytes:
    """Return the whole stream of weights under a code; eight times its length is what `describe` reports.

    Parameters
    ----------
    given
        Weights that the code may use; see `describe`. Decoding needs them again.
    partial, choices
        See `describe`.

    Raises
    ------
    WeightsError
        The estimator has no decoder (its kind isn't ``code``), or there are no weights.
    """
    code = build_encoder(estimator, given)
    with opened(source, partial, **choices) as weights:
        if not len(weights):
            raise WeightsError(f"{weights.source}: it holds no tensor that could be encoded")
        distinct = distinct_weights(weights, code.quantises)
        return shortest(code, lambda code: _encoded(weights, distinct, code))


def _encoded(weights: Weights, distinct: Distinct, code: Code) -> tuple[bytes, Outcome]:
    with Encoding(code, weights, distinct) as encoding:
        streams = [stream for _, stream in encoding.pieces(EncodedTensor.to_bytes)]
    structure = encoding.structure()
    stream = b"".join([structure, encoding.shared, *streams])
    return stream, encoding.outcome(8.0 * len(stream), 8.0 * len(structure))


def decode_checkpoint(
    data: bytes, *, given: GivenSource | None = None, limit: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a stream by name; tensors with several names appear under each, sharing storage.

    Parameters
    ----------
    given
        What the stream was encoded with, where that is so; a recipe that a stream names is never run unasked.
    limit
        Bytes of weights that the stream may claim to hold; None for a thousand times its own bytes and 2**30 bytes.

    Raises
    ------
    RefusedStreamError
        It is no stream, or one of another version, made with other weights, or beyond the limit.
    StreamError
        The stream is truncated or corrupted.
    UnknownNameError, PluginError
        The estimator that wrote it isn't installed.
    """
    if not isinstance(data, bytes):
        raise RefusedStreamError(f"a stream is bytes, not {type(data).__name__}; kcomplex.decode reads files")
    structure = decode_structure(data)
    code = build_decoder(structure.spec, given)
    position = structure.size + structure.shared
    expected = position + sum(entry.length for entry in structure.tensors)
    if len(data) != expected:
        raise StreamError(f"the stream has {len(data)} bytes where its structure announces {expected}")
    require_claim(claimed_bytes(structure.tensors, isinstance(code, GivenCode)), len(data), limit)
    # The last one may be joined from parts while all others are there.
    sizes = [entry.nbytes for entry in structure.tensors]
    require_memory(sum(sizes) + max(sizes, default=0))
    decoded: list[torch.Tensor] = []
    with code.memory(data[structure.size : position]) as memory:
        for entry in structure.tensors:
            stream = data[position : position + entry.length]
            position += entry.length
            try:
                if entry.original is None:
                    decoded.append(_decoded(code, entry, stream, memory))
                else:
                    decoded.append(duplicate(decoded[entry.original], entry.shape, entry.transposed))
            except StreamError as error:
                raise type(error)(f"the tensor {entry.names[0]!r} can't be decoded: {error}") from error
            except MemoryError as error:
                raise RefusedStreamError(f"the tensor {entry.names[0]!r} claims more memory than there is") from error
    pairs = zip(structure.tensors, decoded, strict=True)
    return {name: tensor for entry, tensor in pairs for name in entry.names}


def _decoded(code: Code, entry: TensorEntry, stream: bytes, memory: Memory) -> torch.Tensor:
    limit = piece_limit(code.divides(memory.shared))
    if piece_count(entry.shape, limit) != len(entry.lengths):
        raise StreamError(f"it is said to be in {len(entry.lengths)} pieces")
    if len(entry.lengths) == 1:
        return code.decode(entry, stream, memory)
    reader = Reader(stream)
    parts = (
        (piece, code.decode(told := entry.piece(place, piece.shape), reader.take(told.length), memory))
        for place, piece in enumerate(pieces_of(entry.shape, limit))
    )
    return joined(parts, entry.dtype, entry.shape)


def prove(source: Source, description: Description, *, given: GivenSource | None = None) -> None:
    """Prove a description of kind ``code``: encode, decode, and compare all that it says with what comes back.

    The stream must have the described bits; names, aliases, dtypes and shapes must come back; tensors that the code
    keeps exactly, bit for bit; of a quantised tensor, the squared error must be the described one.

    Raises
    ------
    VerificationError
        What comes back isn't what was described, or can't be decoded.
    WeightsError
        The estimator has no decoder.
    """
    with opened(source, partial=True) as weights:
        _prove(weights, description, given)


def _prove(weights: Weights, description: Description, given: GivenSource | None) -> None:
    code = build_encoder(description.estimator, given)
    data = encode_checkpoint(weights, code, partial=True)
    known = code.given if isinstance(code, GivenCode) else None
    names = {name for handle in weights.values() for name in (handle.name, *handle.aliases)}
    try:
        decoded = decode_checkpoint(data, given=known, limit=len(names) * weights.nbytes)
    except StreamError as error:
        raise VerificationError(f"{description.estimator}: its own stream can't be decoded: {error}") from error
    if 8 * len(data) != description.bits:
        raise VerificationError(
            f"{description.estimator}: {8 * len(data)} bits where {description.bits} were described"
        )
    if decoded.keys() != names:
        raise VerificationError(f"{description.estimator}: other tensors come back than were encoded")
    # Squared errors are summed piece by piece.
    limits = {entry.names[0]: piece_limit(len(entry.lengths) > 1) for entry in decode_structure(data).tensors}
    for tensor in description.tensors:
        if not _same(weights[tensor.name], decoded, tensor, limits[tensor.name]):
            raise VerificationError(f"{description.estimator}: decoding changed the tensor {tensor.name!r}")


def _same(handle: TensorHandle, decoded: Mapping[str, torch.Tensor], described: TensorDescription, limit: int) -> bool:
    tensor = decoded[handle.name]
    if (tensor.dtype, tuple(tensor.shape)) != (handle.dtype, handle.shape):
        return False
    if described.exact:
        return words_of(tensor).tobytes() == handle.words().tobytes()
    if described.same_as:
        # Sums in another order may differ in their last bits: what is the same has the same error.
        again = duplicate(decoded[described.same_as], handle.shape, described.transposed)
        return words_of(tensor).tobytes() == words_of(again).tobytes()
    parts = zip(handles_of(handle, limit), handles_of(TensorHandle.of("", tensor), limit), strict=True)
    return sum(squared_error(one.read(), other.read()) for one, other in parts) == described.squared_error
