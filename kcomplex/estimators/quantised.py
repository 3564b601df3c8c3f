"""Quantisers before codes and code lengths: ``uniform:bits=4|entropy``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import StreamError, WeightsError
from kcomplex.estimators.arrays import FORMS, made_of, read_arrays, tell_arrays
from kcomplex.estimators.code import Code, EncodedTensor, Memory, SymbolCode, divided
from kcomplex.estimators.coder import Part, Quantised, Quantiser
from kcomplex.estimators.description import STRUCTURE, Kind
from kcomplex.estimators.duplicates import distinct_weights
from kcomplex.estimators.estimator import TensorLength
from kcomplex.estimators.length import CodeLength
from kcomplex.estimators.pieces import handles_of, joined, piece_limit, pieces_of
from kcomplex.estimators.structure import Reader, TensorEntry, varint
from kcomplex.estimators.symbols import Shape, Symbols
from kcomplex.estimators.transformed import TwoStages
from kcomplex.weights import TensorHandle, Weights, dtype_name, squared_error, values_of, words_of

# What a tensor is to its network, where it is quantised: statistics and the vectors of norms take next to no bits, and
# are multiplied with everything.
_QUANTISED_ROLES = ("weight", "bias")
# What is chosen for a tensor of floats that is kept exactly.
_KEPT = 1
# What the forms of quantised symbols are told beside.
_USUAL_DTYPE = np.dtype(np.int8)


@dataclass(frozen=True)
class QuantisedCode(TwoStages, Code):
    """A code behind a quantiser: a decodable code for the quantised weights.

    Weights and biases are quantised; norms, statistics and other buffers, and all tensors that hold integers, booleans
    or complex numbers, are coded losslessly by the code alone.

    Attributes
    ----------
    names
        Of the tensors that are quantised, whatever they are to their network; None for weights and biases.
    side
        The side information of all pieces of a long tensor, where they have it in common.
    """

    quantiser: Quantiser
    code: SymbolCode
    names: frozenset[str] | None = None
    side: bytes | None = None
    name: ClassVar[str] = "quantised"

    @property
    def sequential(self) -> bool:
        """Whether the code behind the quantiser is."""
        return self.code.sequential

    @property
    def takes_known(self) -> bool:
        """Whether the code behind the quantiser predicts integers from numbers that are known."""
        return self.code.predicts

    def quantises(self, handle: TensorHandle) -> bool:
        """Return whether the tensor is quantised."""
        if self.names is not None:
            return handle.name in self.names
        return _is_quantised(self.quantiser, handle)

    def divides(self, shared: bytes) -> bool:
        """Return whether the quantiser does."""
        return self.quantiser.divides(shared)

    def for_pieces(self, handle: TensorHandle) -> QuantisedCode:
        """Return the code with the side information that the pieces of a long tensor have in common."""
        if not self.quantises(handle) or self.quantiser.lossless:
            return self

        def pieces() -> Iterator[NDArray[np.floating[Any]]]:
            found = handles_of(handle, piece_limit(True))
            return (finite_values(piece.read(), self.quantiser, handle) for piece in found)

        return replace(self, side=self.quantiser.side_of_pieces(handle.elements, pieces))

    def prepare(self, weights: Weights) -> bytes:
        """Return what the quantiser learns from all tensors that it will quantise."""
        return self.quantiser.fit(list(filter(self.quantises, weights.values())))

    def memory(self, shared: bytes) -> Memory:
        """Return the memory of the code behind the quantiser."""
        return self.code.memory(shared)

    def encode(self, handle: TensorHandle, memory: Memory, known: torch.Tensor | None = None) -> EncodedTensor:
        """Return the stream of symbols and side information, with the distortion; see `Code.encode`.

        Raises
        ------
        WeightsError
            The tensor holds NaN or infinity, and the quantiser isn't lossless.
        """
        if not self.quantises(handle):
            encoded = self.code.encode(handle, memory, known)
            return replace(encoded, choice=_KEPT) if is_quantisable(handle.dtype) else encoded
        tensor = QuantisedTensor(self.quantiser, handle, memory.shared, self.side)
        if tensor.escapes:
            encoded = self.code.encode(handle, memory, known)
            return replace(encoded, parts=[Part(STRUCTURE, varint(0)), *encoded.parts])
        symbols, side = tensor.quantised.symbols, tensor.quantised.side
        form, told = tell_arrays([symbols], handle.shape, _USUAL_DTYPE)
        with made_of(handle.elements):
            coded = self.code.encode_symbols(symbols, memory, _of_shape(known, symbols.shape))
        announced = Part(STRUCTURE, varint(FORMS * (len(side) + self.quantiser.lossless) + form) + told)
        return EncodedTensor([announced, Part("tables", side), *coded], tensor.squared_error, tensor.exact)

    def decode(
        self, entry: TensorEntry, data: bytes, memory: Memory, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tensor, quantised or kept, the same on every machine; see `Code.decode`."""
        if entry.choice > (_KEPT if is_quantisable(entry.dtype) else 0):
            raise StreamError(f"{self.quantiser.name}: a tensor of the unknown kind {entry.choice}")
        if entry.choice == _KEPT or not is_quantisable(entry.dtype):
            return self.code.decode(entry, data, memory, known)
        reader = Reader(data)
        announced = reader.varint()
        if self.quantiser.lossless and not announced:
            return self.code.decode(entry, reader.rest(), memory, known)
        length, number = divmod(announced, FORMS)
        if length < self.quantiser.lossless:
            raise StreamError(f"{self.quantiser.name}: a tensor can't begin with {announced}")
        ((shape, dtype), *others) = read_arrays(number, reader, entry.shape, _USUAL_DTYPE)
        if others:
            raise StreamError(f"{self.quantiser.name}: {1 + len(others)} arrays of symbols where there can be one")
        side = reader.take(length - self.quantiser.lossless)
        with made_of(math.prod(entry.shape)):
            symbols = self.code.decode_symbols(reader.rest(), shape, dtype, memory, _of_shape(known, shape))
        return reconstruct(self.quantiser, Quantised(symbols, side), entry.dtype, entry.shape, memory.shared)


