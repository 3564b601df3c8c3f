"""Other people's compressors, each from named arrays to bytes and back; this module runs in the peers' environment.

Every stream begins with the arrays' names, dtypes and shapes, so that it is as complete as one of kcomplex.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]


def pack(arrays: Arrays, streams: list[bytes]) -> bytes:
    """Return streams behind a deflated table of arrays and of the streams' lengths."""
    table = [f"{name} {array.dtype.str} {'x'.join(map(str, array.shape))}" for name, array in arrays.items()]
    text = "\n".join([*table, " ".join(str(len(stream)) for stream in streams)])
    head = zlib.compress(text.encode(), 9)
    return b"".join([struct.pack("<H", len(head)), head, *streams])


def unpack(data: bytes) -> tuple[Arrays, list[bytes]]:
    """Return arrays that wait to be filled, and the streams."""
    (size,) = struct.unpack_from("<H", data)
    *table, lengths = zlib.decompress(data[2 : 2 + size]).decode().split("\n")
    arrays = {}
    for line in table:
        name, dtype, shape = line.rsplit(" ", 2)
        arrays[name] = np.empty([int(side) for side in shape.split("x")], dtype)
    ends = 2 + size + np.cumsum([0, *map(int, lengths.split())])
    return arrays, [data[start:end] for start, end in pairwise(ends)]


class Peer(ABC):
    """A compressor of named arrays."""

    @abstractmethod
    def encode(self, arrays: Arrays) -> bytes:
        """Return the stream."""

    @abstractmethod
    def decode(self, stream: bytes) -> Arrays:
        """Return the arrays, bit for bit."""


class Joined(Peer):
    """A compressor that takes the arrays of a set as one long array."""

    def encode(self, arrays: Arrays) -> bytes:
        """Return the stream."""
        return pack(arrays, self.compress(np.concatenate([array.reshape(-1) for array in arrays.values()])))

    def decode(self, stream: bytes) -> Arrays:
        """Return the arrays, bit for bit."""
        arrays, streams = unpack(stream)
        dtype = next(iter(arrays.values())).dtype
        joined = self.decompress(streams, dtype)
        starts = np.cumsum([array.size for array in arrays.values()])[:-1]
        pieces = np.split(joined, starts)
        return {name: piece.reshape(array.shape) for (name, array), piece in zip(arrays.items(), pieces, strict=True)}

    @abstractmethod
    def compress(self, joined: Array) -> list[bytes]:
        """Return one or more streams."""

    @abstractmethod
    def decompress(self, streams: list[bytes], dtype: np.dtype[Any]) -> Array:
        """Return the long array."""


class Bytewise(Joined):
    """A general compressor on the bytes as they lie, or plane by plane: all first bytes, all second bytes ..."""

    planes: ClassVar[bool] = False

    @abstractmethod
    def squeeze(self, data: bytes) -> bytes:
        """Return compressed bytes."""

    @abstractmethod
    def expand(self, data: bytes) -> bytes:
        """Return the bytes again."""

    def compress(self, joined: Array) -> list[bytes]:
        """Return a stream for each plane."""
        if not self.planes:
            return [self.squeeze(joined.tobytes())]
        columns = joined.view(np.uint8).reshape(joined.size, joined.itemsize).T
        return [self.squeeze(column.tobytes()) for column in columns]

    def decompress(self, streams: list[bytes], dtype: np.dtype[Any]) -> Array:
        """Return the long array."""
        columns = [np.frombuffer(self.expand(stream), np.uint8) for stream in streams]
        return columns[0].view(dtype) if len(columns) == 1 else np.stack(columns, axis=1).view(dtype).reshape(-1)


class Lzma(Bytewise):
    """The lzma of Python's library, preset 9 extreme."""

    def squeeze(self, data: bytes) -> bytes:
        """Return compressed bytes."""
        return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)

    def expand(self, data: bytes) -> bytes:
        """Return the bytes again."""
        return lzma.decompress(data)


