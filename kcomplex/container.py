"""The ``.kcz`` file: a checkpoint under a code, checked whatever byte is read, decoded tensor by tensor.

A file is eight magic bytes, a version, the side information that tensors share, a stream for each tensor, the index
(structure, digests, notes), and a trailer with the index's length and digest. The index stands last, so that a file is
written in one go with no more in memory than the tensors in flight.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch

from kcomplex.errors import KComplexError, SourceNotFoundError, StreamError, VerificationError, WeightsError
from kcomplex.estimator import Code, EncodedTensor, Estimator
from kcomplex.files import replacing
from kcomplex.formats.safetensors_file import original_layout, safetensors_header
from kcomplex.given import GivenSource
from kcomplex.pipeline import build_decoder, build_estimator
from kcomplex.structure import Reader, Structure, TensorEntry, decode_structure, encode_structure
from kcomplex.weights import Source, TensorHandle, Weights, open_weights, values_of, words_of

MAGIC = b"\x89KCZ\r\n\x1a\n"
VERSION = 1
_HEAD = MAGIC + bytes([VERSION])
_DIGEST = 8
_INDEX_DIGEST = 16
_TRAILER = 8 + _INDEX_DIGEST
# Deflate makes at most 1032 bytes of one; notes that claim more lie.
_DEFLATE_LIMIT = 1032

Progress = Callable[[TensorHandle], None]


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


def encode_file(
    source: Source,
    path: str | os.PathLike[str],
    estimator: str | Estimator,
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
        Called after each tensor.

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
    try:
        with open_weights(source) as weights, replacing(target) as temporary, temporary.open("wb") as file:
            _write(file, weights, code, _layout_of(source, weights), jobs, progress)
            return file.tell()
    except OSError as error:
        raise KComplexError(f"{target}: can't be written: {error.strerror or error}") from error


def _write(file: BinaryIO, weights: Weights, code: Code, notes: Notes, jobs: int, progress: Progress | None) -> None:
    shared = code.prepare(weights)
    file.write(_HEAD + shared)
    digests = bytearray(_digest(shared))
    lengths, inexact = [], {}
    for handle, encoded in _encoded(weights, code, shared, jobs):
        stream = encoded.to_bytes()
        file.write(stream)
        digests += _digest(stream)
        lengths.append(len(stream))
        if not encoded.exact:
            inexact[handle.name] = encoded.squared_error
        if progress is not None:
            progress(handle)
    told = {"metadata": dict(notes.metadata), "order": list(notes.order), "inexact": inexact}
    packed = zlib.compress(json.dumps({key: value for key, value in told.items() if value}).encode(), 9)
    index = encode_structure(code.full_spec, weights, len(shared), lengths) + bytes(digests) + packed
    file.write(index + _trailer(index))


def _encoded(weights: Weights, code: Code, shared: bytes, jobs: int) -> Iterable[tuple[TensorHandle, EncodedTensor]]:
    coder = code.fresh()
    handles = list(weights.values())
    if code.sequential or jobs == 1 or len(handles) < 2:
        return ((handle, coder.encode_tensor(handle, shared)) for handle in handles)
    from joblib import Parallel, delayed

    pool = Parallel(n_jobs=jobs, prefer="threads", return_as="generator")
    return zip(handles, pool(delayed(coder.encode_tensor)(handle, shared) for handle in handles), strict=True)


class Container:
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
        self._reading = Lock()
        try:
            self._open()
        except StreamError as error:
            self._file.close()
            raise StreamError(f"{self.path}: {error}") from error

    def _open(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(len(_HEAD))
        if not head.startswith(MAGIC):
            raise StreamError("this isn't a .kcz file: it doesn't begin with its magic bytes")
        if head != _HEAD:
            raise StreamError(f"a .kcz file of version {head[-1:].hex()}: this kcomplex reads version {VERSION}")
        if size < len(_HEAD) + _TRAILER:
            raise StreamError("the file is truncated")
        self._file.seek(size - _TRAILER)
        trailer = self._file.read(_TRAILER)
        length = int.from_bytes(trailer[:8], "little")
        if length > size - len(_HEAD) - _TRAILER:
            raise StreamError("the file is truncated or corrupted: its last bytes are no trailer")
        self._file.seek(size - _TRAILER - length)
        index = self._file.read(length)
        if trailer != _trailer(index):
            raise StreamError("the file is truncated or corrupted: its index hasn't the digest that it should have")
        structure: Structure = decode_structure(index)
        reader = Reader(index, structure.size)
        self._digests = [reader.take(_DIGEST) for _ in range(len(structure.tensors) + 1)]
        self.notes = _read_notes(reader.rest())
        self.estimator = structure.spec
        self.entries: tuple[TensorEntry, ...] = structure.tensors
        self._offsets = [len(_HEAD) + structure.shared]
        for entry in self.entries:
            self._offsets.append(self._offsets[-1] + entry.length)
        if self._offsets[-1] != size - _TRAILER - length:
            raise StreamError("the file hasn't the length that its index announces")
        self._code = build_decoder(structure.spec, self._given)
        self._shared = self._section(len(_HEAD), structure.shared, 0, "the shared side information")
        self._decoder, self._next = self._code.fresh(), 0

    def tensors(self, jobs: int = 1) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        """Yield every tensor with its entry, no more of them in memory than are being decoded.

        Parameters
        ----------
        jobs
            Threads; a code that learns from tensor to tensor uses one.

        Raises
        ------
        StreamError
            A tensor's bytes were changed.
        """
        if self._code.sequential or jobs == 1:
            for entry in self.entries:
                yield entry, self.tensor(entry.names[0])
            return
        from joblib import Parallel, delayed

        pool = Parallel(n_jobs=jobs, prefer="threads", return_as="generator")
        decoded = pool(delayed(self._decoded)(index) for index in range(len(self.entries)))
        yield from zip(self.entries, decoded, strict=True)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor; of a code that learns from tensor to tensor, those before it are decoded first.

        Raises
        ------
        WeightsError
            There is no such tensor.
        StreamError
            Its bytes were changed.
        """
        index = next((place for place, entry in enumerate(self.entries) if name in entry.names), None)
        if index is None:
            raise WeightsError(f"{self.path}: there is no tensor {name!r}")
        if not self._code.sequential:
            return self._decoded(index)
        if index < self._next:
            self._decoder, self._next = self._code.fresh(), 0
        while self._next < index:
            self._decoded(self._next)
            self._next += 1
        self._next = index + 1
        return self._decoded(index)

    def _decoded(self, index: int) -> torch.Tensor:
        entry = self.entries[index]
        what = f"the tensor {entry.names[0]!r}"
        try:
            stream = self._section(self._offsets[index], entry.length, index + 1, what)
            return self._decoder.decode_entry(stream, entry, self._shared)
        except (StreamError, MemoryError) as error:
            problem = str(error) or "it claims more memory than there is"
            raise StreamError(f"{self.path}: {what} can't be decoded: {problem}") from error

    def _section(self, offset: int, length: int, place: int, what: str) -> bytes:
        with self._reading:
            self._file.seek(offset)
            data = self._file.read(length)
        if _digest(data) != self._digests[place]:
            raise StreamError(f"the bytes of {what} were changed")
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def decode_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    given: GivenSource | None = None,
    jobs: int = 1,
    progress: Callable[[TensorEntry], None] | None = None,
) -> None:
    """Write the tensors of a ``.kcz`` file as a safetensors file, with the metadata and order of what was encoded.

    Tensors with several names are written under each of them. The file is written tensor by tensor to a temporary
    name, then renamed.

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
    with Container(path, given=given) as container:
        layout = [(name, entry.dtype, entry.shape) for entry in container.entries for name in entry.names]
        header, offsets = safetensors_header(layout, container.notes.metadata, container.notes.order)
        try:
            with replacing(target) as temporary, temporary.open("wb") as file:
                file.write(header)
                for entry, tensor in container.tensors(jobs):
                    for name in entry.names:
                        file.seek(len(header) + offsets[name])
                        file.write(words_of(tensor).data)
                    if progress is not None:
                        progress(entry)
        except OSError as error:
            raise KComplexError(f"{target}: can't be written: {error.strerror or error}") from error


def verify_file(
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
        weights = None if source is None else open_weights(source)
        if weights is not None:
            if list(weights) != [entry.names[0] for entry in container.entries]:
                raise VerificationError(f"{path}: it holds other tensors than {weights.source}")
            notes = _layout_of(source, weights)
            if (dict(notes.metadata), notes.order) != (dict(container.notes.metadata), container.notes.order):
                raise VerificationError(f"{path}: it holds other metadata, or another order, than {weights.source}")
        for entry, tensor in container.tensors(jobs):
            if weights is not None:
                _compare(path, weights[entry.names[0]], entry, tensor, container.notes.inexact)
        elements = sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in container.entries)
        return sum(container.notes.inexact.values()) / max(elements, 1)


def _compare(
    path: str | os.PathLike[str],
    handle: TensorHandle,
    entry: TensorEntry,
    tensor: torch.Tensor,
    inexact: Mapping[str, float],
) -> None:
    same = (handle.dtype, handle.shape, (handle.name, *handle.aliases)) == (entry.dtype, entry.shape, entry.names)
    if same and handle.name in inexact:
        difference = handle.values().astype(np.float64) - values_of(tensor).astype(np.float64)
        same = float(np.square(difference).sum()) == inexact[handle.name]
    elif same:
        same = words_of(tensor).tobytes() == handle.words().tobytes()
    if not same:
        raise VerificationError(f"{path}: the tensor {handle.name!r} isn't what was encoded")


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


def _read_notes(packed: bytes) -> Notes:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(packed, _DEFLATE_LIMIT * max(len(packed), 1))
        told: dict[str, Any] = json.loads(text)
    except (zlib.error, ValueError) as error:
        raise StreamError(f"the notes of the file are corrupted: {error}") from error
    if not inflater.eof or inflater.unused_data or not isinstance(told, dict):
        raise StreamError("the notes of the file are corrupted")
    return Notes(told.get("metadata", {}), tuple(told.get("order", ())), told.get("inexact", {}))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _trailer(index: bytes) -> bytes:
    length = len(index).to_bytes(8, "little")
    return length + hashlib.blake2b(_HEAD + index + length, digest_size=_INDEX_DIGEST).digest()
