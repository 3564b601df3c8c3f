"""Weights: bit patterns there and back, state dicts, live models, selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kcomplex.errors import WeightsError
from kcomplex.measuring.measure import describe
from kcomplex.sources.open import open_weights
from kcomplex.sources.state_dicts import state_dict_weights
from kcomplex.weights import (
    DTYPES,
    TensorHandle,
    Weights,
    squared_error,
    tensor_from_words,
    values_of,
    word_dtype,
    words_an_element,
    words_of,
)

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any bits: NaN payloads, infinities, subnormals and negative zero included."""
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
    width = word_dtype(dtype)
    top = 1 if dtype == torch.bool else np.iinfo(width).max
    count = int(np.prod(shape, dtype=np.int64)) * words_an_element(dtype)
    words = draw(st.lists(st.integers(0, int(top)), min_size=count, max_size=count))
    return tensor_from_words(np.array(words, width), dtype, shape)


@settings(deadline=None)
@given(tensors())
def test_words_there_and_back(tensor: torch.Tensor) -> None:
    words = words_of(tensor)
    assert words.dtype == word_dtype(tensor.dtype)
    assert words.shape == (tensor.numel() * words_an_element(tensor.dtype),)
    back = tensor_from_words(words, tensor.dtype, tuple(tensor.shape))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert words_of(back).tobytes() == words.tobytes()


@settings(deadline=None)
@given(tensors(), st.data())
def test_words_of_views_are_those_of_their_copies(tensor: torch.Tensor, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(tensor.ndim)))
    step = data.draw(st.integers(1, 3))
    view = tensor.permute(order)
    if view.ndim:
        view = view[::step]
    one_by_one = [words_of(view[place]) for place in np.ndindex(*view.shape)]
    assert words_of(view).tolist() == [word for words in one_by_one for word in words.tolist()]


def test_words_keep_what_values_lose() -> None:
    floats = torch.tensor([0.0, -0.0, torch.nan, torch.inf])
    assert words_of(floats).tolist() == [0, 1 << 31, 0x7FC00000, 0x7F800000]
    payload = tensor_from_words(np.array([0x7F800001, 0xFFC00123], np.uint32), torch.float32, (2,))
    assert words_of(payload).tolist() == [0x7F800001, 0xFFC00123]


def test_words_of_conjugate_and_negative_views_are_those_of_their_values() -> None:
    numbers = torch.tensor([1 + 2j, complex(-3.5, -0.0)])
    assert words_of(numbers.conj()).tobytes() == words_of(torch.tensor([1 - 2j, complex(-3.5, 0.0)])).tobytes()
    assert words_of(numbers.conj().imag).tobytes() == words_of(torch.tensor([-2.0, 0.0])).tobytes()


def test_a_complex_number_is_two_words() -> None:
    assert words_of(torch.tensor([1 + 2j])).view(np.float32).tolist() == [1, 2]


def test_words_share_memory_where_they_can() -> None:
    tensor = torch.zeros(2, 3)
    words_of(tensor)[4] = 0x3F800000
    assert tensor.tolist() == [[0, 0, 0], [0, 1, 0]]


@settings(deadline=None)
@given(tensors())
def test_values_are_the_tensors_numbers(tensor: torch.Tensor) -> None:
    values = values_of(tensor)
    shape = (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)
    assert values.shape == shape
    wide = tensor.dtype in (torch.float64, torch.complex128) or not (tensor.is_floating_point() or tensor.is_complex())
    assert values.dtype == (np.float64 if wide else np.float32)
    if not tensor.is_complex() and tensor.dtype != torch.uint64:
        assert np.array_equal(values, tensor.double().numpy(), equal_nan=True)