class Zstd(Bytewise):
    """Zstandard, level 19."""

    def squeeze(self, data: bytes) -> bytes:
        """Return compressed bytes."""
        import zstandard

        return zstandard.ZstdCompressor(level=19).compress(data)

    def expand(self, data: bytes) -> bytes:
        """Return the bytes again."""
        import zstandard

        return zstandard.ZstdDecompressor().decompress(data)


class PlanesZstd(Zstd):
    """Byte planes, each under Zstandard 19."""

    planes: ClassVar[bool] = True


class Brotli(Bytewise):
    """Brotli, quality 11, the largest window."""

    def squeeze(self, data: bytes) -> bytes:
        """Return compressed bytes."""
        import brotli

        return bytes(brotli.compress(data, quality=11, lgwin=24))

    def expand(self, data: bytes) -> bytes:
        """Return the bytes again."""
        import brotli

        return bytes(brotli.decompress(data))


class Zpaq(Bytewise):
    """The program zpaq with its strongest context mixing."""

    def squeeze(self, data: bytes) -> bytes:
        """Return the archive."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "x").write_bytes(data)
            self._run(folder, "a", "a.zpaq", "x", "-m5", "-t1")
            return Path(folder, "a.zpaq").read_bytes()

    def expand(self, data: bytes) -> bytes:
        """Return the bytes again."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "a.zpaq").write_bytes(data)
            self._run(folder, "x", "a.zpaq", "-t1")
            return Path(folder, "x").read_bytes()

    def _run(self, folder: str, *arguments: str) -> None:
        subprocess.run(["zpaq", *arguments], cwd=folder, check=True, capture_output=True)


class Pcodec(Joined):
    """Pcodec, level 12; bfloat16 as 16-bit integers, which it has no type for."""

    def compress(self, joined: Array) -> list[bytes]:
        """Return one stream."""
        from pcodec import ChunkConfig, standalone

        return [standalone.simple_compress(joined, ChunkConfig(compression_level=12, enable_8_bit=True))]

    def decompress(self, streams: list[bytes], dtype: np.dtype[Any]) -> Array:
        """Return the long array."""
        from pcodec import standalone

        return np.asarray(standalone.simple_decompress(streams[0]))


class ZipNN(Joined):
    """ZipNN with one thread; 8-bit integers as 8-bit floats, the only bytes that it knows."""

    NAMES: ClassVar = {"<f4": "float32", "<u2": "bfloat16", "<f2": "float16", "|i1": "float8_e4m3fn"}

    def _codec(self, dtype: np.dtype[Any]) -> Any:
        import zipnn

        return zipnn.ZipNN(bytearray_dtype=self.NAMES[dtype.str], threads=1)

    def compress(self, joined: Array) -> list[bytes]:
        """Return one stream."""
        return [bytes(self._codec(joined.dtype).compress(bytearray(joined.tobytes())))]

    def decompress(self, streams: list[bytes], dtype: np.dtype[Any]) -> Array:
        """Return the long array."""
        return np.frombuffer(self._codec(dtype).decompress(streams[0]), dtype)


class Matrixwise(Peer):
    """A compressor that takes integers matrix by matrix."""

    def encode(self, arrays: Arrays) -> bytes:
        """Return the stream."""
        return pack(arrays, [self.compress(array) for array in arrays.values()])

    def decode(self, stream: bytes) -> Arrays:
        """Return the arrays, bit for bit."""
        arrays, streams = unpack(stream)
        return {name: self.decompress(data, array) for (name, array), data in zip(arrays.items(), streams, strict=True)}

    @abstractmethod
    def compress(self, matrix: Array) -> bytes:
        """Return one stream."""

    @abstractmethod
    def decompress(self, data: bytes, waiting: Array) -> Array:
        """Return the matrix, with the shape and dtype of the waiting one."""


