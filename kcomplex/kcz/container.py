"""The ``.kcz`` file: a checkpoint under a code, checked whatever byte is read, decoded tensor by tensor.

A file is eight magic bytes, a version, the side information that tensors share, a stream for each piece of each tensor,
the index (structure, pieces, digests, notes), and a trailer with the index's length and digest. The index stands last,
so that a file is written in one go with no more in memory than the pieces in flight. ``docs/kcz.md`` has every byte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Unpack

import numpy as np
import torch

from kcomplex.errors import (
    KComplexError,
    RefusedStreamError,
    SpecError,
    StreamError,
    UnknownNameError,
    VerificationError,
    WeightsError,
)
from kcomplex.estimators.code import Code, EncodedTensor, Encoding, Memory, Outcome, shortest
from kcomplex.estimators.coder import Coder
from kcomplex.estimators.duplicates import Distinct, distinct_weights, duplicate
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import GivenSource, given_path
from kcomplex.estimators.pieces import Piece, handles_of, joined, piece_limit
from kcomplex.estimators.pipeline import build_decoder, build_encoder
from kcomplex.estimators.quantised import QuantisedCode
from kcomplex.estimators.relative import GivenCode
from kcomplex.estimators.structure import TensorEntry, claimed_bytes
from kcomplex.kcz.index import HEAD, Notes, PieceStream, digest_of, encode_index, read_index
from kcomplex.machine.closing import Closing
from kcomplex.machine.files import beside, open_regular, output_path, path_of, replacing
from kcomplex.machine.limits import require_claim, require_memory
from kcomplex.machine.parallel import in_order, thread_count
from kcomplex.sources.formats.safetensors_file import original_layout, safetensors_header
from kcomplex.sources.open import Choices, Source, opened
from kcomplex.weights import TensorHandle, Weights, Words, squared_error, word_dtype, words_of

Progress = Callable[[TensorHandle], None]


def encode(
    source: Source,
    path: str | os.PathLike[str],
    estimator: str | Estimator | Coder,
    *,
    given: GivenSource | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    partial: bool = False,
    **choices: Unpack[Choices],
) -> int:
    """Write weights as a ``.kcz`` file and return its size in bytes.

    Parameters
    ----------
    source
        Anything that `open_weights` opens; metadata and order are kept of a safetensors file.
    path
        Of the file to write; see `kcomplex.machine.files.replacing`.
    estimator
        Of kind ``code``.
    given
        Weights that the code may use; see `kcomplex.describe`. Decoding needs them again.
    jobs
        Threads; a code that learns from tensor to tensor uses one.
    progress
        Called after each piece: a tensor, or 4 million weights of one.
    partial, choices
        See `kcomplex.describe`.

    Raises
    ------
    WeightsError
        The estimator has no decoder, or there are no weights.
    KComplexError
        The file can't be written, or is one of those that it would be made of.
    """
    thread_count(jobs)
    code = build_encoder(estimator, given)
    known = given_path(code.given) if isinstance(code, GivenCode) else None
    with ExitStack() as stack:
        weights = stack.enter_context(opened(source, partial, **choices))
        if not len(weights):
            raise WeightsError(f"{weights.source}: it holds no tensor that could be encoded")
        temporary = stack.enter_context(replacing(path, source, weights.source, known))
        notes, distinct = _layout_of(source, weights), distinct_weights(weights, code.quantises)

        def written(trial: Code) -> tuple[Path, Outcome]:
            other = stack.enter_context(beside(temporary))
            with other.open("wb") as file, Encoding(trial, weights, distinct) as encoding:
                # Whoever watches sees each tensor once.
                return other, _write(file, encoding, distinct, notes, jobs, progress if trial is code else None)

        shortest(code, written).replace(temporary)
        return temporary.stat().st_size


def _write(
    file: BinaryIO, encoding: Encoding, distinct: Distinct, notes: Notes, jobs: int, progress: Progress | None
) -> Outcome:
    """Write everything; return what came of encoding."""
    file.write(HEAD + encoding.shared)
    digests = bytearray(digest_of(encoding.shared))
    inexact: dict[str, float] = {}

    def streamed(encoded: EncodedTensor) -> tuple[bytes, float | None]:
        return encoded.to_bytes(), None if encoded.exact else encoded.squared_error

    for piece, (stream, error) in encoding.pieces(streamed, jobs):
        file.write(stream)
        digests += digest_of(stream)
        if error is not None:
            inexact[piece.name] = inexact.get(piece.name, 0.0) + error
        if progress is not None:
            progress(piece)
    for name, original in distinct.originals.items():
        if original.name in inexact:
            inexact[name] = inexact[original.name]
    notes = replace(notes, inexact=inexact)
    index = encode_index(encoding.structure(), encoding.limit, bytes(digests), notes)
    file.write(index)
    return encoding.outcome(8.0 * file.tell(), 8.0 * len(index))


class Container(Closing):
    """An open ``.kcz`` file: what it says without decoding, and its tensors one by one.

    Parameters
    ----------
    given
        What the file was encoded with, where that is so; a recipe that it names is never run unasked.
    limit
        Bytes of weights that the file may claim to hold; None for a thousand times its own bytes and 2**30 bytes.

    Attributes
    ----------
    estimator
        Full specification of the code.
    entries
        Name (with aliases), dtype, shape and stream length of every tensor, in the order of the file.
    notes
        Metadata, order and errors of the tensors that aren't exact.

    Raises
    ------
    RefusedStreamError
        It can't be read, is no ``.kcz`` file, or one of another version, made with other weights, or beyond the limit.
    StreamError
        It is truncated or corrupted.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, given: GivenSource | None = None, limit: int | None = None
    ) -> None:
        self.path = path_of(path)
        self._given = given
        self._file = open_regular(self.path)
        self._reading, self._learning = Lock(), Lock()
        # What was read last of a code that learns, and the stream that follows it.
        self._memory: Memory | None = None
        self._next = 0
        try:
            self._open(limit)
        except (StreamError, SpecError, UnknownNameError) as error:
            self._file.close()
            raise type(error)(f"{self.path}: {error}") from error
        except BaseException:
            self._file.close()
            raise

    def _open(self, limit: int | None) -> None:
        index = read_index(self._file)
        self.estimator, self.entries, self.notes = index.spec, index.entries, index.notes
        self._streams, self._limit = index.streams, index.limit
        self._code = build_decoder(index.spec, self._given)
        claimed = claimed_bytes(self.entries, isinstance(self._code, GivenCode))
        require_claim(claimed, os.fstat(self._file.fileno()).st_size, limit)
        self._shared = self._section(*index.shared, "the shared side information")
        most = piece_limit(self._code.divides(self._shared))
        # A quantiser may have looked at tensors whole.
        whole = not index.limit and isinstance(self._code, QuantisedCode)
        if most and not whole and any(item.piece.stop - item.piece.start > most for item in index.streams):
            raise StreamError(f"a piece of more than {most} weights: the file is corrupted")

    def pieces(self, jobs: int = 1) -> Iterator[tuple[TensorEntry, Piece, torch.Tensor]]:
        """Yield every tensor piece by piece, no more of them in memory than are being decoded.

        Tensors that are the same as an earlier one have no pieces: `TensorEntry.original` names it.

        Parameters
        ----------
        jobs
            Threads; a code that learns from tensor to tensor uses one.

        Raises
        ------
        StreamError
            A piece's bytes were changed.
        """
        threads = 1 if self._code.sequential else jobs
        with self._new_memory() as memory:
            decoded = in_order(partial(self._decoded, memory), self._streams, threads)
            for stream, tensor in zip(self._streams, decoded, strict=True):
                yield self.entries[stream.tensor], stream.piece, tensor

    def pieces_of(self, weights: Weights) -> Iterator[TensorHandle]:
        """Yield the pieces of other weights, of the same names and shapes, as `pieces` does those of the file."""
        for entry in self.entries:
            if entry.original is None:
                yield from handles_of(weights[entry.names[0]], self._limit)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor; of a code that learns from tensor to tensor, those before it are decoded first.

        Raises
        ------
        WeightsError
            There is no such tensor.
        StreamError
            Its bytes were changed.
        """
        entry = next((entry for entry in self.entries if name in entry.names), None)
        if entry is None:
            raise WeightsError(f"{self.path}: there is no tensor {name!r}")
        if entry.original is not None:
            original = self.tensor(self.entries[entry.original].names[0])
            return duplicate(original, entry.shape, entry.transposed)
        wanted = [index for index, stream in enumerate(self._streams) if self.entries[stream.tensor] is entry]
        with self._learning:
            memory, begin = self._memory, self._next
            if memory is None or wanted[0] < begin:
                memory, begin = self._new_memory(), 0
            if not self._code.sequential:
                self._memory = memory
                return self._joined(entry, memory, wanted)
            if memory is self._memory:
                # Should one of the streams be damaged, half of it has been learned: that memory is of no more use.
                self._memory = None
            for stream in self._streams[begin : wanted[0]]:
                self._decoded(memory, stream)
            tensor = self._joined(entry, memory, wanted)
            # Of two memories, the one that is further on.
            if self._memory is None or wanted[-1] >= self._next:
                memory, self._memory, self._next = self._memory or memory, memory, wanted[-1] + 1
            if memory is not self._memory:
                memory.close()
            return tensor

    def _new_memory(self) -> Memory:
        try:
            return self._code.memory(self._shared)
        except StreamError as error:
            raise type(error)(f"{self.path}: {error}") from error

    def _joined(self, entry: TensorEntry, memory: Memory, wanted: list[int]) -> torch.Tensor:
        if len(wanted) == 1:
            return self._decoded(memory, self._streams[wanted[0]])
        try:
            require_memory(entry.nbytes + 2 * max(self._streams[index].entry.nbytes for index in wanted))
        except StreamError as error:
            raise type(error)(f"{self.path}: the tensor {entry.names[0]!r} can't be decoded: {error}") from error
        streams = (self._streams[index] for index in wanted)
        return joined(((item.piece, self._decoded(memory, item)) for item in streams), entry.dtype, entry.shape)

    def _decoded(self, memory: Memory, stream: PieceStream) -> torch.Tensor:
        entry = stream.entry
        what = f"the tensor {entry.names[0]!r}"
        try:
            require_memory(2 * entry.nbytes)
            data = self._section(stream.offset, entry.length, stream.digest, what)
            return self._code.decode(entry, data, memory)
        except StreamError as error:
            raise type(error)(f"{self.path}: {what} can't be decoded: {error}") from error
        except MemoryError as error:
            raise RefusedStreamError(f"{self.path}: {what} claims more memory than there is") from error

    def _section(self, offset: int, length: int, digest: bytes, what: str) -> bytes:
        with self._reading:
            self._file.seek(offset)
            data = self._file.read(length)
        if digest_of(data) != digest:
            raise StreamError(f"the bytes of {what} were changed")
        return data

    def close(self) -> None:
        """Close the file, and those of given weights."""
        self._file.close()
        if self._memory is not None:
            self._memory.close()


def decode(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    given: GivenSource | None = None,
    limit: int | None = None,
    jobs: int = 1,
    progress: Callable[[TensorEntry], None] | None = None,
) -> None:
    """Write the tensors of a ``.kcz`` file as a safetensors or a PyTorch file, as the suffix says.

    A safetensors file has the metadata and order of the one that was encoded; tensors with several names are written
    under each of them. It is written piece by piece. A PyTorch file (``.pt``) holds every dtype and name, but no
    metadata; its tensors are all in memory first.

    Parameters
    ----------
    output
        Of the file to write; see `kcomplex.machine.files.replacing`.
    given, limit
        See `Container`.
    jobs
        Threads; a code that learns from tensor to tensor uses one.
    progress
        Called after each tensor.

    Raises
    ------
    StreamError
        The container is truncated or corrupted, or refused; see `Container`.
    WeightsError
        Safetensors files can't hold such a dtype or name.
    KComplexError
        The file can't be written, has another suffix, or is one of those that it would be made of.
    """
    thread_count(jobs)
    write = _WRITERS.get(output_path(output).suffix)
    if write is None:
        raise KComplexError(f"{output}: decode writes {' and '.join(_WRITERS)} files: give it such a name")
    with (
        Container(path, given=given, limit=limit) as container,
        replacing(output, path, given_path(given)) as temporary,
        temporary.open("w+b") as file,
    ):
        write(container, file, jobs, progress or (lambda entry: None))


def _write_safetensors(
    container: Container, file: BinaryIO, jobs: int, progress: Callable[[TensorEntry], None]
) -> None:
    layout = [(name, entry.dtype, entry.shape) for entry in container.entries for name in entry.names]
    header, offsets = safetensors_header(layout, container.notes.metadata, container.notes.order)
    file.write(header)
    for entry, piece, tensor in container.pieces(jobs):
        for name in entry.names:
            file.seek(len(header) + offsets[name] + piece.start * entry.dtype.itemsize)
            file.write(words_of(tensor).data)
        if piece.stop == math.prod(entry.shape):
            progress(entry)
    for entry in container.entries:
        if entry.original is None:
            continue
        original = container.entries[entry.original]
        words = _written(file, len(header) + offsets[original.names[0]], original)
        if entry.transposed:
            words = words.reshape(*original.shape, -1).swapaxes(0, 1)
        for name in entry.names:
            file.seek(len(header) + offsets[name])
            file.write(np.ascontiguousarray(words).data)
        progress(entry)


def _write_pytorch(container: Container, file: BinaryIO, jobs: int, progress: Callable[[TensorEntry], None]) -> None:
    require_memory(sum(entry.nbytes for entry in container.entries))
    found: dict[str, torch.Tensor] = {}
    for entry, parts in groupby(container.pieces(jobs), key=lambda part: part[0]):
        whole = joined(((piece, tensor) for _, piece, tensor in parts), entry.dtype, entry.shape)
        found |= dict.fromkeys(entry.names, whole)
        progress(entry)
    for entry in container.entries:
        if entry.original is not None:
            original = found[container.entries[entry.original].names[0]]
            found |= dict.fromkeys(entry.names, duplicate(original, entry.shape, entry.transposed))
            progress(entry)
    try:
        torch.save({name: found[name] for entry in container.entries for name in entry.names}, file)
    except RuntimeError as error:
        # So it tells that the disk is full.
        raise OSError(str(error)) from error


_WRITERS = {".safetensors": _write_safetensors, ".pt": _write_pytorch}


def _written(file: BinaryIO, offset: int, entry: TensorEntry) -> Words:
    """Return the words of a tensor that was written to a file."""
    file.flush()
    file.seek(offset)
    return np.frombuffer(file.read(entry.nbytes), word_dtype(entry.dtype))


def verify(
    path: str | os.PathLike[str],
    source: Source | None = None,
    *,
    given: GivenSource | None = None,
    limit: int | None = None,
    jobs: int = 1,
    **choices: Unpack[Choices],
) -> float:
    """Decode every tensor of a ``.kcz`` file and return the mean squared error a weight that it says to have.

    Parameters
    ----------
    source
        What was encoded. Names, dtypes, shapes, metadata and order must be the same; tensors that the file calls exact,
        bit for bit; the others must have the squared error that it tells.
    given, limit
        See `Container`.
    choices
        What was chosen of it when it was encoded; see `kcomplex.describe`.

    Raises
    ------
    VerificationError
        Something differs, or the file is truncated or corrupted.
    RefusedStreamError
        The file isn't decoded; see `Container`.
    """
    thread_count(jobs)
    try:
        with Container(path, given=given, limit=limit) as container:
            if source is None:
                for _ in container.pieces(jobs):
                    pass
            else:
                with opened(source, partial=True, **choices) as weights:
                    _compare(container, weights, _layout_of(source, weights), jobs)
            elements = sum(math.prod(entry.shape) for entry in container.entries)
            return sum(container.notes.inexact.values()) / max(elements, 1)
    except RefusedStreamError:
        raise
    except StreamError as error:
        raise VerificationError(str(error)) from error


def _compare(container: Container, weights: Weights, notes: Notes, jobs: int) -> None:
    """Check that a container holds weights, metadata and order; see `verify`."""
    path = container.path
    if list(weights) != [entry.names[0] for entry in container.entries]:
        raise VerificationError(f"{path}: it holds other tensors than {weights.source}")
    if (dict(notes.metadata), notes.order) != (dict(container.notes.metadata), container.notes.order):
        raise VerificationError(f"{path}: it holds other metadata, or another order, than {weights.source}")
    for entry in container.entries:
        handle = weights[entry.names[0]]
        names = (handle.name, *handle.aliases)
        if (handle.dtype, handle.shape, names) != (entry.dtype, entry.shape, entry.names):
            raise _different(path, entry)
    originals = container.pieces_of(weights)
    error = 0.0
    for (entry, piece, tensor), original in zip(container.pieces(jobs), originals, strict=True):
        inexact = container.notes.inexact.get(entry.names[0])
        if inexact is None:
            same = np.array_equal(words_of(original.read()), words_of(tensor))
        else:
            error = squared_error(original.read(), tensor) + (error if piece.start else 0.0)
            same = error == inexact or piece.stop < math.prod(entry.shape)
        if not same:
            raise _different(path, entry)
    for entry in container.entries:
        if entry.original is not None:
            first = weights[container.entries[entry.original].names[0]].read()
            again = duplicate(first, entry.shape, entry.transposed)
            if not np.array_equal(words_of(again), weights[entry.names[0]].words()):
                raise _different(path, entry)


def _different(path: str | os.PathLike[str], entry: TensorEntry) -> VerificationError:
    return VerificationError(f"{path}: the tensor {entry.names[0]!r} isn't what was encoded")


def _layout_of(source: Source | None, weights: Weights) -> Notes:
    """Return metadata and order of a safetensors file; nothing for any other source."""
    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_file():
        return Notes()
    layout = original_layout(Path(source))
    if layout is None:
        return Notes()
    metadata, order = layout
    known = {name for handle in weights.values() for name in (handle.name, *handle.aliases)}
    return Notes(metadata, tuple(name for name in order if name in known))
