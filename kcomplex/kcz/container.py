"""The ``.kcz`` file: a checkpoint under a code, checked whatever byte is read, decoded tensor by tensor.

A file is eight magic bytes, a version, the side information that tensors share, a stream for each piece of each tensor,
the index (structure, pieces, digests, notes), and a trailer with the index's length and digest. The index stands last,
so that a file is written in one go with no more in memory than the pieces in flight. ``docs/kcz.md`` has every byte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import torch

from kcomplex.errors import KComplexError, SourceNotFoundError, StreamError, VerificationError, WeightsError
from kcomplex.estimators.code import Code, EncodedTensor, Memory, Outcome
from kcomplex.estimators.coder import Coder
from kcomplex.estimators.duplicates import Distinct, distinct_weights, duplicate
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import GivenSource, given_path
from kcomplex.estimators.pipeline import build_decoder, build_estimator
from kcomplex.estimators.relative import GivenCode
from kcomplex.estimators.structure import TensorEntry, entries_of
from kcomplex.kcz.index import HEAD, Notes, PieceStream, digest_of, encode_index, read_index
from kcomplex.kcz.pieces import Piece, handles_of
from kcomplex.machine.closing import Closing
from kcomplex.machine.files import beside, refuse_overwriting, replacing
from kcomplex.machine.limits import require_memory
from kcomplex.machine.parallel import in_order
from kcomplex.sources.formats.safetensors_file import original_layout, safetensors_header
from kcomplex.sources.open import Source, opened
from kcomplex.weights import TensorHandle, Weights, Words, squared_error, word_dtype, words_of

# Weights a piece.
_LIMIT = 1 << 22

Progress = Callable[[TensorHandle], None]


def encode(
    source: Source,
    path: str | os.PathLike[str],
    estimator: str | Estimator | Coder,
    *,
    given: GivenSource | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> int:
    """Write weights as a ``.kcz`` file and return its size in bytes.

    Parameters
    ----------
    source
        Anything that `open_weights` opens; metadata and order are kept of a safetensors file.
    path
        Written under a temporary name, then renamed.
    estimator
        Of kind ``code``.
    given
        Weights that the code may use; see `kcomplex.describe`. Decoding needs them again.
    jobs
        Threads; a code that learns from tensor to tensor uses one.
    progress
        Called after each piece: a tensor, or 4 million weights of one.

    Raises
    ------
    WeightsError
        The estimator has no decoder.
    KComplexError
        The file can't be written.
    """
    code = build_estimator(estimator, given)
    if not isinstance(code, Code):
        raise WeightsError(f"{code.spec!r} is of kind {code.kind}: it has no stream that could be decoded")
    target = Path(path)
    refuse_overwriting(target, source, given_path(code.given) if isinstance(code, GivenCode) else None)
    try:
        with opened(source) as weights, replacing(target) as temporary:
            notes, distinct = _layout_of(source, weights), distinct_weights(weights)
            size, outcome = _write(temporary, weights, distinct, code, notes, jobs, progress)
            for rival in code.rivals(outcome):
                with beside(temporary) as other:
                    other_size, _ = _write(other, weights, distinct, rival, notes, jobs, None)
                    if other_size < size:
                        size = other_size
                        other.replace(temporary)
            return size
    except KComplexError:
        # A source that isn't there is an OSError, too.
        raise
    except OSError as error:
        raise KComplexError(f"{target}: can't be written: {error.strerror or error}") from error


def _write(
    path: Path,
    weights: Weights,
    distinct: Distinct,
    code: Code,
    notes: Notes,
    jobs: int,
    progress: Progress | None,
) -> tuple[int, Outcome]:
    """Write a file; return its size in bytes, and what came of encoding."""
    with path.open("wb") as file:
        structure_bits, choices = _write_streams(file, weights, distinct, code, notes, jobs, progress)
        return file.tell(), Outcome(8.0 * file.tell(), structure_bits, choices)


def _write_streams(
    file: BinaryIO,
    weights: Weights,
    distinct: Distinct,
    code: Code,
    notes: Notes,
    jobs: int,
    progress: Progress | None,
) -> tuple[float, tuple[int, ...]]:
    """Write everything; return the bits of the index, and the choices of streams that aren't empty."""
    shared = code.prepare(distinct.weights)
    memory = code.memory(shared)
    file.write(HEAD + shared)
    limit = _LIMIT if code.divisible else 0
    digests = bytearray(digest_of(shared))
    streams: dict[str, list[tuple[int, int]]] = {name: [] for name in distinct.weights}
    inexact: dict[str, float] = {}

    def encode_piece(piece: TensorHandle) -> tuple[TensorHandle, bytes, EncodedTensor]:
        encoded = code.encode(piece, memory)
        return piece, encoded.to_bytes(), encoded

    pieces = (piece for handle in distinct.weights.values() for piece in handles_of(handle, limit))
    for piece, stream, encoded in in_order(encode_piece, pieces, 1 if code.sequential else jobs):
        file.write(stream)
        digests += digest_of(stream)
        streams[piece.name].append((len(stream), encoded.choice))
        if not encoded.exact:
            inexact[piece.name] = encoded.squared_error
        if progress is not None:
            progress(piece)
    for name, original in distinct.originals.items():
        if original.name in inexact:
            inexact[name] = inexact[original.name]
    entries = entries_of(weights, distinct.originals, streams)
    notes = replace(notes, inexact=inexact)
    index = encode_index(code.stream_spec(memory), len(shared), limit, entries, bytes(digests), notes)
    file.write(index)
    return 8.0 * len(index), tuple(choice for told in streams.values() for length, choice in told if length)


