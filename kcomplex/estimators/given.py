"""What may be given: other weights that a description needn't pay for, beyond the text that names them.

There are four cases: a checkpoint, a recipe (an initialisation and its seed), weights in memory, and what a stream
tells of any of them, a digest. The stream of a relative code stores the digest of the weights that it was made with,
and refuses any others. Of an initialisation it also stores the recipe, so that whoever has the code of the network
needs nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, TypeAlias, cast

import torch

from kcomplex.errors import RefusedStreamError, SpecError
from kcomplex.sources.open import Source, open_weights
from kcomplex.weights import Weights, dtype_name, words_of

# What a specification begins with that names given weights.
STAGE = "given:"
# In the estimators of a tracked run, the checkpoint of this name is the run's first snapshot.
INITIAL = "initial"
_RECIPE, _DIGEST = "seed:", "digest:"
_DIGEST_BYTES = 8
_SEED = re.compile("-?[0-9]{1,20}")


@dataclass(frozen=True)
class GivenCheckpoint:
    """A checkpoint, by its path."""

    path: str

    @property
    def text(self) -> str:
        """The path."""
        return self.path

    def open(self) -> tuple[Weights, str]:
        """Return its weights and their digest.

        Raises
        ------
        KComplexError
            There is no such checkpoint, or it can't be read.
        """
        return _with_digest(open_weights(self.path))

    def stream_text(self, digest: str) -> str:
        """Return the digest alone: whoever decodes may have the checkpoint elsewhere."""
        return _DIGEST + digest


@dataclass(frozen=True)
class Recipe:
    """An initialisation: a function that returns a module or a state dict, and what it is called with.

    Attributes
    ----------
    factory
        ``package.module:function``.
    seed
        What PyTorch's generator is seeded with before the factory is called.
    arguments
        Keyword arguments of the factory, as text: numbers, booleans, None, or else strings.
    """

    factory: str
    seed: int = 0
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """What `given_of` turns back into this."""
        arguments = "".join(f",{key}={value}" for key, value in self.arguments)
        return f"{_RECIPE}factory={self.factory},seed={self.seed}{arguments}"

    def open(self) -> tuple[Weights, str]:
        """Return the weights of a module that is made anew, and their digest.

        Raises
        ------
        SpecError
            The factory can't be imported, or fails.
        """
        module, _, function = self.factory.partition(":")
        values = {key: _literal(text) for key, text in self.arguments}
        doing = f"the module {module!r} can't be imported"
        try:
            factory: Any = importlib.import_module(module)
            doing = f"{module!r} has no function {function!r}"
            for name in function.split("."):
                factory = getattr(factory, name)
            doing = f"{self.factory} failed"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                weights = open_weights(cast(Source, factory(**values)))
        # What is imported may even end the program.
        except (Exception, SystemExit) as error:
            hint = ""
            if isinstance(error, ModuleNotFoundError):
                hint = ": install it, or name the folder that it is in by PYTHONPATH"
            raise SpecError(f"{self.text!r}: {doing} ({type(error).__name__}: {error}){hint}") from error
        return _with_digest(weights)

    def stream_text(self, digest: str) -> str:
        """Return recipe, PyTorch's version and digest."""
        return f"{self.text},torch={torch.__version__},digest={digest}"


@dataclass(frozen=True)
class GivenWeights:
    """Weights in memory, and the digest that they had when they were given.

    Attributes
    ----------
    called
        What specifications call them; empty where that is their digest.
    """

    digest: str
    weights: Weights = field(repr=False, compare=False)
    called: str = ""

    @property
    def text(self) -> str:
        """What they are called, or the digest."""
        return self.called or _DIGEST + self.digest

    def open(self) -> tuple[Weights, str]:
        """Return the weights and their digest.

        Raises
        ------
        SpecError
            They aren't any more what they were when they were given.
        """
        if digest_of_weights(self.weights) != self.digest:
            raise SpecError(
                f"{self.weights.source}: the weights have changed since they were given: give them anew, or a copy"
            )
        # Without their files: these stay open for whoever gave them.
        return Weights(self.weights.values(), self.weights.skipped, self.weights.source), self.digest

    def stream_text(self, digest: str) -> str:
        """Return the digest."""
        return _DIGEST + digest


