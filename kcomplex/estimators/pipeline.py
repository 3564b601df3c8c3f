"""Stages in a row: ``palette|zstd``, ``uniform:bits=4|entropy``; quantisers first, one coder last."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kcomplex.errors import SpecError, StreamError, WeightsError
from kcomplex.estimators.description import Kind
from kcomplex.estimators.estimator import (
    Code,
    CodeLength,
    Coder,
    EncodedTensor,
    Estimator,
    Part,
    Quantised,
    Quantiser,
    Shape,
    Symbols,
    TensorLength,
    TensorwiseEstimator,
    Transform,
)
from kcomplex.estimators.given import STAGE, BoundCoder, Given, GivenCode, GivenSource, RelativeCoder, relative
from kcomplex.estimators.spec import build, full_spec_of, spec_of, split_stages
from kcomplex.estimators.structure import Reader, join_lengths, split_lengths, varint
from kcomplex.weights import TensorHandle, Weights, dtype_name, values_of, words_of


def build_estimator(spec: str | Estimator, given: GivenSource | None = None) -> Estimator:
    """Return the estimator of a specification string; an estimator is returned as it is.

    Parameters
    ----------
    spec
        Stages joined by ``|``; ``given:PATH|`` or ``given:seed:factory=package.module:function,seed=0|`` may stand
        before them.
    given
        Weights that the code may use, as they may stand in the specification, or in memory.

    Raises
    ------
    SpecError
        The stages don't fit together, or an option is unknown or wrong.
    UnknownNameError, PluginError
        A stage isn't known, or can't be loaded.

    Examples
    --------
    >>> build_estimator("palette|zstd:level=19").spec
    'palette|zstd:level=19'
    """
    if given is not None:
        return relative(build_estimator(spec), given)
    if isinstance(spec, Estimator):
        return spec
    if not isinstance(spec, str):
        raise SpecError(f"an estimator is a specification string or an Estimator, not {type(spec).__name__}")
    if spec.startswith(STAGE):
        text, _, behind = spec.removeprefix(STAGE).partition("|")
        if behind.startswith(STAGE):
            raise SpecError(f"{spec[:80]!r} names given weights twice: once is enough")
        return relative(build_estimator(behind), Given.of(text))
    *before, last = [build("kcomplex.estimators", stage) for stage in split_stages(spec)]
    for stage in (*before, last):
        if not isinstance(stage, (Estimator, Transform, Quantiser)):
            raise SpecError(f"{type(stage).__name__} (in {spec!r}) is no estimator, transform or quantiser")
    if isinstance(last, (Transform, Quantiser)):
        raise SpecError(f"{spec!r} needs a coder at its end: write for example '{spec}|entropy'")
    if before and not isinstance(last, (Coder, CodeLength)):
        raise SpecError(f"{last.name!r} measures whole weights and can't follow another stage (in {spec!r})")
    result: Any = last
    for stage in reversed(before):
        if isinstance(stage, Transform) and isinstance(result, (Coder, CodeLength)):
            result = TransformedCoder(stage, result) if isinstance(result, Coder) else TransformedLength(stage, result)
        elif isinstance(stage, Quantiser) and isinstance(result, (Coder, CodeLength)):
            result = QuantisedCode(stage, result) if isinstance(result, Coder) else QuantisedLength(stage, result)
        elif isinstance(stage, Quantiser):
            raise SpecError(f"{spec!r} has two quantisers: one is enough")
        elif isinstance(stage, Transform):
            raise SpecError(f"{stage.name!r} stands before a quantiser in {spec!r}: quantisers come first")
        else:
            raise SpecError(f"{stage.name!r} must stand last in {spec!r}")
    assert isinstance(result, Estimator)
    return result


def build_decoder(spec: str, given: GivenSource | None = None) -> Code:
    """Return the code that a stream names; nothing that a relative one names is opened or imported.

    Parameters
    ----------
    given
        What the stream was encoded with, where it names other weights.

    Raises
    ------
    StreamError
        The specification has no decoder, or the stream was encoded with other weights.
    UnknownNameError, PluginError
        An estimator isn't installed.
    """
    code = build_estimator(spec)
    if isinstance(code, GivenCode):
        if not code.given.digest:
            raise StreamError(f"the stream names what is given without a digest, in {spec!r}: it is corrupted")
        return code.filled(given)
    if not isinstance(code, Code):
        raise StreamError(f"the stream names {spec!r}, which has no decoder")
    return code


class _TwoStages(TensorwiseEstimator):
    """A dataclass of two fields: a stage, and the estimator behind it."""

    @property
    def spec(self) -> str:
        """Both specifications, joined by ``|``."""
        stage, behind = self._stages()
        return f"{spec_of(stage)}|{behind.spec}"

    @property
    def full_spec(self) -> str:
        """Both specifications with every option, joined by ``|``."""
        stage, behind = self._stages()
        return f"{full_spec_of(stage)}|{behind.full_spec}"

    @property
    def sequential(self) -> bool:
        """Whether the estimator behind the stage learns from tensor to tensor."""
        return bool(self._stages()[1].sequential)

    def fresh(self) -> Self:
        """Return the same stage with a fresh estimator behind it; see `TensorwiseEstimator.fresh`."""
        behind = self._stages()[1].fresh()
        return cast(Self, replace(cast(Any, self), **{fields(cast(Any, self))[1].name: behind}))

    def _stages(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(cast(Any, self))]


@dataclass(frozen=True)
class TransformedCoder(_TwoStages, Coder):
    """A coder behind a lossless transform; itself a coder."""

    transform: Transform
    coder: Coder
    name: ClassVar[str] = "transformed"

    def encode(self, symbols: Symbols) -> bytes:
        """Return side information and the coded streams."""
        return b"".join(part.data for part in self.encode_parts(symbols))

    def encode_parts(self, symbols: Symbols) -> list[Part]:
        """Return side information (tables), lengths (structure) and the coder's parts of every stream.

        What the coder calls payload has the name that the transform gives it.
        """
        side, streams = self.transform.split(symbols)
        coded = [self.coder.encode_parts(stream) for stream in streams]
        lengths = [sum(len(part.data) for part in parts) for parts in coded]
        names = self.transform.payload_names(len(streams))
        return [
            Part("structure", varint(len(side))),
            Part("tables", side),
            Part("structure", join_lengths(lengths[:-1])),
            *(
                part._replace(name=name) if part.name == "payload" else part
                for name, parts in zip(names, coded, strict=True)
                for part in parts
            ),
        ]

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the symbols; see `Coder.decode`."""
        reader = Reader(data)
        side = reader.take(reader.varint())
        layouts = self.transform.layout(side, shape, dtype)
        pieces = split_lengths(reader.rest(), len(layouts))
        streams = [self.coder.decode(piece, *layout) for piece, layout in zip(pieces, layouts, strict=True)]
        return self.transform.join(side, streams, shape, dtype)