class Container(Closing):
    """An open ``.kcz`` file: what it says without decoding, and its tensors one by one.

    Parameters
    ----------
    given
        What the file was encoded with, where that is so; a recipe that it names is never run unasked.

    Attributes
    ----------
    estimator
        Full specification of the code.
    entries
        Name (with aliases), dtype, shape and stream length of every tensor, in the order of the file.
    notes
        Metadata, order and errors of the tensors that aren't exact.
    """

    def __init__(self, path: str | os.PathLike[str], *, given: GivenSource | None = None) -> None:
        self.path = Path(path)
        self._given = given
        try:
            self._file = self.path.open("rb")
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{self.path}: there is no such file") from error
        except OSError as error:
            raise StreamError(f"{self.path}: can't be read: {error.strerror or error}") from error
        self._reading, self._learning = Lock(), Lock()
        try:
            self._open()
        except StreamError as error:
            self._file.close()
            raise StreamError(f"{self.path}: {error}") from error
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        index = read_index(self._file)
        self.estimator, self.entries, self.notes = index.spec, index.entries, index.notes
        self._streams = index.streams
        self._code = build_decoder(index.spec, self._given)
        self._shared = self._section(*index.shared, "the shared side information")
        # What was read last of a code that learns, and the stream that follows it.
        self._memory: Memory | None = None
        self._next = 0

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
        decoded = in_order(partial(self._decoded, self._new_memory()), self._streams, threads)
        for stream, tensor in zip(self._streams, decoded, strict=True):
            yield self.entries[stream.tensor], stream.piece, tensor

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
                self._memory, self._next = memory, wanted[-1] + 1
            return tensor

    def _new_memory(self) -> Memory:
        try:
            return self._code.memory(self._shared)
        except StreamError as error:
            raise StreamError(f"{self.path}: {error}") from error

    def _joined(self, entry: TensorEntry, memory: Memory, wanted: list[int]) -> torch.Tensor:
        if len(wanted) == 1:
            return self._decoded(memory, self._streams[wanted[0]])
        try:
            require_memory(entry.nbytes + 2 * max(self._streams[index].entry.nbytes for index in wanted))
        except StreamError as error:
            raise StreamError(f"{self.path}: the tensor {entry.names[0]!r} can't be decoded: {error}") from error
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        for index in wanted:
            start, stop, _ = self._streams[index].piece
            words = words_of(self._decoded(memory, self._streams[index]))
            data.numpy()[start * entry.dtype.itemsize : stop * entry.dtype.itemsize] = words.view(np.uint8)
        return data.view(entry.dtype).reshape(entry.shape)

    def _decoded(self, memory: Memory, stream: PieceStream) -> torch.Tensor:
        entry = stream.entry
        what = f"the tensor {entry.names[0]!r}"
        try:
            require_memory(2 * entry.nbytes)
            data = self._section(stream.offset, entry.length, stream.digest, what)
            return self._code.decode(entry, data, memory)
        except (StreamError, MemoryError) as error:
            problem = str(error) or "it claims more memory than there is"
            raise StreamError(f"{self.path}: {what} can't be decoded: {problem}") from error

    def _section(self, offset: int, length: int, digest: bytes, what: str) -> bytes:
        with self._reading:
            self._file.seek(offset)
            data = self._file.read(length)
        if digest_of(data) != digest:
            raise StreamError(f"the bytes of {what} were changed")
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def decode(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    given: GivenSource | None = None,
    jobs: int = 1,
    progress: Callable[[TensorEntry], None] | None = None,
) -> None:
    """Write the tensors of a ``.kcz`` file as a safetensors file, with the metadata and order of what was encoded.

    Tensors with several names are written under each of them. The file is written piece by piece to a temporary name,
    then renamed.

    Raises
    ------
    StreamError
        The container is truncated or corrupted.
    WeightsError
        Safetensors has no such dtype.
    KComplexError
        The file can't be written.
    """
    target = Path(output)
    refuse_overwriting(target, path, given_path(given))
    with Container(path, given=given) as container:
        layout = [(name, entry.dtype, entry.shape) for entry in container.entries for name in entry.names]
        header, offsets = safetensors_header(layout, container.notes.metadata, container.notes.order)
        try:
            with replacing(target) as temporary, temporary.open("w+b") as file:
                file.write(header)
                for entry, piece, tensor in container.pieces(jobs):
                    for name in entry.names:
                        file.seek(len(header) + offsets[name] + piece.start * entry.dtype.itemsize)
                        file.write(words_of(tensor).data)
                    if progress is not None and piece.stop == math.prod(entry.shape):
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
                    if progress is not None:
                        progress(entry)
        except KComplexError:
            raise
        except OSError as error:
            raise KComplexError(f"{target}: can't be written: {error.strerror or error}") from error


