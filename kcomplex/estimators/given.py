"""Relative descriptions, K(w | w0): weights given other weights, a checkpoint or an initialisation and its seed.

The stream of a relative code stores a digest of the weights that it was made with, and refuses any others. Of an
initialisation it also stores the recipe, so that whoever has the code of the network needs nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike, fspath
from typing import Any, ClassVar, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch

from kcomplex.errors import SpecError, StreamError
from kcomplex.estimators.description import STRUCTURE, Kind
from kcomplex.estimators.estimator import Code, Coder, EncodedTensor, Estimator, Part, Shape, Symbols, word_shape
from kcomplex.estimators.structure import TensorEntry
from kcomplex.sources.open import Source, open_weights
from kcomplex.weights import TensorHandle, Weights, dtype_name, tensor_from_words, words_of

GivenSource: TypeAlias = "Source | Given"

STAGE = "given:"
# In the estimators of a tracked run, the checkpoint of this name is the run's first snapshot.
INITIAL = "initial"
_RECIPE, _DIGEST = "seed:", "digest:"
_DIGEST_BYTES = 8
_SEED = re.compile("-?[0-9]{1,20}")
# What the first byte of a tensor's stream says, where a coder has no use for the given weights of its own.
_PLAIN, _DIFFERENCE = 0, 1


@dataclass(frozen=True)
class Given:
    """What a relative description may use without paying for it, beyond the text that names it.

    Attributes
    ----------
    checkpoint
        Path of a checkpoint; empty for weights in memory and for a recipe.
    factory
        ``package.module:function``: returns a module or a state dict; empty for a checkpoint.
    seed
        What PyTorch's generator is seeded with before the factory is called.
    arguments
        Keyword arguments of the factory, as text: numbers, booleans, None, or else strings.
    version
        Of PyTorch that a stream was written with.
    digest
        Of the weights, as a stream tells it; empty where it isn't known yet.
    locked
        Whether it comes from a stream alone: what a file says is neither opened nor imported.
    source
        Weights in memory.
    """

    checkpoint: str = ""
    factory: str = ""
    seed: int = 0
    arguments: tuple[tuple[str, str], ...] = ()
    version: str = ""
    digest: str = ""
    locked: bool = False
    source: Source | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, given: GivenSource) -> Given:
        """Return what is given: weights, a path, or a recipe such as ``seed:factory=package.module:function,seed=0``.

        Raises
        ------
        SpecError
            A recipe makes no sense.
        """
        if isinstance(given, Given):
            return given
        if not isinstance(given, (str, PathLike)):
            return cls(source=given)
        text = fspath(given)
        if "|" in text:
            raise SpecError(f"{text!r} can't be given: in a specification | ends it; use a name without")
        if text.startswith(_DIGEST):
            return cls(digest=text.removeprefix(_DIGEST))
        if not text.startswith(_RECIPE):
            if not text:
                raise SpecError("given: name a checkpoint, or 'seed:factory=package.module:function,seed=0'")
            return cls(checkpoint=text)
        options: dict[str, str] = {}
        for option in text.removeprefix(_RECIPE).split(","):
            key, equals, value = (part.strip() for part in option.partition("="))
            if not equals or key in options:
                raise SpecError(f"{option!r} in {text!r} isn't of the form key=value, or stands there twice")
            options[key] = value
        factory, seed = options.pop("factory", ""), options.pop("seed", "0")
        version, digest = options.pop("torch", ""), options.pop("digest", "")
        if not all(factory.partition(":")) or not _SEED.fullmatch(seed):
            raise SpecError(f"{text!r} isn't of the form 'seed:factory=package.module:function,seed=0'")
        return cls("", factory, int(seed), tuple(options.items()), version, digest)

    @property
    def text(self) -> str:
        """What `of` turns back into this: path, recipe, or the digest of weights in memory."""
        if self.checkpoint:
            return self.checkpoint
        if not self.factory:
            return _DIGEST + self.known_digest
        arguments = "".join(f",{key}={value}" for key, value in self.arguments)
        return f"{_RECIPE}factory={self.factory},seed={self.seed}{arguments}"

    @property
    def full_text(self) -> str:
        """What a stream stores: recipe and digest, or the digest alone."""
        if not self.factory:
            return _DIGEST + self.known_digest
        return f"{self.text},torch={self.version or torch.__version__},digest={self.known_digest}"

    @property
    def known_digest(self) -> str:
        """Digest of the weights in hexadecimal: told by a stream, or computed from all of them."""
        return self.digest or self._computed_digest

    @cached_property
    def weights(self) -> Weights:
        """The weights.

        Raises
        ------
        StreamError
            They are known by their digest alone, or by what a stream says.
        KComplexError
            The checkpoint can't be opened, or the factory can't be imported or fails.
        """
        if self.locked or not (self.checkpoint or self.factory or self.source is not None):
            raise StreamError(self._missing())
        if self.source is not None:
            return open_weights(self.source)
        return open_weights(self.checkpoint) if self.checkpoint else open_weights(self._initialised())

    def tensor(self, name: str, shape: Shape) -> torch.Tensor | None:
        """Return the tensor that is given for one of a name and shape; None where there is none."""
        handle = self._by_name.get(name)
        return handle.read() if handle is not None and handle.shape == shape else None

    def filled(self, given: GivenSource | None) -> Given:
        """Return what a stream was encoded with, from what the user gives for decoding it.

        Raises
        ------
        StreamError
            The stream was encoded with other weights.
        """
        if given is None:
            return replace(self, locked=True)
        found = Given.of(given)
        if found.known_digest != self.known_digest:
            told = f"it was encoded given other weights (digest {self.known_digest}, not {found.known_digest})"
            if self.factory and self.version != torch.__version__:
                told += f"; it was PyTorch {self.version} that drew them, and this is {torch.__version__}"
            raise StreamError(told)
        return found

    def read_anew(self) -> None:
        """Open the weights, and forget the digest of what they may have been before."""
        self.__dict__.pop("_by_name", None)
        self.__dict__.pop("_computed_digest", None)
        self.__dict__["_by_name"] = self._names()

    @cached_property
    def _by_name(self) -> dict[str, TensorHandle]:
        return self._names()

    def _names(self) -> dict[str, TensorHandle]:
        return {name: handle for handle in self.weights.values() for name in (handle.name, *handle.aliases)}

    @cached_property
    def _computed_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for handle in self.weights.values():
            digest.update(repr((handle.name, handle.aliases, dtype_name(handle.dtype), handle.shape)).encode())
            digest.update(words_of(handle.read()).data)
        return digest.hexdigest()

    def _initialised(self) -> Source:
        module, _, function = self.factory.partition(":")
        values = {key: _literal(text) for key, text in self.arguments}
        try:
            factory: Any = importlib.import_module(module)
            for name in function.split("."):
                factory = getattr(factory, name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                return cast(Source, factory(**values))
        except Exception as error:
            raise SpecError(f"{self.text!r} can't be initialised: {type(error).__name__}: {error}") from error

    def _missing(self) -> str:
        if self.factory:
            return (
                f"it was encoded given {self.text!r}, and decoding it imports and calls {self.factory}: if you trust "
                f"that, say so by giving the same again"
            )
        return f"it was encoded given other weights (digest {self.digest}): give them for decoding, too"


@runtime_checkable
class RelativeCode(Protocol):
    """A code with a use of its own for given weights; of any other `Coder`, differences of words are coded."""

    def takes_given(self) -> bool:
        """Return whether it has, configured as it is."""

    def encode_given(self, handle: TensorHandle, known: torch.Tensor, shared: bytes) -> EncodedTensor:
        """Return the stream of a tensor, never empty; ``known`` has its shape, and any dtype."""

    def decode_given(
        self, data: bytes, dtype: torch.dtype, shape: Shape, known: torch.Tensor, shared: bytes
    ) -> torch.Tensor:
        """Return the tensor of a stream that `encode_given` made."""


@runtime_checkable
class RelativeCoder(RelativeCode, Protocol):
    """A relative code that is a coder: it takes integers that a quantiser made, too."""

    def encode_words_given(self, words: Symbols, shape: Shape, known: torch.Tensor) -> list[Part]:
        """Return the parts of flat integers given the numbers that might have been quantised; as many of them."""

    def decode_words_given(self, data: bytes, shape: Shape, dtype: np.dtype[Any], known: torch.Tensor) -> Symbols:
        """Return the integers of `encode_words_given` in their shape."""


@dataclass(frozen=True)
class BoundCoder(Coder):
    """The coder of one tensor given another, to stand behind a quantiser."""

    coder: Coder
    known: torch.Tensor
    name: ClassVar[str] = "bound"

    def encode(self, symbols: Symbols) -> bytes:
        """Return the stream; see `Coder.encode`."""
        return b"".join(part.data for part in self.encode_words(symbols.reshape(-1), symbols.shape))

    def decode(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers; see `Coder.decode`."""
        return self.decode_words(data, shape, dtype)

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return the stream of a tensor that isn't quantised."""
        return cast(RelativeCoder, self.coder).encode_given(handle, self.known, shared)

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Return the tensor of such a stream."""
        return cast(RelativeCoder, self.coder).decode_given(data, dtype, shape, self.known, shared)

    def encode_words(self, words: Symbols, shape: Shape) -> list[Part]:
        """Return the parts of integers; where they have another shape than what is given, of them alone."""
        if shape != tuple(self.known.shape):
            return self.coder.encode_words(words, shape)
        return cast(RelativeCoder, self.coder).encode_words_given(words, shape, self.known)

    def decode_words(self, data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Symbols:
        """Return the integers of `encode_words`."""
        if shape != tuple(self.known.shape):
            return self.coder.decode_words(data, shape, dtype)
        return cast(RelativeCoder, self.coder).decode_words_given(data, shape, dtype, self.known)


@dataclass(frozen=True)
class GivenCode(Code):
    """A code for weights given others; its specification is that of the code after ``given:...|``.

    A tensor that is equal to the given one of its name takes no byte; one that has none of its name and shape is coded
    plainly.

    Raises
    ------
    SpecError
        The code has no use for other weights.
    """

    given: Given
    code: Code
    name: ClassVar[str] = "given"

    def __post_init__(self) -> None:
        usable = self.code.takes_given() if isinstance(self.code, RelativeCode) else isinstance(self.code, Coder)
        if not usable:
            raise SpecError(f"{self.code.spec!r} has no use for given weights: take lin, mix, or a coder such as zstd")

    @property
    def kind(self) -> Kind:
        """``code``."""
        return "code"

    @property
    def spec(self) -> str:
        """Specification string; where the weights are in memory, their digest stands in it."""
        return f"{STAGE}{self.given.text}|{self.code.spec}"

    @property
    def full_spec(self) -> str:
        """Specification string with every option of the code, the recipe and the digest."""
        return f"{STAGE}{self.given.full_text}|{self.code.full_spec}"

    @property
    def sequential(self) -> bool:
        """Whether the code learns from tensor to tensor."""
        return self.code.sequential

    def fresh(self) -> GivenCode:
        """Return what encodes or decodes the tensors of one stream; see `TensorwiseEstimator.fresh`."""
        return replace(self, code=self.code.fresh())

    def prepare(self, weights: Weights) -> bytes:
        """Return the side information of the code; what is given is opened here, before threads ask for it."""
        self.given.read_anew()
        return self.code.prepare(weights)

    def filled(self, given: GivenSource | None) -> GivenCode:
        """Return the decoder of a stream; see `Given.filled`."""
        return replace(self, given=self.given.filled(given))

    def encode_tensor(self, handle: TensorHandle, shared: bytes) -> EncodedTensor:
        """Return one tensor's stream; see `Code.encode_tensor`."""
        known = self.given.tensor(handle.name, handle.shape)
        if known is None:
            return self.code.encode_tensor(handle, shared)
        if known.dtype == handle.dtype and np.array_equal(words_of(known), words_of(handle.read())):
            return EncodedTensor([])
        if isinstance(self.code, RelativeCode):
            return self.code.encode_given(handle, known, shared)
        return _encode_difference(cast(Coder, self.code), handle, known)

    def decode_entry(self, data: bytes, entry: TensorEntry, shared: bytes) -> torch.Tensor:
        """Return the tensor; see `Code.decode_entry`."""
        known = self.given.tensor(entry.names[0], entry.shape)
        if known is None:
            return self.code.decode_tensor(data, entry.dtype, entry.shape, shared)
        if not data:
            if known.dtype != entry.dtype:
                raise StreamError(f"it is said to be as given, where it is given as {dtype_name(known.dtype)}")
            return known.clone()
        if isinstance(self.code, RelativeCode):
            return self.code.decode_given(data, entry.dtype, entry.shape, known, shared)
        return _decode_difference(cast(Coder, self.code), data, entry, known)

    def decode_tensor(self, data: bytes, dtype: torch.dtype, shape: Shape, shared: bytes) -> torch.Tensor:
        """Refuse: without its name, nobody knows what is given for a tensor."""
        raise StreamError("a relative stream is decoded tensor by tensor with its names")