@dataclass(frozen=True)
class TransformedLength(_TwoStages, CodeLength):
    """A code length behind a lossless transform; the transform's side information is paid for as it is."""

    transform: Transform
    measure: CodeLength
    name: ClassVar[str] = "transformed"

    @property
    def kind(self) -> Kind:
        """The kind of the length."""
        return self.measure.kind

    def length(self, symbols: Symbols) -> float:
        """Return the length of side information and streams, in bits."""
        side, streams = self.transform.split(symbols)
        return math.fsum([8.0 * len(side), *(self.measure.length(stream) for stream in streams)])


@dataclass(frozen=True)
class QuantisedCode(_TwoStages, Code):
    """A coder behind a quantiser: a decodable code for the quantised weights.

    Tensors that hold integers, booleans or complex numbers are coded losslessly by the coder alone.
    """

    quantiser: Quantiser
    coder: Coder
    name: ClassVar[str] = "quantised"

    def prepare(self, weights: Weights) -> bytes:
        """Return what the quantiser learns from all tensors that it will quantise."""
        return self.quantiser.fit(_quantisable(weights))

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the stream of codes and side information, with the distortion.

        Raises
        ------
        WeightsError
            The tensor holds NaN or infinity, and the quantiser isn't lossless.
        """
        if not is_quantisable(handle.dtype):
            return self.coder.encode_tensor(handle, b"")
        tensor = QuantisedTensor(self.quantiser, handle, shared)
        if tensor.escapes:
            return EncodedTensor([Part("structure", varint(0)), *self.coder.encode_tensor(handle, b"").parts])
        codes, side = tensor.quantised.codes, tensor.quantised.side
        parts: list[Part] = [
            Part("structure", varint(len(side) + self.quantiser.lossless)),
            Part("tables", side),
            *self.coder.encode_words(codes.reshape(-1), codes.shape),
        ]
        return EncodedTensor(parts, tensor.squared_error, tensor.exact)

    def takes_given(self) -> bool:
        """Return whether the coder has a use for given weights."""
        return isinstance(self.coder.fresh(), RelativeCoder)

    def encode_given(self, handle: TensorHandle, known: torch.Tensor, shared: bytes) -> EncodedTensor:
        """Return the stream of codes given weights that aren't quantised; see `RelativeCode.encode_given`."""
        return replace(self, coder=BoundCoder(self.coder, known)).encode_tensor(handle, shared)

    def decode_given(
        self, data: bytes, dtype: torch.dtype, shape: Shape, known: torch.Tensor, shared: bytes
    ) -> torch.Tensor:
        """Return the quantised tensor; see `RelativeCode.decode_given`."""
        return replace(self, coder=BoundCoder(self.coder, known)).decode_tensor(data, dtype, shape, shared)

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the quantised tensor, the same on every machine; see `Code.decode_tensor`."""
        if not is_quantisable(dtype):
            return self.coder.decode_tensor(data, dtype, shape, b"")
        reader = Reader(data)
        announced = reader.varint()
        if self.quantiser.lossless and not announced:
            return self.coder.decode_tensor(reader.rest(), dtype, shape, b"")
        side = reader.take(announced - self.quantiser.lossless)
        layout = self.quantiser.layout(side, shape, _values_dtype(dtype), shared)
        codes = self.coder.decode_words(reader.rest(), *layout)
        return reconstruct(self.quantiser, Quantised(codes, side), dtype, shape, shared)


@dataclass(frozen=True)
class QuantisedLength(_TwoStages, CodeLength):
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
        return self.quantiser.fit(_quantisable(weights))

    def length(self, symbols: Symbols) -> float:
        """Return the length of integers, which aren't quantised."""
        return self.measure.length(symbols)

    def tensor_length(self, handle: TensorHandle, shared: bytes) -> TensorLength:
        """Return the length of codes and side information, with the distortion."""
        if not is_quantisable(handle.dtype):
            return self.measure.tensor_length(handle, b"")
        codes = QuantisedTensor(self.quantiser, handle, shared)
        if codes.escapes:
            return self.measure.tensor_length(handle, b"")
        side = 8.0 * len(varint(len(codes.quantised.side)) + codes.quantised.side)
        payload = self.measure.length(codes.quantised.codes)
        return TensorLength({"tables": side, "payload": payload}, codes.squared_error, codes.exact)


