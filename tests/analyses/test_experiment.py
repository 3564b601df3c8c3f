"""Experiments: validation, and the same values through TOML and JSON."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex.analyses.experiments.experiment import Experiment, experiment_from, read_experiment
from kcomplex.errors import SourceNotFoundError, SpecError, UnknownNameError

TEXT = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/", include_characters=" "), min_size=1)
EXPERIMENTS = st.builds(
    Experiment,
    name=TEXT.filter(lambda name: name not in (".", "..")),
    data=TEXT,
    network=TEXT,
    mode=TEXT,
    epochs=st.integers(1, 10**6),
    fine_tune_epochs=st.integers(0, 10**6),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    weight_decay=st.floats(min_value=0, allow_infinity=False),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    schedule=st.sampled_from(["cosine", "constant"]),
    seed=st.integers(0, 2**63 - 1),
    estimators=st.lists(TEXT, min_size=1, max_size=3).map(tuple),
)


@given(EXPERIMENTS)
@settings(max_examples=60, deadline=None)
def test_an_experiment_is_the_same_through_toml_and_json(experiment: Experiment) -> None:
    assert experiment_from(tomllib.loads(experiment.to_toml()), "toml") == experiment
    assert experiment_from(json.loads(experiment.to_json()), "json") == experiment


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_an_experiment_is_read_from_a_file(tmp_path: Path, suffix: str) -> None:
    experiment = Experiment("näme", mode="momos:capacity=0.05", lr=1e-5, estimators=("raw", "palette|entropy"))
    path = tmp_path / f"run{suffix}"
    path.write_text(experiment.to_json() if suffix == ".json" else experiment.to_toml(), encoding="utf-8")
    assert read_experiment(path) == experiment


def test_fields_that_are_not_given_keep_their_default(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "short"\nlr = 1\n')
    assert read_experiment(path) == Experiment("short", lr=1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", ".."),
        ("name", "a/b"),
        ("name", "a\nb"),
        ("data", 3),
        ("epochs", 0),
        ("epochs", 1.0),
        ("epochs", True),
        ("fine_tune_epochs", -1),
        ("batch_size", 0),
        ("every", 0),
        ("threads", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", "fast"),
        ("weight_decay", -1.0),
        ("optimizer", "adam"),
        ("schedule", "linear"),
        ("seed", -1),
        ("seed", 1 << 63),
        ("estimators", ()),
        ("estimators", "zstd"),
        ("estimators", [1]),
        ("device", "abacus"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=field):
        Experiment(**{"name": "x", field: value})


def test_every_field_is_described() -> None:
    documentation = Experiment.__doc__ or ""
    for field in dataclasses.fields(Experiment):
        assert f"\n    {field.name}\n" in documentation


@pytest.mark.parametrize(
    ("content", "message"),
    [("epochs = 3", "no name"), ('name = "x"\nepoch = 3', "no epoch"), ("name = ", "can't be read"), ("", "no name")],
)
def test_a_file_that_makes_no_sense_is_refused_with_its_path(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(SpecError, match=message) as refusal:
        read_experiment(path)
    assert str(path) in str(refusal.value)


def test_a_json_file_must_hold_a_table(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("[1]")
    with pytest.raises(SpecError, match="table"):
        read_experiment(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        read_experiment(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("network", "mlp:width=3", SpecError),
        ("network", "resnet", UnknownNameError),
        ("mode", "baseline:x=1", SpecError),
        ("mode", "momo", UnknownNameError),
        ("estimators", ("raw", "zip"), UnknownNameError),
    ],
)
def test_specifications_are_checked_before_training(field: str, value: Any, error: type[Exception]) -> None:
    Experiment("x", estimators=("raw",)).check()
    with pytest.raises(error):
        Experiment(**{"name": "x", "estimators": ("raw",), field: value}).check()