def relative(estimator: Estimator, given: GivenSource) -> Estimator:
    """Return the code of weights given others.

    Raises
    ------
    SpecError
        The estimator is no code, or has no use for other weights.
    StreamError
        The estimator names other weights than these.
    """
    if isinstance(estimator, GivenCode):
        return estimator.filled(given)
    if not isinstance(estimator, Code):
        raise SpecError(f"{estimator.spec!r} is of kind {estimator.kind} and has no use for given weights: take a code")
    return GivenCode(Given.of(given), estimator)


def _encode_difference(coder: Coder, handle: TensorHandle, known: torch.Tensor) -> EncodedTensor:
    """Return words as they are, or their differences from the given ones, whichever is shorter."""
    encoded = []
    if known.dtype == handle.dtype:
        steps = word_differences(handle.read(), known)
        parts = coder.encode_words(steps, word_shape(handle.dtype, handle.shape))
        encoded.append(EncodedTensor([Part(STRUCTURE, bytes([_DIFFERENCE])), *parts]))
    # What learns from tensor to tensor learns from one of both.
    if not (encoded and coder.sequential):
        parts = coder.encode_tensor(handle, b"").parts
        encoded.append(EncodedTensor([Part(STRUCTURE, bytes([_PLAIN])), *parts]))
    return min(encoded, key=lambda tensor: sum(len(part.data) for part in tensor.parts))