def test_names_are_sorted_and_sizes_counted() -> None:
    weights = open_weights({"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.complex64), "c": torch.zeros(())})
    assert list(weights) == ["a", "b", "c"]
    assert (weights.elements, weights.nbytes) == (11, 60)
    assert repr(weights) == "<Weights state dict: 3 tensors, 11 weights, 60 bytes>"
    assert weights["c"].shape == ()


def test_what_cant_be_measured_is_skipped_with_a_reason() -> None:
    weights = state_dict_weights(
        {
            "w": torch.ones(1),
            "step": 3,
            "sparse": torch.eye(2).to_sparse(),
            "meta": torch.empty(2, device="meta"),
            "lazy": nn.LazyLinear(2).weight,
            "four": torch.zeros(2, dtype=torch.uint8).view(torch.uint4),
        }
    )
    assert list(weights) == ["w"]
    assert {item.name: (item.reason, item.shape) for item in weights.skipped} == {
        "step": ("not a tensor but int", None),
        "sparse": ("layout sparse_coo isn't supported", (2, 2)),
        "meta": ("meta tensor: it has no data", (2,)),
        "lazy": ("not initialised: run the model once", None),
        "four": ("dtype uint4 isn't supported", (2,)),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_skipped() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert [item.reason for item in state_dict_weights({"n": nested}).skipped] == ["nested tensors aren't supported"]


def test_shared_tensors_count_once_under_all_their_names() -> None:
    base = torch.arange(6.0)
    numbers = torch.ones(2, dtype=torch.complex64)
    weights = state_dict_weights(
        {
            "z": base,
            "a": base.view(6),
            "reshaped": base.view(2, 3),
            "copy": base.clone(),
            "part": base[:3],
            "numbers": numbers,
            "conjugate": numbers.conj(),
            "empty": torch.zeros(0),
            "void": torch.zeros(0),
        }
    )
    assert {name: handle.aliases for name, handle in weights.items() if handle.aliases} == {"a": ("z",)}
    assert len(weights) == 8
    assert weights["conjugate"].words().view(np.float32).tolist() == [1, -0.0, 1, -0.0]


def test_two_tensors_of_one_name_are_refused() -> None:
    handles = [TensorHandle("w", (1,), torch.float32, lambda: torch.ones(1)) for _ in range(2)]
    with pytest.raises(WeightsError, match="two tensors are called 'w'"):
        Weights(handles)


# Live models.


class Doubled(nn.Module):
    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return 2 * latent


class Noisy(nn.Module):
    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return latent + torch.rand_like(latent) if self.training else latent


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_buffer("none", None)
        self.norm.bias.requires_grad_(False)


def test_the_tensors_of_a_model() -> None:
    weights = open_weights(Model())
    assert {name: (handle.aliases, handle.trainable) for name, handle in weights.items()} == {
        "embedding.weight": (("head.weight",), True),
        "norm.bias": ((), False),
        "norm.num_batches_tracked": ((), False),
        "norm.running_mean": ((), False),
        "norm.running_var": ((), False),
        "norm.weight": ((), True),
    }
    assert [(item.name, item.reason, item.shape) for item in weights.skipped] == [
        ("mask", "non-persistent buffer", (2,))
    ]
    assert weights.source == "Model"


def test_a_model_and_its_state_dict_are_the_same_weights() -> None:
    model = Model()
    live, saved = open_weights(model), open_weights(model.state_dict())
    assert {name: (handle.aliases, handle.words().tobytes()) for name, handle in live.items()} == {
        name: (handle.aliases, handle.words().tobytes()) for name, handle in saved.items()
    }


def test_a_live_model_is_read_as_it_is_now() -> None:
    layer = nn.Linear(2, 2)
    weights = open_weights(layer)
    with torch.no_grad():
        layer.weight.fill_(3)
    assert weights["weight"].values().tolist() == [[3, 3], [3, 3]]
    assert not weights["weight"].read().requires_grad


def test_meta_models_have_nothing_to_measure() -> None:
    with torch.device("meta"):
        weights = open_weights(nn.Linear(2, 2))
    assert len(weights) == 0
    assert {item.reason for item in weights.skipped} == {"meta tensor: it has no data"}


def test_a_parametrised_tensor_is_read_as_the_network_computes_with_it() -> None:
    layer = nn.Linear(3, 2)
    latent = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Doubled())
    weights = open_weights(nn.Sequential(layer))
    assert list(weights) == ["0.bias", "0.weight"]
    assert torch.equal(weights["0.weight"].read(), 2 * latent)
    assert weights["0.weight"].trainable
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(1)
    assert weights["0.weight"].values().tolist() == [[2, 2, 2], [2, 2, 2]]
    layer.parametrizations.weight.original.requires_grad_(False)
    assert not open_weights(layer)["weight"].trainable


def test_a_parametrised_layer_in_two_places_counts_once() -> None:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    weights = open_weights(nn.ModuleDict({"first": layer, "second": layer}))
    assert {name: handle.aliases for name, handle in weights.items()} == {
        "first.bias": ("second.bias",),
        "first.weight": ("second.weight",),
    }


def test_reading_a_parametrisation_changes_nothing_and_draws_nothing() -> None:
    layer = nn.Linear(3, 3)
    latent = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Noisy())
    spectral = parametrizations.spectral_norm(nn.Linear(3, 3))
    model = nn.Sequential(layer, spectral).train()
    state = torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = open_weights(model)
    assert torch.equal(weights["0.weight"].read(), latent)
    assert weights["1.weight"].words().tobytes() == weights["1.weight"].words().tobytes()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(part.training for part in model.modules())


def test_a_pruned_tensor_is_read_with_its_zeros() -> None:
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", 0.25)
    prune.l1_unstructured(layer, "weight", 0.5)
    weights = open_weights(layer)
    assert list(weights) == ["bias", "weight"]
    assert (weights["weight"].values() == 0).sum() == 10
    with torch.no_grad():
        layer.weight_orig.fill_(5)
    # The layer's own attribute is stale until the next forward pass; what is read isn't.
    assert sorted(weights["weight"].values().ravel()) == [0] * 10 + [5] * 6
    assert weights["weight"].trainable


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
def test_older_normalisations_are_read_as_the_network_computes_with_them() -> None:
    layer = nn.utils.weight_norm(nn.Linear(4, 3))
    other = nn.utils.spectral_norm(nn.Linear(4, 3)).eval()
    weights = open_weights(nn.Sequential(layer, other))
    assert list(weights) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    inputs = torch.eye(4)
    for number, part in enumerate((layer, other)):
        expected = part(inputs) - part.bias
        assert torch.allclose(expected.T, weights[f"{number}.weight"].read(), atol=1e-6)


def test_a_sharded_tensor_is_gathered() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.arange(6.0).reshape(2, 3)
        weights = state_dict_weights({"w": distribute_tensor(whole, mesh, [Shard(0)])})
        assert type(weights["w"].read()) is torch.Tensor
        assert torch.equal(weights["w"].read(), whole)
    finally:
        dist.destroy_process_group()


# Selection.


def test_selection_by_name() -> None:
    model = Model()
    assert list(open_weights(model, include=["norm.*"], exclude=["*running*", "*num*"])) == ["norm.bias", "norm.weight"]
    assert list(open_weights(model, include="norm.w*")) == ["norm.weight"]
    assert list(open_weights(model, exclude="norm.*")) == ["embedding.weight"]
    # An alias names the tensor too.
    assert list(open_weights(model, include=["head.*"])) == ["embedding.weight"]
    assert "embedding.weight" not in open_weights(model, exclude=["head.*"])
    weights = open_weights(model).select(exclude=["norm.*"])
    assert {item.name: item.reason for item in weights.skipped}["norm.weight"] == "excluded"
    assert {item.name: item.shape for item in weights.skipped}["norm.weight"] == (3,)


def test_selection_of_what_is_trained() -> None:
    model = Model()
    assert list(open_weights(model, trainable=True)) == ["embedding.weight", "norm.weight"]
    assert "norm.bias" in open_weights(model, trainable=False)
    reasons = {item.name: item.reason for item in open_weights(model, trainable=True).skipped}
    assert reasons["norm.running_mean"] == "not trainable"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include": ["nothing.*"]}, r"no tensor matches 'nothing\.\*'; there are a, b"),
        ({"exclude": ["*"]}, "the selection leaves no tensor"),
        ({"trainable": True}, "doesn't say what is trainable"),
    ],
)
def test_selections_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        open_weights({"a": torch.ones(1), "b": torch.ones(1)}, **options)


