"""Sweeps: what a file expands to."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex.analyses.experiments.experiment import Experiment
from kcomplex.analyses.experiments.networks.networks import network
from kcomplex.analyses.experiments.sweep import expand, read_sweep
from kcomplex.errors import SpecError
from kcomplex.training.protocol.sequence import mode

SWEEPS = Path(__file__).parents[2] / "analyses" / "sweeps"


def test_every_combination_is_run_the_last_key_fastest() -> None:
    experiments = expand({"experiment": {"epochs": 5}, "sweep": {"mode": ["baseline", "codeq"], "seed": [0, 1]}})
    assert experiments == [
        Experiment("baseline_seed=0", mode="baseline", seed=0, epochs=5),
        Experiment("baseline_seed=1", mode="baseline", seed=1, epochs=5),
        Experiment("codeq_seed=0", mode="codeq", seed=0, epochs=5),
        Experiment("codeq_seed=1", mode="codeq", seed=1, epochs=5),
    ]


def test_runs_override_and_are_crossed_with_the_sweep() -> None:
    experiments = expand(
        {
            "experiment": {"epochs": 5, "lr": 0.1},
            "sweep": {"seed": [3, 4]},
            "runs": [{"mode": "codeq", "lr": 0.2}, {"name": "sparse", "mode": "pmmp", "fine_tune_epochs": 2}],
        }
    )
    assert experiments == [
        Experiment("lr=0.2_codeq_seed=3", mode="codeq", lr=0.2, seed=3, epochs=5),
        Experiment("lr=0.2_codeq_seed=4", mode="codeq", lr=0.2, seed=4, epochs=5),
        Experiment("sparse_seed=3", mode="pmmp", fine_tune_epochs=2, lr=0.1, seed=3, epochs=5),
        Experiment("sparse_seed=4", mode="pmmp", fine_tune_epochs=2, lr=0.1, seed=4, epochs=5),
    ]


def test_an_empty_sweep_is_one_run() -> None:
    assert expand({}) == [Experiment("run")]


def test_names_are_fit_for_file_systems() -> None:
    names = [
        item.name for item in expand({"sweep": {"mode": ["momos:block_size=4,capacity=0.01"], "data": ["hf:a/b"]}})
    ]
    assert names == ["momos-block_size=4,capacity=0.01_hf-a-b"]


@given(
    st.dictionaries(
        st.sampled_from(["seed", "epochs", "batch_size", "every"]),
        st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    )
)
@settings(max_examples=40, deadline=None)
def test_a_product_has_as_many_differently_named_runs_as_combinations(swept: dict[str, list[int]]) -> None:
    experiments = expand({"sweep": swept})
    assert len({item.name for item in experiments}) == len(experiments) == math.prod(map(len, swept.values()))
    for item in experiments:
        assert all(getattr(item, key) in values for key, values in swept.items())


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"experiments": {}}, "no table experiments"),
        ({"experiment": {"epoch": 1}}, "no epoch"),
        ({"sweep": {"epoch": [1]}}, "no epoch"),
        ({"runs": [{"epoch": 1}]}, "no epoch"),
        ({"sweep": {"seed": 1}}, "seed must be a list"),
        ({"sweep": {"seed": []}}, "seed must be a list"),
        ({"sweep": {"seed": [0, 0]}}, "two runs would be called 'seed=0'"),
        ({"sweep": {"seed": [0, -1]}}, "seed must be in"),
        ({"sweep": {"seed": [0]}, "runs": [{"seed": 1}]}, "seed is swept and also set"),
        ({"sweep": {"name": ["a"]}}, "only in"),
        ({"experiment": {"name": "a"}}, "only in"),
        ({"runs": [{"mode": "codeq"}, {"mode": "codeq"}]}, "two runs would be called 'codeq'"),
        ({"runs": {"mode": "codeq"}}, "list of tables"),
        ({"runs": []}, "list of tables"),
        ({"runs": ["codeq"]}, "list of tables"),
        ({"sweep": ["codeq"]}, "tables"),
    ],
)
def test_what_makes_no_sense_is_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        expand(tables)


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    from kcomplex.analyses.experiments import sweep

    text = (sweep.__doc__ or "").partition("::")[2]
    path = tmp_path / "sweep.toml"
    path.write_text("\n".join(line.strip() for line in text.splitlines()))
    assert [item.name for item in read_sweep(path)] == [
        *(f"codeq_seed={seed}" for seed in range(3)),
        *(f"sparse_seed={seed}" for seed in range(3)),
    ]


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text("[sweep]\nseed = 3\n")
    with pytest.raises(SpecError, match=r"sweep\.toml"):
        read_sweep(path)


SHAPES = {
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "hf:uoft-cs/cifar10": (3, 32, 32),
    "tinyshakespeare:window=256": (256,),
}


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.toml")), ids=lambda file: file.stem)
def test_the_sweeps_that_are_kept_can_be_run(file: Path) -> None:
    experiments = read_sweep(file)
    told = re.search(r"(\d+) runs", file.read_text())
    assert told is not None
    assert len(experiments) == int(told[1])
    for experiment in experiments:
        experiment.check()
    for spec, name in {(item.network, item.data) for item in experiments}:
        built = network(spec).build(SHAPES[name], 65)
        for chosen in {item.mode for item in experiments if item.network == spec}:
            mode(chosen).with_samples(1000).prepare(copy.deepcopy(built))