def _decode_difference(coder: Coder, data: bytes, entry: TensorEntry, known: torch.Tensor) -> torch.Tensor:
    if data[0] == _PLAIN:
        return coder.decode_tensor(data[1:], entry.dtype, entry.shape, b"")
    if data[0] != _DIFFERENCE or known.dtype != entry.dtype:
        raise StreamError(f"a relative tensor of {dtype_name(entry.dtype)} can't begin with {data[0]}")
    steps = coder.decode_words(data[1:], word_shape(entry.dtype, entry.shape), words_of(known).dtype)
    return from_word_differences(steps.reshape(-1), known)


def word_differences(tensor: torch.Tensor, known: torch.Tensor) -> Symbols:
    """Return the differences of a tensor's words, in the order of their values, from those of another of its dtype.

    They are flat and unsigned; small ones of both signs are small.
    """
    return _zigzag(ordered_words(words_of(tensor), tensor.dtype) - ordered_words(words_of(known), tensor.dtype))


def from_word_differences(differences: Symbols, known: torch.Tensor) -> torch.Tensor:
    """Return the tensor that has these differences from another."""
    words = ordered_words(_unzigzag(differences) + ordered_words(words_of(known), known.dtype), known.dtype)
    return tensor_from_words(words, known.dtype, tuple(known.shape))


def ordered_words(words: Symbols, dtype: torch.dtype) -> Symbols:
    """Return words so that neighbours in value are neighbours; applied twice, it gives the words themselves.

    The words of floats are sign and magnitude: those of negative numbers run the other way.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return words
    bits = 8 * words.itemsize - 1
    below, negative = words.dtype.type((1 << bits) - 1), words >> words.dtype.type(bits)
    ordered: Symbols = words ^ (negative * below)
    return ordered


def _zigzag(differences: Symbols) -> Symbols:
    """Return differences modulo the words' range so that small ones of both signs are small."""
    top = 8 * differences.itemsize - 1
    negative = (differences >> differences.dtype.type(top)).astype(bool)
    doubled = differences << differences.dtype.type(1)
    folded: Symbols = np.where(negative, ~doubled, doubled)
    return folded


def _unzigzag(folded: Symbols) -> Symbols:
    one = folded.dtype.type(1)
    halved = folded >> one
    differences: Symbols = np.where(folded & one, ~halved, halved)
    return differences


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
