"""Where the bits are: tables that sum to the description, the floor, and the shuffled control."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from kcomplex.errors import SpecError
from kcomplex.estimators.code import Code, EncodedTensor
from kcomplex.estimators.coder import Part
from kcomplex.estimators.description import SHARED
from kcomplex.measuring.explanation import (
    FLOOR,
    MEASURED,
    SHUFFLED,
    TOTAL,
    by_part,
    by_tensor,
    explain,
    fold_short_tensors,
)
from kcomplex.measuring.measure import describe
from kcomplex.measuring.shuffling import shuffled_weights
from kcomplex.sources.open import open_weights
from kcomplex.weights import words_of

SPECS = ["zstd", "planes|zstd", "palette|entropy", "mix", "best", "mosaic|entropy", "uniform:bits=4|mix"]


def network(layers: int = 4) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for i in range(layers):
        scales = torch.rand(30 + i, 1, generator=random) * 3
        tensors[f"{i}.weight"] = torch.randn(30 + i, 40, generator=random) * scales
        tensors[f"{i}.bias"] = torch.zeros(30 + i)
    tensors["steps"] = torch.tensor(7)
    tensors["none"] = torch.zeros(0, 3)
    return tensors


@pytest.mark.parametrize("spec", SPECS)
def test_every_bit_is_in_one_row(spec):
    (explanation,) = explain(network(), spec, shuffle=0)
    description = explanation.description
    frame = explanation.to_frame()
    assert set(frame["measured"]) == {MEASURED, FLOOR, SHUFFLED}
    rows = frame[frame["measured"] == MEASURED]
    assert math.fsum(rows["bits"]) == description.bits == describe(network(), spec)[0].bits
    parts = rows[rows["bits"] > 0].groupby("part")["bits"].sum().to_dict()
    assert parts == pytest.approx({part: bits for part, bits in description.parts.items() if bits})
    for tensor in description.tensors:
        assert math.fsum(rows.loc[rows["tensor"] == tensor.name, "bits"]) == tensor.value
    assert (frame.loc[frame["measured"] == FLOOR, "kind"] == "proxy").all()
    assert (frame.loc[frame["measured"] != FLOOR, "kind"] == description.kind).all()
    assert explanation.shuffled is not None
    assert math.fsum(frame.loc[frame["measured"] == SHUFFLED, "bits"]) == explanation.shuffled.bits


@pytest.mark.parametrize("spec", ["mix", "planes|zstd"])
def test_the_tables_agree_with_each_other(spec):
    (explanation,) = explain(network(), spec, shuffle=1)
    frame = explanation.to_frame()
    weights = explanation.description.weights
    for folded in (frame, fold_short_tensors(frame, 3)):
        parts, tensors = by_part(folded), by_tensor(folded)
        for table in (parts, tensors):
            assert table.iloc[-1, 0] == TOTAL
            assert table["bits"].iloc[-1] == explanation.description.bits
            assert table["bits"].iloc[:-1].sum() == pytest.approx(explanation.description.bits)
            assert table["share"].iloc[:-1].sum() == pytest.approx(1)
            assert table["bits_per_weight"].iloc[-1] == pytest.approx(explanation.description.bits_per_weight)
            floor = math.fsum(floor.bits for floor in explanation.floors)
            assert table["floor_bits_per_weight"].iloc[-1] * weights == pytest.approx(floor)
            assert table["beyond_histogram"].iloc[-1] * weights == pytest.approx(
                explanation.shuffled.bits - explanation.description.bits
            )
    names = list(by_tensor(fold_short_tensors(frame, 3))["tensor"])
    assert names == ["1.weight", "2.weight", "3.weight", "(7 other tensors)", SHARED, TOTAL]
    sizes = by_tensor(fold_short_tensors(frame, 3)).set_index("tensor")["weights"]
    assert sizes[["1.weight", "2.weight", "3.weight", "(7 other tensors)"]].sum() == sizes[TOTAL] == weights


def test_a_floats_bits_are_split_by_field():
    frame = explain(network(), "mix")[0].to_frame()
    measured = frame[frame["measured"] == MEASURED].groupby("part")["bits"].sum()
    floor = frame[frame["measured"] == FLOOR].groupby("part")["bits"].sum()
    assert {"signs", "exponents", "mantissas", "low mantissa bits"} <= set(measured[measured > 0].index)
    assert {"signs", "exponents", "mantissas", "raw mantissa bits"} <= set(floor[floor > 0].index)
    assert measured["signs"] == pytest.approx(floor["signs"], rel=0.05)


def test_planes_are_counted_apart():
    parts = describe(network(), "planes|zstd")[0].parts
    assert parts["byte plane 1"] < parts["byte plane 2"]
    assert set(describe({"w": torch.zeros(9)}, "planes:unit=bit|zstd")[0].parts) == {
        "structure",
        "tables",
        *(f"byte plane {place}" for place in range(1, 5)),
    }
    assert "payload" in describe({"w": torch.zeros(9, dtype=torch.uint8)}, "planes|zstd")[0].parts


def test_structure_beyond_the_histogram_is_what_shuffling_destroys():
    pattern = torch.arange(20_000).remainder(16).reshape(100, 200).float()
    (structured,) = explain({"w": pattern}, "palette|zstd", shuffle=0)
    last = by_tensor(structured.to_frame()).iloc[-1]
    assert last["bits_per_weight"] < 0.2
    assert last["floor_bits_per_weight"] == pytest.approx(4, abs=0.01)
    assert 3.8 < last["beyond_histogram"] < 4.3
    random = shuffled_weights(open_weights({"w": pattern}), seed=5)
    (plain,) = explain(random, "palette|entropy", shuffle=0)
    assert abs(by_tensor(plain.to_frame()).iloc[-1]["beyond_histogram"]) < 0.01


def test_the_floor_of_a_lossy_code_is_that_of_what_it_gives_back():
    floor = explain(network(), "uniform:bits=4|entropy")[0].floors[1]
    assert floor.name == "0.weight"
    assert floor.distinct <= 16
    assert floor.bits < 4 * floor.weights
    lossless = explain(network(), "entropy")[0].floors[1]
    assert lossless.bits > 20 * lossless.weights


@dataclass(frozen=True)
class Forgetful(Code):
    """Gives back zeros only."""

    name: ClassVar[str] = "forgetful"

    def encode(self, handle, memory, known=None):
        return EncodedTensor([Part("payload", b"x")], squared_error=1.0, exact=False)

    def decode(self, entry, data, memory, known=None):
        return torch.zeros(entry.shape, dtype=entry.dtype)


def test_a_lossy_code_without_a_quantiser_has_no_floor(monkeypatch):
    monkeypatch.setattr(Forgetful, "spec", "forgetful")
    monkeypatch.setattr(Forgetful, "full_spec", "forgetful")
    (explanation,) = explain(network(), Forgetful())
    assert not explanation.floors
    assert set(explanation.to_frame()["measured"]) == {MEASURED}


def test_measures_that_are_not_in_bits_have_nothing_to_split():
    with pytest.raises(SpecError, match="'sparsity' measures a share, not bits"):
        explain(network(), "sparsity")


def test_a_length_without_parts_is_one_payload():
    frame = explain(network(), "plugin_entropy")[0].to_frame()
    assert set(frame.loc[frame["measured"] == MEASURED, "part"]) == {"payload"}


def test_progress_names_what_is_done():
    seen = []
    explain(network(), ["zstd", "raw"], shuffle=0, progress=lambda label, handle: seen.append(label))
    assert list(dict.fromkeys(seen)) == ["zstd", "floor", "zstd, shuffled", "raw", "raw, shuffled"]
    assert seen.count("floor") == len(network())


def test_the_result_does_not_depend_on_the_number_of_jobs():
    one, two = (explain(network(), "palette|entropy", shuffle=0, jobs=jobs)[0].to_frame() for jobs in (1, 2))
    assert one.equals(two)


def test_shuffling_keeps_every_weight_and_is_the_same_at_every_read():
    tensors = network() | {
        "waves": torch.view_as_complex(torch.randn(500, 2, generator=torch.Generator().manual_seed(0))),
        "view": torch.arange(200).reshape(10, 20).t()[::2],
    }
    shuffled = shuffled_weights(open_weights(tensors))
    for name, tensor in tensors.items():
        first, again = shuffled[name].read(), shuffled[name].read()
        assert first.dtype == tensor.dtype
        assert first.shape == tensor.shape
        assert words_of(first).tobytes() == words_of(again).tobytes()
        width = tensor.element_size()
        pieces = [words_of(item).tobytes() for item in (first, tensor)]
        entries = [sorted(data[i : i + width] for i in range(0, len(data), width)) for data in pieces]
        assert entries[0] == entries[1]
    assert not torch.equal(shuffled["0.weight"].read(), tensors["0.weight"])


def test_a_permutation_depends_on_seed_and_name_alone():
    weights = open_weights({"a": torch.arange(100), "b": torch.arange(100)})
    a, b = (shuffled_weights(weights)[name].words() for name in "ab")
    assert not np.array_equal(a, b)
    assert np.array_equal(shuffled_weights(weights.select("b"))["b"].words(), b)
    assert not np.array_equal(shuffled_weights(weights, seed=1)["a"].words(), a)
    with pytest.raises(SpecError, match="negative"):
        shuffled_weights(weights, seed=-1)