def test_a_refused_selection_closes_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with open_weights(tmp_path / "x.pt") as weights:
        with pytest.raises(WeightsError):
            open_weights(weights, include="nothing")
        # Weights that someone else opened stay open.
        assert weights["a"].values().tolist() == [1]
    with pytest.raises(WeightsError):
        open_weights(tmp_path / "x.pt", include="nothing")


def test_measuring_a_selection_leaves_the_weights_open(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    with open_weights(tmp_path / "x.pt") as weights:
        describe(weights, "raw", include="a")
        assert weights["b"].values().tolist() == [1]


def test_a_source_of_another_kind_is_refused() -> None:
    with pytest.raises(WeightsError, match="can't take weights from a list"):
        open_weights([torch.ones(1)])  # type: ignore[arg-type]


def test_a_tied_weight_under_one_parametrisation_counts_once() -> None:
    from kcomplex.training.protocol.sequence import mode

    model = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embedding"].weight
    mode("uniform_qat:bits=3").prepare(model)
    weights = open_weights(model)
    assert {name: handle.aliases for name, handle in weights.items()} == {"embedding.weight": ("head.weight",)}
    assert len(torch.unique(weights["embedding.weight"].read())) <= 7


def test_two_buffers_under_one_parametrisation_stay_two() -> None:
    class Negated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    model = nn.Module()
    model.register_buffer("one", torch.ones(3))
    model.register_buffer("two", torch.full((3,), 2.0))
    negated = Negated()
    for name in ("one", "two"):
        parametrize.register_parametrization(model, name, negated)
    assert {name: handle.read().tolist() for name, handle in open_weights(model).items()} == {
        "one": [-1.0] * 3,
        "two": [-2.0] * 3,
    }


def test_a_squared_error_does_not_depend_on_the_layout_in_memory() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(301, 200).t(), torch.randn(301, 200).t()
    assert squared_error(one, other) == squared_error(one.contiguous(), other.contiguous())