def _written(file: BinaryIO, offset: int, entry: TensorEntry) -> Words:
    """Return the words of a tensor that was written to a file."""
    file.flush()
    file.seek(offset)
    return np.frombuffer(file.read(entry.nbytes), word_dtype(entry.dtype))


def verify(
    path: str | os.PathLike[str], source: Source | None = None, *, given: GivenSource | None = None, jobs: int = 1
) -> float:
    """Decode every tensor of a ``.kcz`` file and return the mean squared error a weight that it says to have.

    Parameters
    ----------
    source
        What was encoded. Names, dtypes, shapes, metadata and order must be the same; tensors that the file calls exact,
        bit for bit; the others must have the squared error that it tells.

    Raises
    ------
    VerificationError
        Something differs.
    StreamError
        The file is truncated or corrupted.
    """
    with Container(path, given=given) as container:
        if source is None:
            for _ in container.pieces(jobs):
                pass
        else:
            with opened(source) as weights:
                _compare(container, weights, _layout_of(source, weights), jobs)
        elements = sum(math.prod(entry.shape) for entry in container.entries)
        return sum(container.notes.inexact.values()) / max(elements, 1)


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
    original = torch.empty(0)
    for entry, piece, tensor in container.pieces(jobs):
        if not piece.start:
            original = weights[entry.names[0]].read()
        part = original if tensor.shape == original.shape else original.reshape(-1)[piece.start : piece.stop]
        if not _same(part, tensor, container.notes.inexact.get(entry.names[0])):
            raise _different(path, entry)
    for entry in container.entries:
        if entry.original is not None:
            first = weights[container.entries[entry.original].names[0]].read()
            again = duplicate(first, entry.shape, entry.transposed)
            if not _same(again, weights[entry.names[0]].read(), None):
                raise _different(path, entry)


def _same(original: torch.Tensor, decoded: torch.Tensor, error: float | None) -> bool:
    if error is None:
        return np.array_equal(words_of(original), words_of(decoded))
    return squared_error(original, decoded) == error


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
