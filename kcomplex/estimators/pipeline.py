"""Stages in a row: ``palette|zstd``, ``uniform:bits=4|entropy``; quantisers first, one coder last."""

from __future__ import annotations

from collections.abc import Iterable

from kcomplex.errors import SpecError, StreamError, WeightsError
from kcomplex.estimators.code import Code, CoderCode, SymbolCode
from kcomplex.estimators.coder import Coder, Quantiser, Transform
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.given import STAGE, GivenSource, StatedGiven, given_of
from kcomplex.estimators.length import CodeLength
from kcomplex.estimators.quantised import QuantisedCode, QuantisedLength
from kcomplex.estimators.relative import GivenCode, relative
from kcomplex.estimators.spec import build, spec_of, split_stages
from kcomplex.estimators.transformed import TransformedCode, TransformedLength


def build_estimator(spec: str | Estimator | Coder, given: GivenSource | None = None) -> Estimator:
    """Return the estimator of a specification string or a coder; an estimator is returned as it is.

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
    if isinstance(spec, Coder):
        return CoderCode(spec)
    if not isinstance(spec, str):
        raise SpecError(f"an estimator is a specification string or an Estimator, not {type(spec).__name__}")
    if spec.startswith(STAGE):
        text, _, behind = spec.removeprefix(STAGE).partition("|")
        if behind.startswith(STAGE):
            raise SpecError(f"{spec[:80]!r} names given weights twice: once is enough")
        return relative(build_estimator(behind), text)
    *before, last = [build("kcomplex.estimators", stage) for stage in split_stages(spec)]
    for stage in (*before, last):
        if not isinstance(stage, (Estimator, Coder, Transform, Quantiser)):
            raise SpecError(f"{type(stage).__name__} (in {spec!r}) is no estimator, coder, transform or quantiser")
    if isinstance(last, (Transform, Quantiser)):
        raise SpecError(f"{spec!r} needs a coder at its end: write for example '{spec}|entropy'")
    result: Estimator = CoderCode(last) if isinstance(last, Coder) else last
    if before and not isinstance(result, (SymbolCode, CodeLength)):
        raise SpecError(f"{last.name!r} measures whole weights and can't follow another stage (in {spec!r})")
    for stage in reversed(before):
        result = _behind(stage, result, spec)
    return result


def build_estimators(
    specs: str | Estimator | Coder | Iterable[str | Estimator | Coder], given: GivenSource | None = None
) -> list[Estimator]:
    """Return the estimators of one or several specifications; see `build_estimator`. Given weights are read once.

    Raises
    ------
    SpecError
        There is none.
    """
    wanted = list(specs) if isinstance(specs, Iterable) and not isinstance(specs, str) else [specs]
    if not wanted:
        raise SpecError("no estimator is named: give one, such as 'zstd', or several")
    known = None if given is None else given_of(given)
    return [build_estimator(item, known) for item in wanted]


def _behind(stage: object, result: Estimator, spec: str) -> Estimator:
    """Return an estimator with a stage before it."""
    if isinstance(stage, Transform):
        if isinstance(result, SymbolCode):
            return TransformedCode(stage, result)
        if isinstance(result, CodeLength) and not isinstance(result, QuantisedLength):
            return TransformedLength(stage, result)
        raise SpecError(f"{stage.name!r} stands before a quantiser in {spec!r}: quantisers come first")
    if isinstance(stage, Quantiser):
        if isinstance(result, SymbolCode):
            return QuantisedCode(stage, result)
        if isinstance(result, CodeLength) and not isinstance(result, QuantisedLength):
            return QuantisedLength(stage, result)
        raise SpecError(f"{spec!r} has two quantisers: one is enough")
    raise SpecError(f"{spec_of(stage)!r} must stand last in {spec!r}")


def build_encoder(spec: str | Estimator | Coder, given: GivenSource | None = None) -> Code:
    """Return the estimator of a specification as a code; see `build_estimator`.

    Raises
    ------
    WeightsError
        It has no decoder (its kind isn't ``code``).
    """
    code = build_estimator(spec, given)
    if not isinstance(code, Code):
        raise WeightsError(f"{code.spec!r} is of kind {code.kind}: it has no stream that could be decoded")
    return code


def build_decoder(spec: str, given: GivenSource | None = None) -> Code:
    """Return the code that a stream names; nothing that a relative one names is opened or imported.

    Parameters
    ----------
    given
        What the stream was encoded with, where it names other weights.

    Raises
    ------
    StreamError
        The specification has no decoder, or doesn't tell the digest of the weights that it was made with.
    UnknownNameError, PluginError
        An estimator isn't installed.
    """
    code = build_estimator(spec)
    if isinstance(code, GivenCode):
        if not isinstance(code.given, StatedGiven) or not code.given.digest:
            raise StreamError(f"the stream names what is given without a digest, in {spec!r}: it is corrupted")
        return code if given is None else _with_given(code, given)
    if not isinstance(code, Code):
        raise StreamError(f"the stream names {spec!r}, which has no decoder")
    return code


def _with_given(code: GivenCode, given: GivenSource) -> Code:
    found = relative(code, given)
    assert isinstance(found, GivenCode)
    return found
