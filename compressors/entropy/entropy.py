"""Zero-order entropy: a code that reaches it, table included, and the plug-in estimate that pays for no table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.coder import Coder, Part
from kcomplex.estimators.description import STRUCTURE, Kind
from kcomplex.estimators.length import CodeLength
from kcomplex.estimators.structure import Reader, varint
from kcomplex.estimators.symbols import Shape, Symbols

from ..tables.alphabet import alphabet, decode_alphabet, encode_alphabet, positions
from ..tables.words import byte_size, from_bytes, to_bytes
from .counts import decode_counts, encode_counts
from .packing import bits_needed, pack, packed_size, unpack

# The first byte of a stream: how many bits a packed symbol takes (0 to 64), or this.
_MODELLED = 255
_MOST_BITS = 64
# Beyond this many distinct symbols a table of frequencies never pays.
_LARGEST_ALPHABET = 1 << 16
# A range or ANS coder ends on a word of 32 bits.
_CODER_WORD = np.dtype("<u4")

Indices = NDArray[np.int32]


@dataclass(frozen=True)
class Entropy(Coder):
    """Codes every symbol by its frequency in the tensor, whatever stands around it.

    The stream is the shortest of three: alphabet, frequencies and the payload of a range or ANS coder; the smallest
    symbol and every symbol's distance from it in a fixed number of bits (0 for a constant tensor); the plain words,
    told from the others by their length. So tiny tensors and random words never cost more than their size.

    Parameters
    ----------
    coder
        ``range``: range coding (Martin, "Range encoding", 1979); ``ans``: asymmetric numeral systems (Duda,
        "Asymmetric numeral systems", arXiv:1311.2540, 2013). Lengths differ by a few bytes.

    Raises
    ------
    SpecError
        The coder is neither.

    Notes
    -----
    Encoder and decoder build the coder's probabilities from the same integers by the same sums and one division in
    IEEE double precision, so that a stream can be read on another machine.
    """

    coder: Literal["range", "ans"] = "range"
    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        if self.coder not in ("range", "ans"):
            raise SpecError(f"entropy: coder must be range or ans, not {self.coder!r}")

    def encode(self, symbols: Symbols) -> bytes:
        """Return the shortest stream; none at all without symbols."""
        return b"".join(part.data for part in self.encode_parts(symbols))

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return the stream's first byte (structure), alphabet and frequencies (tables) and payload."""
        if not symbols.size:
            return []
        bits = bits_needed(symbols)
        plain, packed = byte_size(symbols.shape, symbols.dtype), 1 + packed_size(symbols.size, bits, symbols.dtype)
        modelled = self._modelled(symbols, min(plain, packed))
        if modelled is not None:
            return modelled
        if packed < plain:
            return [Part(STRUCTURE, bytes([bits])), Part("payload", pack(symbols, bits))]
        return [Part("payload", to_bytes(symbols))]

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the symbols; see `Coder.decode`."""
        if not data or len(data) >= byte_size(shape, dtype):
            return from_bytes(data, shape, dtype)
        if data[0] <= _MOST_BITS:
            return unpack(data[1:], data[0], shape, dtype)
        if data[0] != _MODELLED:
            raise StreamError(f"entropy: a stream can't begin with {data[0]}")
        size = math.prod(shape)
        reader = Reader(data, 1)
        words = decode_alphabet(reader.take(reader.varint()), dtype, min(size, _LARGEST_ALPHABET))
        frequencies = decode_counts(reader.take(reader.varint()), words.size)
        symbols: Symbols = words[_decode_indices(reader.rest(), frequencies, size, self.coder)]
        return symbols.reshape(shape)

    def estimate(self, symbols: Symbols) -> tuple[float, float]:
        """Return the bytes of tables and payload, hardly more than they are, without coding: from a histogram."""
        plain = byte_size(symbols.shape, symbols.dtype)
        bits = bits_needed(symbols) if symbols.size else 0
        rival = min(plain, 1 + packed_size(symbols.size, bits, symbols.dtype))
        model = _model_of(symbols, rival)
        return (0.0, rival) if model is None else (len(model.tables), 1 + model.payload_bytes)

    def _modelled(self, symbols: Symbols, rival: int) -> list[Part] | None:
        """Return the parts with alphabet, frequencies and payload; None where they aren't shorter than a rival."""
        model = _model_of(symbols, rival)
        if model is None:
            return None
        payload = _encode_indices(positions(symbols, model.words, np.int32), model.frequencies, self.coder)
        if 1 + len(model.tables) + len(payload) >= rival:
            return None
        return [Part(STRUCTURE, bytes([_MODELLED])), Part("tables", model.tables), Part("payload", payload)]


