"""What is told of codes before a tensor is coded whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kcomplex.compressors.best.race import Entrant, View, _counted, _places, promising
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.sources.open import open_weights


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


TENSORS = {
    "float": noise(300, 200),
    "half": noise(300, 200).half(),
    "integers": (noise(300, 200) * 5).round().to(torch.int8),
    "wide integers": (noise(300, 200) * 500).round().to(torch.int32),
    "constant": torch.ones(300, 200),
    "one": torch.tensor([3.0]),
    "scalar": torch.tensor(3),
    "complex": torch.complex(noise(30, 20), noise(30, 20)),
}


def entrants(tensor: torch.Tensor, *specs: str) -> list[Entrant]:
    view = View(open_weights({"w": tensor})["w"])
    codes = [build_estimator(spec) for spec in specs]
    return [Entrant(place, view, code, lambda _, code=code: code.memory(b"")) for place, code in enumerate(codes)]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("spec", ["raw", "entropy", "planes|entropy"])
def test_what_is_counted_is_no_more_than_it_takes_and_hardly_less(name, spec):
    (entrant,) = entrants(TENSORS[name], spec)
    promise = _counted(entrant)
    if promise is None:
        assert spec == "entropy"
        assert TENSORS[name].element_size() > 2
        return
    length = len(entrant.view.encode(entrant.code, entrant.trial()).to_bytes())
    if math.isfinite(promise):
        assert promise <= length <= 1.002 * promise + 16
    else:
        assert spec == "planes|entropy"
        assert TENSORS[name].element_size() == 1


def test_the_likeliest_stands_first_and_what_cannot_win_is_left_out():
    scales = torch.logspace(-1, 1, 300)[:, None]
    tensor = (noise(300, 600) * scales * 5).round().clamp(-120, 120).to(torch.int8)
    found = promising(entrants(tensor, "raw", "planes|zstd", "entropy", "planes|context"))
    assert [entrant.choice for _, entrant in found] == [3, 2]


@given(st.one_of(st.lists(st.integers(1, 600), max_size=2), st.lists(st.integers(1, 60), max_size=3)).map(tuple))
def test_samples_are_entries_of_the_matrix(shape):
    elements = math.prod(shape)
    before = 0
    for rows, columns in filter(None, (_places(shape, place) for place in range(2))):
        assert rows.min() >= 0
        assert columns.min() >= 0
        assert len(np.unique(rows)) * len(np.unique(columns)) == rows.size * columns.size
        assert before < rows.size * columns.size <= elements / 4
        view = View(open_weights({"w": torch.arange(elements).reshape(shape)})["w"])
        assert view.sample(rows, columns).handle.read().unique().numel() == rows.size * columns.size
        before = rows.size * columns.size
    assert bool(before) == (elements >= 1 << 15)


def test_distinct_words_are_counted_about():
    view = View(open_weights({"w": torch.arange(200_000)})["w"])
    assert view.distinct == pytest.approx(200_000, rel=0.02)
    assert View(open_weights({"w": torch.arange(200_000) % 7})["w"]).distinct == pytest.approx(7, abs=0.1)
    assert View(open_weights({"w": (torch.arange(200_000) % 700).short()})["w"]).distinct == 700