@dataclass(frozen=True)
class StatedGiven:
    """What a stream says that it was made with; it is neither opened nor imported.

    Attributes
    ----------
    digest
        Of the weights.
    recipe, version
        Of an initialisation, and PyTorch's version that drew it; None and empty for other weights.
    """

    digest: str
    recipe: Recipe | None = None
    version: str = ""

    @property
    def text(self) -> str:
        """Recipe or digest."""
        return self.recipe.text if self.recipe is not None else _DIGEST + self.digest

    def open(self) -> tuple[Weights, str]:
        """Refuse: somebody has to give the weights.

        Raises
        ------
        RefusedStreamError
            Always.
        """
        if self.recipe is None:
            raise RefusedStreamError(
                f"it was encoded given other weights (digest {self.digest}): give them for decoding, too"
            )
        raise RefusedStreamError(
            f"it was encoded given {self.text!r}, and decoding it imports and calls {self.recipe.factory}: if you "
            "trust that, say so by giving the same again"
        )

    def stream_text(self, digest: str) -> str:
        """Return what the stream said."""
        if self.recipe is None:
            return _DIGEST + self.digest
        return f"{self.recipe.text},torch={self.version},digest={self.digest}"

    def require(self, digest: str) -> None:
        """Refuse other weights than those that the stream was made with.

        Raises
        ------
        RefusedStreamError
            Their digest is another.
        """
        if digest == self.digest:
            return
        told = f"it was encoded given other weights (digest {self.digest}, not {digest})"
        if self.recipe is not None and self.version != torch.__version__:
            told += f"; it was PyTorch {self.version} that drew them, and this is {torch.__version__}"
        raise RefusedStreamError(told)


Given: TypeAlias = GivenCheckpoint | Recipe | GivenWeights | StatedGiven
GivenSource: TypeAlias = "Source | Given"


def given_of(given: GivenSource) -> Given:
    """Return what is given: weights, a path, or a recipe such as ``seed:factory=package.module:function,seed=0``.

    Raises
    ------
    SpecError
        A recipe makes no sense.
    """
    if isinstance(given, (GivenCheckpoint, Recipe, GivenWeights, StatedGiven)):
        return given
    if not isinstance(given, (str, PathLike)):
        weights = open_weights(given)
        return GivenWeights(digest_of_weights(weights), weights)
    text = fspath(given)
    if "|" in text:
        raise SpecError(f"{text!r} can't be given: in a specification | ends it; use a name without")
    if text.startswith(_DIGEST):
        return StatedGiven(text.removeprefix(_DIGEST))
    if text.startswith(_RECIPE):
        return _recipe_of(text)
    if not text:
        raise SpecError("given: name a checkpoint, or 'seed:factory=package.module:function,seed=0'")
    return GivenCheckpoint(text)


def given_path(given: GivenSource | None) -> str | None:
    """Return the path of a checkpoint that is given, or that given weights are read from; None of anything else."""
    if isinstance(given, (str, PathLike)):
        return fspath(given)
    weights = given.weights if isinstance(given, GivenWeights) else given
    if isinstance(weights, Weights):
        return weights.source
    return weights.path if isinstance(weights, GivenCheckpoint) else None


def digest_of_weights(weights: Weights) -> str:
    """Return the digest of names, dtypes, shapes and bits, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for handle in weights.values():
        digest.update(repr((handle.name, handle.aliases, dtype_name(handle.dtype), handle.shape)).encode())
        digest.update(words_of(handle.read()).data)
    return digest.hexdigest()


def _with_digest(weights: Weights) -> tuple[Weights, str]:
    try:
        return weights, digest_of_weights(weights)
    except BaseException:
        weights.close()
        raise


def _recipe_of(text: str) -> Recipe | StatedGiven:
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
    recipe = Recipe(factory, int(seed), tuple(options.items()))
    return StatedGiven(digest, recipe, version) if digest else recipe


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
