"""Specification strings: one grammar, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kcomplex as kc
from kcomplex.compressors.general.zstandard import Zstd
from kcomplex.errors import KComplexError, SpecError
from kcomplex.estimators.code import SymbolCode
from kcomplex.estimators.length import CodeLength
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.spec import build, spec_of


def test_options_get_their_fields_types() -> None:
    built = build("kcomplex.estimators", " zstd : level = 19 , long=true ")
    assert built == Zstd(level=19, long=True)


def test_only_what_differs_from_the_default_is_written() -> None:
    assert spec_of(Zstd()) == "zstd"
    assert spec_of(Zstd(level=19)) == "zstd:level=19"


@pytest.mark.parametrize(
    "spec", ["zstd:level=19", "palette|zstd:level=7", "planes|palette|entropy", "uniform:bits=6|entropy", "bdm"]
)
def test_canonical_specifications_come_back(spec: str) -> None:
    assert build_estimator(spec).spec == spec
    assert build_estimator(build_estimator(spec).spec) == build_estimator(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "empty stage"),
        ("zstd|", "empty stage"),
        ("zstd:", "ends after the colon"),
        ("zstd:level", "isn't of the form key=value"),
        ("zstd:levle=3", r"no option 'levle' .*Did you mean 'level'"),
        ("zstd:level=3,level=4", "given twice"),
        ("zstd:level=high", "must be of type int"),
        ("zstd:long=perhaps", "must be of type bool"),
        ("zstd:level=99", "level must be 1 to 22"),
        ("zstd|raw", "'zstd' must stand last"),
        ("palette", "needs a coder at its end"),
        ("uniform:bits=4", "needs a coder at its end"),
        ("uniform|uniform|zstd", "two quantisers"),
        ("palette|uniform|zstd", "quantisers come first"),
        ("palette|bdm", "measures whole weights and can't follow"),
        ("nonsense", "no estimator is called 'nonsense'"),
    ],
)
def test_refusals_say_what_is_wrong(spec: str, message: str) -> None:
    with pytest.raises(KComplexError, match=message):
        build_estimator(spec)


def test_something_else_than_a_specification_is_refused() -> None:
    with pytest.raises(SpecError, match="not int"):
        build_estimator(3)  # type: ignore[arg-type]


def test_stages_decide_the_class() -> None:
    assert isinstance(build_estimator("palette|zstd"), SymbolCode)
    assert isinstance(build_estimator("palette|plugin_entropy"), CodeLength)
    assert build_estimator("palette|plugin_entropy").kind == "proxy"
    assert build_estimator("uniform|zstd").kind == "code"


@pytest.mark.parametrize("spec", ["momos:block_size=2,capacity=0.05", "uniform_qat:bits=3", "codeq", "baseline"])
def test_modes_speak_the_same_grammar(spec: str) -> None:
    from kcomplex.training.protocol.sequence import mode

    assert mode(spec).spec == spec


def test_tuples_are_joined_by_plus() -> None:
    from kcomplex.training.protocol.sequence import mode

    built = mode("uniform_qat:exclude=*head*+*first*")
    assert built.exclude == ("*head*", "*first*")  # type: ignore[attr-defined]
    assert mode(built.spec) == built


@pytest.mark.parametrize("specs", [3, None, [], [3], ["raw", None]])
def test_what_names_no_estimator_is_refused(specs: Any) -> None:
    for call in (kc.describe, kc.explain):
        with pytest.raises(SpecError, match="estimator"):
            call({"w": torch.zeros(9)}, specs)
