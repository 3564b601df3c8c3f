"""Snapshots: a file gives back exactly the weights that were captured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import kcomplex as kc
from kcomplex.errors import FormatError, WeightsError
from kcomplex.tracking.snapshot import Selection, capture_weights, open_snapshot, write_snapshot
from kcomplex.weights import DTYPES, dtype_name, tensor_from_words, word_dtype, words_an_element, words_of

EVERYTHING = Selection()


class Holder(nn.Module):
    """Holds tensors of any dtype as buffers."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Noisy(nn.Module):
    """A parametrisation that draws random numbers and counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls = self.calls + 1
        return weight + torch.rand_like(weight)

    def right_inverse(self, weight):
        return weight


def through_file(model, folder, selection=EVERYTHING):
    write_snapshot(capture_weights(model, selection), folder / "snapshot.safetensors")
    return open_snapshot(folder / "snapshot.safetensors")


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=5)


def random_tensor(name, shape, generator):
    """A tensor of random bit patterns: NaN payloads, infinities and subnormal numbers among them."""
    dtype = DTYPES[name]
    count = torch.Size(shape).numel() * words_an_element(dtype)
    top = 2 if dtype is torch.bool else 256
    width = 1 if dtype is torch.bool else word_dtype(dtype).itemsize
    words = generator.integers(0, top, count * width, dtype=np.uint8).view(word_dtype(dtype))
    return tensor_from_words(words, dtype, shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(0, 2**32))
def test_a_file_gives_back_every_bit_of_every_dtype(tmp_path_factory, layout, seed):
    generator = np.random.default_rng(seed)
    found = [random_tensor(name, shape, generator) for name, shape in layout]
    model = Holder({f"tensor{index}": tensor for index, tensor in enumerate(found)})
    with through_file(model, tmp_path_factory.mktemp("snapshot")) as weights:
        assert len(weights) == len(found)
        for index, tensor in enumerate(found):
            handle = weights[f"tensor{index}"]
            assert (handle.shape, handle.dtype) == (tuple(tensor.shape), tensor.dtype)
            assert handle.words().tobytes() == words_of(tensor).tobytes()


def test_names_aliases_and_skipped_tensors_come_back(model, tmp_path):
    model[3].tied = model[0].weight
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    live = kc.open_weights(model, exclude=["*.bias"])
    with through_file(model, tmp_path, Selection(exclude=("*.bias",))) as weights:
        assert list(weights) == list(live)
        assert [handle.aliases for handle in weights.values()] == [handle.aliases for handle in live.values()]
        assert weights["0.weight"].aliases == ("3.tied",)
        assert weights.skipped == live.skipped
        assert {item.name for item in weights.skipped} == {"0.bias", "1.bias", "3.bias", "scratch"}


def test_a_snapshot_is_a_plain_safetensors_file(model, tmp_path):
    write_snapshot(capture_weights(model, EVERYTHING), tmp_path / "snapshot.safetensors")
    stored = load_file(tmp_path / "snapshot.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.conj()])
def test_views_are_captured_as_their_elements(view, tmp_path):
    tensor = view(torch.randn(4, 6, dtype=torch.complex128))
    with through_file(Holder({"view": tensor}), tmp_path) as weights:
        assert torch.equal(weights["view"].read(), tensor.resolve_conj())


def test_the_effective_weight_is_captured_under_its_plain_name(tmp_path):
    layer = nn.Linear(3, 2)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    original = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Doubled())
    with through_file(layer, tmp_path) as weights:
        assert list(weights) == ["bias", "weight"]
        assert torch.equal(weights["weight"].read(), 2 * original)


def test_captured_weights_are_copies(model):
    before = model[0].weight.detach().clone()
    captured = capture_weights(model, EVERYTHING)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(captured.tensors["0.weight"].tensor, before)


def test_capturing_leaves_random_states_and_parametrisations_as_they_were():
    layer = spectral_norm(nn.Linear(5, 5))
    noisy = Noisy()
    parametrize.register_parametrization(layer, "bias", noisy)
    model = nn.Sequential(layer)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    capture_weights(model, EVERYTHING)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_selection_that_leaves_nothing_is_refused(model):
    with pytest.raises(WeightsError):
        capture_weights(model, Selection(include=("nothing*",)))


def test_no_temporary_file_stays(model, tmp_path):
    write_snapshot(capture_weights(model, EVERYTHING), tmp_path / "snapshot.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.safetensors"]


def test_a_broken_file_is_refused(model, tmp_path):
    path = tmp_path / "snapshot.safetensors"
    write_snapshot(capture_weights(model, EVERYTHING), path)
    whole = path.read_bytes()
    for data in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(FormatError, match="snapshot"):
            open_snapshot(path)
    with pytest.raises(FormatError):
        open_snapshot(tmp_path / "absent.safetensors")


def test_a_file_of_another_program_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError):
        open_snapshot(tmp_path / "other.safetensors")


def test_dtype_names_are_those_of_the_weights():
    assert {dtype_name(dtype) for dtype in DTYPES.values()} == set(DTYPES)