@dataclass(frozen=True)
class QuantisedLength(TwoStages, CodeLength):
    """A code length behind a quantiser; the quantiser's side information is paid for as it is."""

    quantiser: Quantiser
    measure: CodeLength
    name: ClassVar[str] = "quantised"

    @property
    def kind(self) -> Kind:
        """The kind of the length."""
        return self.measure.kind

    def prepare(self, weights: Weights) -> bytes:
        """Return what the quantiser learns from all tensors that it will quantise."""
        return self.quantiser.fit(list(filter(self.quantises, weights.values())))

    def quantises(self, handle: TensorHandle) -> bool:
        """Return whether the tensor is quantised."""
        return _is_quantised(self.quantiser, handle)

    def length(self, symbols: Symbols) -> float:
        """Return the length of integers, which aren't quantised."""
        return self.measure.length(symbols)

    def tensor_length(self, handle: TensorHandle, shared: bytes) -> TensorLength:
        """Return the length of symbols and side information, with the distortion."""
        if not self.quantises(handle):
            return self.measure.tensor_length(handle, b"")
        tensor = QuantisedTensor(self.quantiser, handle, shared)
        if tensor.escapes:
            return self.measure.tensor_length(handle, b"")
        side = 8.0 * len(varint(len(tensor.quantised.side)) + tensor.quantised.side)
        payload = self.measure.length(tensor.quantised.symbols)
        return TensorLength({"tables": side, "payload": payload}, tensor.squared_error, tensor.exact)


def is_quantisable(dtype: torch.dtype) -> bool:
    """Return whether quantisers work on a dtype: every real float but float8_e8m0fnu, which has no zero."""
    return dtype.is_floating_point and dtype is not torch.float8_e8m0fnu


def quantised_weights(estimator: QuantisedCode | QuantisedLength, weights: Weights) -> Weights:
    """Return the weights that the quantiser's symbols stand for, quantised anew at every read.

    The files stay those of the weights that were given, which must stay open.
    """
    shared = estimator.prepare(distinct_weights(weights, estimator.quantises).weights)
    handles = [
        replace(handle, load=partial(quantised_tensor, estimator, handle, shared), load_range=None)
        if estimator.quantises(handle)
        else handle
        for handle in weights.values()
    ]
    return weights.with_tensors(handles, weights.skipped)