def is_quantisable(dtype: torch.dtype) -> bool:
    """Return whether quantisers work on a dtype: every real float but float8_e8m0fnu, which has no zero."""
    return dtype.is_floating_point and dtype is not torch.float8_e8m0fnu


def quantised_weights(estimator: QuantisedCode | QuantisedLength, weights: Weights) -> Weights:
    """Return the weights that the quantiser's codes stand for, quantised anew at every read.

    The files stay those of the weights that were given, which must stay open.
    """
    quantiser, shared = estimator.quantiser, estimator.prepare(weights)
    handles = [
        replace(handle, load=partial(_quantised_tensor, quantiser, handle, shared))
        if is_quantisable(handle.dtype)
        else handle
        for handle in weights.values()
    ]
    return Weights(handles, weights.skipped, weights.source)


def _quantised_tensor(quantiser: Quantiser, handle: TensorHandle, shared: bytes) -> torch.Tensor:
    quantised = quantiser.quantise(handle.values(), shared)
    return reconstruct(quantiser, quantised, handle.dtype, handle.shape, shared)


class QuantisedTensor:
    """A tensor's codes, and how far what they stand for is from the tensor.

    Attributes
    ----------
    quantised
        Codes and side information.
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

    def __init__(self, quantiser: Quantiser, handle: TensorHandle, shared: bytes) -> None:
        tensor = handle.read()
        values = values_of(tensor) if quantiser.lossless else finite_values(tensor, quantiser, handle)
        self.quantised = quantiser.quantise(values, shared)
        self.decoded = reconstruct(quantiser, self.quantised, handle.dtype, handle.shape, shared)
        self.exact = bool(np.array_equal(words_of(tensor), words_of(self.decoded)))
        # Machines differ in what they make of a short NaN.
        short = handle.dtype.itemsize < values.dtype.itemsize
        self.escapes = quantiser.lossless and (not self.exact or (short and bool(np.isnan(values).any())))
        self.squared_error = 0.0
        if not self.exact and not self.escapes:
            difference = values.astype(np.float64) - values_of(self.decoded).astype(np.float64)
            self.squared_error = float(np.square(difference).sum())


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
    """Return the tensor that codes stand for, rounded to its dtype."""
    values = quantiser.reconstruct(quantised, shape, _values_dtype(dtype), shared)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).reshape(shape)


def _values_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype is torch.float64 else np.float32)


def _quantisable(weights: Weights) -> list[TensorHandle]:
    return [handle for handle in weights.values() if is_quantisable(handle.dtype)]
