"""Descriptions: itemised, consistent, and the same however they are measured."""

from __future__ import annotations

import json
import math

import pytest
import torch

import kcomplex as kc
from kcomplex.errors import WeightsError
from kcomplex.estimators.description import Description

SPECS = ["raw", "zstd", "palette|entropy", "uniform:bits=4|entropy", "plugin_entropy", "sparsity", "l2", "bdm"]


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 20), torch.nn.BatchNorm1d(20), torch.nn.ReLU(), torch.nn.Linear(20, 3)
    )


def test_parts_sum_to_the_bits_and_tensors_to_all_but_the_shared_parts(model: torch.nn.Module) -> None:
    for description in kc.describe(model, [spec for spec in SPECS if spec not in ("sparsity", "l2", "bdm")]):
        assert math.fsum(description.parts.values()) == description.bits
        own = description.bits - sum(tensor.value for tensor in description.tensors)
        expected = description.parts.get("structure", 0.0) - sum(
            t.parts.get("structure", 0) for t in description.tensors
        )
        assert own == pytest.approx(expected)


def test_raw_is_the_raw_size_plus_the_structure(model: torch.nn.Module) -> None:
    (raw,) = kc.describe(model, "raw")
    same = sum(tensor.raw_bits for tensor in raw.tensors if tensor.same_as)
    assert raw.parts["payload"] == raw.raw_bits - same
    assert raw.bits == raw.raw_bits - same + raw.parts["structure"]


def test_threads_do_not_change_the_numbers(model: torch.nn.Module) -> None:
    alone, together = (kc.describe(model, SPECS, jobs=jobs).to_frame().drop(columns="seconds") for jobs in (1, 2))
    assert alone.equals(together)


def test_what_is_left_out_is_told(model: torch.nn.Module) -> None:
    (description,) = kc.describe(model, "zstd", exclude=["*running*"])
    assert {(item.name, item.reason) for item in description.skipped} == {
        ("1.running_mean", "excluded"),
        ("1.running_var", "excluded"),
    }
    assert description.weights == sum(
        tensor.numel() for name, tensor in model.state_dict().items() if "running" not in name
    )


def test_frames_and_json_hold_the_same_numbers(model: torch.nn.Module) -> None:
    descriptions = kc.describe(model, SPECS)
    frame = descriptions.to_frame()
    documents = json.loads(descriptions.to_json())
    assert list(frame["estimator"]) == [document["estimator"] for document in documents] == SPECS
    assert list(frame["value"]) == [document["value"] for document in documents]
    rows = descriptions.to_frame(per_tensor=True)
    assert len(rows) == len(SPECS) * len(model.state_dict()) - 1, "integers have no norm"
    assert "1.num_batches_tracked" in {item.name for item in descriptions["l2"].skipped}
    assert descriptions["zstd"] is descriptions[1]


def test_units_and_kinds_are_never_mixed_up(model: torch.nn.Module) -> None:
    descriptions = kc.describe(model, SPECS)
    assert descriptions["sparsity"].unit == "share"
    assert math.isnan(descriptions["sparsity"].bits)
    assert descriptions["bdm"].kind == "proxy"
    assert descriptions["bdm"].lossless is None
    assert descriptions["uniform:bits=4|entropy"].lossless is False
    assert "proxy" in repr(descriptions["l2"])


def test_parts_that_do_not_sum_are_refused() -> None:
    with pytest.raises(WeightsError, match="parts sum to"):
        Description("x", "code", "bits", 10, {"payload": 9}, (), 1, 8, True, 0.0, 0.0, "0")


def test_json_has_no_nan_and_no_infinity() -> None:
    diverged = kc.describe({"w": torch.tensor([1.0, float("inf"), float("nan")])}, ["l2", "zstd"])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(diverged.to_json(), parse_constant=refuse)[0]["value"] is None


def test_no_weights_at_all_are_an_error_unless_asked_for() -> None:
    for measure in (kc.describe, kc.encode_checkpoint):
        with pytest.raises(WeightsError, match="no tensor"):
            measure({}, "zstd")
    (description,) = kc.describe({}, "zstd", partial=True)
    assert description.weights == 0
    assert math.isnan(description.bits_per_weight)
    with pytest.raises(WeightsError, match="no tensor that could be encoded"):
        kc.encode_checkpoint({}, "zstd", partial=True)


def test_a_plot_names_the_kind(model: torch.nn.Module) -> None:
    axes = kc.describe(model, "zstd")[0].plot()
    assert axes.get_xlabel() == "zstd (code), bits per weight"