def quantised_tensor(estimator: QuantisedCode | QuantisedLength, handle: TensorHandle, shared: bytes) -> torch.Tensor:
    """Return the tensor that a quantiser's symbols stand for; ``shared`` is what the estimator prepared."""
    if isinstance(estimator, QuantisedLength):
        return QuantisedTensor(estimator.quantiser, handle, shared).decoded
    limit = piece_limit(estimator.divides(shared))
    parts = (piece.decoded for piece in quantised_pieces(estimator, handle, shared))
    return joined(zip(pieces_of(handle.shape, limit), parts, strict=True), handle.dtype, handle.shape)


def quantised_pieces(code: QuantisedCode, handle: TensorHandle, shared: bytes) -> Iterator[QuantisedTensor]:
    """Yield what the quantiser makes of each piece of a tensor."""
    for own, piece in divided(code, handle, piece_limit(code.divides(shared))):
        assert isinstance(own, QuantisedCode)
        yield QuantisedTensor(own.quantiser, piece, shared, own.side)


class QuantisedTensor:
    """A tensor's or a piece's symbols, and how far what they stand for is from it.

    Attributes
    ----------
    quantised
        Symbols and side information.
    decoded
        The tensor that a decoder gives back.
    squared_error
        Sum of squared differences between the two.
    exact
        Whether every bit comes back.
    escapes
        Whether the coder alone must code the tensor.

    Raises
    ------
    WeightsError
        The tensor holds NaN or infinity, and the quantiser isn't lossless.
    """

    def __init__(self, quantiser: Quantiser, handle: TensorHandle, shared: bytes, side: bytes | None = None) -> None:
        tensor = handle.read()
        values = values_of(tensor) if quantiser.lossless else finite_values(tensor, quantiser, handle)
        quantise = quantiser.quantise if side is None else partial(quantiser.quantise_piece, side=side)
        self.quantised = quantise(values, shared)
        self.decoded = reconstruct(quantiser, self.quantised, handle.dtype, handle.shape, shared)
        self.exact = bool(np.array_equal(words_of(tensor), words_of(self.decoded)))
        # Machines differ in what they make of a short NaN.
        short = handle.dtype.itemsize < values.dtype.itemsize
        self.escapes = quantiser.lossless and (not self.exact or (short and bool(np.isnan(values).any())))
        self.squared_error = 0.0 if self.exact or self.escapes else squared_error(tensor, self.decoded)


def finite_values(tensor: torch.Tensor, quantiser: Quantiser, handle: TensorHandle) -> NDArray[np.floating[Any]]:
    """Return the values of a tensor that is to be quantised; see `values_of`.

    Raises
    ------
    WeightsError
        There is NaN or infinity among them.
    """
    values = values_of(tensor)
    if not np.isfinite(values).all():
        raise WeightsError(
            f"the tensor {handle.name!r} ({dtype_name(handle.dtype)}, {handle.shape}) holds NaN or infinity and "
            f"can't be quantised by {quantiser.name!r}: exclude it, or use a lossless estimator"
        )
    return values


def reconstruct(
    quantiser: Quantiser, quantised: Quantised, dtype: torch.dtype, shape: Shape, shared: bytes
) -> torch.Tensor:
    """Return the tensor that symbols stand for, rounded to its dtype."""
    wide = np.dtype(np.float64 if dtype is torch.float64 else np.float32)
    values = quantiser.reconstruct(quantised, shape, wide, shared)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).reshape(shape)


def _of_shape(known: torch.Tensor | None, shape: Shape) -> torch.Tensor | None:
    """Return what is known where it has a shape; of symbols in another shape it says nothing."""
    return known if known is not None and tuple(known.shape) == shape else None


def _is_quantised(quantiser: Quantiser, handle: TensorHandle) -> bool:
    # Where nothing is lost, nothing needs to be kept.
    return is_quantisable(handle.dtype) and (quantiser.lossless or handle.role in _QUANTISED_ROLES)