class _Model(NamedTuple):
    """An alphabet, its frequencies, the tables that tell both, and the bytes of the payload, about."""

    words: Symbols
    frequencies: NDArray[np.int64]
    tables: bytes
    payload_bytes: float


def _model_of(symbols: Symbols, rival: int) -> _Model | None:
    """Return the model of symbols; None where tables and payload aren't shorter than a rival."""
    found = alphabet(symbols, _LARGEST_ALPHABET)
    if found is None or not symbols.size:
        return None
    words, counts = found
    # Too long even with a bit a frequency: the quick way out for what can't be modelled, and before long tables.
    payload = (_plugin_bits(counts) + words.size) / 8
    if payload >= rival:
        return None
    table = encode_alphabet(words)
    if len(table) + payload >= rival:
        return None
    frequency_table, frequencies, bits = encode_counts(counts)
    if len(table) + len(frequency_table) + bits / 8 >= rival:
        return None
    tables = varint(len(table)) + table + varint(len(frequency_table)) + frequency_table
    return _Model(words, frequencies, tables, bits / 8)


@dataclass(frozen=True)
class PluginEntropy(CodeLength):
    """Number of symbols times the entropy of their empirical distribution, tensor by tensor; a proxy.

    It pays for no alphabet and no frequencies, so it is below what any zero-order code needs and bounds nothing.
    """

    name: ClassVar[str] = "plugin_entropy"

    @property
    def kind(self) -> Kind:
        """``proxy``."""
        return "proxy"

    def length(self, symbols: Symbols) -> float:
        """Return ``sum_s c_s log2(N / c_s)`` in bits, for symbols s that occur c_s times among N."""
        found = alphabet(symbols, symbols.size)
        assert found is not None
        return _plugin_bits(found[1])


def _plugin_bits(counts: NDArray[np.int64]) -> float:
    # Grouped by count, so that the value doesn't depend on which symbol has which count.
    sizes, repeats = np.unique(counts, return_counts=True)
    return float((repeats * sizes * (np.log2(counts.sum()) - np.log2(sizes))).sum()) if counts.size else 0.0


def _encode_indices(indices: Indices, frequencies: NDArray[np.int64], coder: str) -> bytes:
    """Return the words of a range or ANS coder, little-endian."""
    model = _model(frequencies)
    if coder == "range":
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(indices, model)
    else:
        encoder = constriction.stream.stack.AnsCoder()
        encoder.encode_reverse(indices, model)
    words: NDArray[np.uint32] = encoder.get_compressed()
    return words.astype(_CODER_WORD, copy=False).tobytes()


def _decode_indices(data: bytes, frequencies: NDArray[np.int64], size: int, coder: str) -> Indices:
    """Return the indices that `_encode_indices` wrote.

    Raises
    ------
    StreamError
        The words aren't those that an encoder writes. Being checked by encoding again, which takes a third of the
        time of decoding, this finds whatever changes the length and most other damage.
    """
    if len(data) % _CODER_WORD.itemsize or frequencies.size < 2:
        raise StreamError("entropy: the payload is truncated or has no model")
    words = np.frombuffer(data, _CODER_WORD).astype(np.uint32)
    try:
        if coder == "range":
            indices: Indices = constriction.stream.queue.RangeDecoder(words).decode(_model(frequencies), size)
        else:
            indices = constriction.stream.stack.AnsCoder(words).decode(_model(frequencies), size)
    except BaseException as error:
        # A panic of the Rust library isn't an Exception, and its class can't be imported.
        if isinstance(error, (AssertionError, ValueError)) or type(error).__name__ == "PanicException":
            raise StreamError(f"entropy: the payload is corrupted: {error}") from error
        raise
    if _encode_indices(indices, frequencies, coder) != data:
        raise StreamError("entropy: the payload is corrupted, or ends before or after the last symbol")
    return indices


def _model(frequencies: NDArray[np.int64]) -> Any:
    return constriction.stream.model.Categorical(frequencies.astype(np.float64), perfect=False)