class Constriction(Matrixwise):
    """The range coder of constriction under each matrix's own histogram, which the stream holds as varints."""

    def compress(self, matrix: Array) -> bytes:
        """Return the least value, the number of levels, their counts, and the coded levels."""
        import constriction

        least = int(matrix.min())
        levels = matrix.reshape(-1).astype(np.int32) - least
        counts = np.bincount(levels)
        side = struct.pack("<bB", least, counts.size - 1) + b"".join(map(_varint, counts.tolist()))
        if counts.size == 1:
            return side
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(levels, self._model(counts))
        return side + bytes(encoder.get_compressed().tobytes())

    def decompress(self, data: bytes, waiting: Array) -> Array:
        """Return the matrix."""
        import constriction

        least, last = struct.unpack_from("<bB", data)
        counts, position = _read_varints(data, 2, last + 1)
        if last == 0:
            return np.full_like(waiting, least)
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[position:], np.uint32))
        levels = np.asarray(decoder.decode(self._model(np.array(counts)), waiting.size))
        return (levels + least).astype(waiting.dtype).reshape(waiting.shape)

    def _model(self, counts: NDArray[np.integer[Any]]) -> Any:
        import constriction

        return constriction.stream.model.Categorical(np.maximum(counts, 1e-9) / counts.sum(), perfect=False)


class NNCodec(Matrixwise):
    """NNCodec's arithmetic coder, the shortest of its settings for each matrix (`NNC*`).

    Tried are 10 and 32 unary flags, with and without optimised parameters, by rows and columns; a byte says which won.
    """

    SETTINGS: ClassVar = [
        (unary, optimised, turned) for unary, optimised in ((10, 0), (10, 1), (32, 1)) for turned in (0, 1)
    ]

    def compress(self, matrix: Array) -> bytes:
        """Return the setting and the shortest stream."""
        tried = (bytes([choice]) + self._encoded(matrix, *setting) for choice, setting in enumerate(self.SETTINGS))
        return min(tried, key=len)

    def decompress(self, data: bytes, waiting: Array) -> Array:
        """Return the matrix."""
        from nncodec.extensions import deepCABAC

        unary, _, turned = self.SETTINGS[data[0]]
        levels = np.zeros(waiting.T.shape if turned else waiting.shape, np.int32)
        decoder = deepCABAC.Decoder()
        decoder.setStream(np.frombuffer(data[1:], np.uint8))
        decoder.initCtxModels(unary)
        decoder.decodeLayer(levels, 0, 0, 1, 0, deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8), 0, 0)
        return (levels.T if turned else levels).astype(waiting.dtype)

    def _encoded(self, matrix: Array, unary: int, optimised: int, turned: int) -> bytes:
        from nncodec.extensions import deepCABAC

        levels = np.ascontiguousarray(matrix.T if turned else matrix, np.int32)
        empty_rows = (~levels.any(axis=1)).astype(np.int32)
        encoder = deepCABAC.Encoder()
        encoder.initCtxModels(unary, optimised)
        history = deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8)
        encoder.encodeLayer(levels, 0, 0, 1, 0, int(empty_rows.any()), empty_rows, *history, 0, 0)
        return bytes(np.asarray(encoder.finish()).tobytes())


def _varint(value: int) -> bytes:
    digits = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])


def _read_varints(data: bytes, position: int, count: int) -> tuple[list[int], int]:
    values = []
    for _ in range(count):
        value = shift = 0
        while data[position] & 128:
            value |= (data[position] & 127) << shift
            position, shift = position + 1, shift + 7
        values.append(value | data[position] << shift)
        position += 1
    return values, position


PEERS: dict[str, Callable[[], Peer]] = {
    "NNC*": NNCodec,
    "zpaq-5": Zpaq,
    "brotli-11": Brotli,
    "lzma-9e": Lzma,
    "zstd-19": Zstd,
    "planes+zstd-19": PlanesZstd,
    "pcodec-12": Pcodec,
    "constriction": Constriction,
    "zipnn": ZipNN,
}
# The others take every precision.
INTEGERS_ONLY = ("NNC*", "constriction")
FLOATS_ONLY = ("planes+zstd-19",)
