"""Relative codes: given a checkpoint, or an initialisation by its recipe; what a stream names is never run unasked."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kcomplex as kc
from kcomplex.errors import KComplexError, SpecError, StreamError, VerificationError
from kcomplex.estimators.differences import _unzigzag, _zigzag, ordered_words
from kcomplex.estimators.given import given_of
from kcomplex.kcz.container import Container, decode, encode, verify
from kcomplex.measuring.stream import prove
from kcomplex.weights import DTYPES, tensor_from_words, word_dtype, words_an_element, words_of

HERE = "tests.estimators.initialisations"
CODES = ["raw", "zstd", "planes|zstd", "palette|entropy", "best", "best:tier=tight"]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture(autouse=True)
def _factories(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.syspath_prepend(request.config.rootpath)


def base() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "same": torch.randn(30, 20, generator=random),
        "moved": torch.randn(60, 50, generator=random),
        "integers": torch.randint(-9, 9, (40, 8), generator=random, dtype=torch.int8),
        "other shape": torch.zeros(4, 5),
        "other dtype": torch.zeros(6),
        "waves": torch.randn(7, generator=random, dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
    }


def later() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tensors = base()
    tensors["moved"] += 1e-3 * torch.randn(60, 50, generator=random)
    tensors["integers"][3] += 1
    tensors["other shape"] = torch.ones(5, 4)
    tensors["other dtype"] = torch.zeros(6, dtype=torch.float64)
    tensors["waves"] = -tensors["waves"]
    tensors["additional"] = torch.ones(3)
    return tensors


def assert_same(decoded: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (decoded[name].dtype, decoded[name].shape) == (tensor.dtype, tensor.shape)
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes()


@pytest.mark.parametrize("spec", CODES)
def test_a_relative_code_is_as_long_as_it_says_and_gives_every_bit_back(spec: str) -> None:
    (description,) = kc.describe(later(), spec, given=base())
    stream = kc.encode_checkpoint(later(), spec, given=base())
    assert (description.kind, description.lossless) == ("code", True)
    assert 8 * len(stream) == description.bits == math.fsum(description.parts.values())
    assert_same(kc.decode_checkpoint(stream, given=base()), later())
    prove(later(), description, given=base())


@pytest.mark.parametrize("spec", CODES)
def test_what_is_as_given_takes_no_byte_and_what_is_near_takes_less(spec: str) -> None:
    (relative,) = kc.describe(later(), spec, given=base())
    (plain,) = kc.describe(later(), spec)
    bits = {tensor.name: tensor.value for tensor in relative.tensors}
    alone = {tensor.name: tensor.value for tensor in plain.tensors}
    assert bits["same"] == bits["empty"] == 0
    assert bits["additional"] == alone["additional"]
    assert spec == "raw" or bits["moved"] < 0.8 * alone["moved"]
    # One byte says where the given weights are of no use.
    assert all(bits[name] <= alone[name] + 8 for name in bits)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bits_come_back_given_any_others(data: st.DataObject) -> None:
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    size = math.prod(shape) * words_an_element(dtype)
    few = st.sampled_from([0, 1, 127, 128, 255])

    def tensor() -> torch.Tensor:
        length = size * word_dtype(dtype).itemsize
        raw = np.array(data.draw(st.lists(few, min_size=length, max_size=length)), np.uint8)
        return tensor_from_words((raw & 1 if dtype is torch.bool else raw).view(word_dtype(dtype)), dtype, shape)

    one, other = {"w": tensor()}, {"w": tensor()}
    spec = data.draw(st.sampled_from(CODES))
    assert_same(kc.decode_checkpoint(kc.encode_checkpoint(one, spec, given=other), given=other), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int16])
def test_neighbours_in_value_are_neighbours_in_order(dtype: torch.dtype) -> None:
    words = words_of(torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]).to(dtype))
    ordered = ordered_words(words, dtype)
    steps = (ordered[1:] - ordered[:-1]).view(f"i{ordered.itemsize}")
    assert (steps >= 0).all()
    assert np.array_equal(ordered_words(ordered, dtype), words)


@given(st.lists(st.integers(0, 255)))
def test_zigzag_comes_back(numbers: list[int]) -> None:
    differences = np.array(numbers, np.uint8)
    folded = _zigzag(differences)
    assert np.array_equal(_unzigzag(folded), differences)
    assert all(small <= 2 * abs(int(step)) for small, step in zip(folded, differences.view(np.int8), strict=True))


def test_a_recipe_is_worth_the_initialisation_that_it_rebuilds() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 5))
    recipe = f"seed:factory={HERE}:two_layers,seed=5"
    state = torch.get_rng_state()
    stream = kc.encode_checkpoint(model, "zstd", given=recipe)
    assert len(stream) < 400
    assert_same(kc.decode_checkpoint(stream, given=recipe), model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert kc.build_estimator(f"given:{recipe}|zstd").spec == f"given:{recipe}|zstd"
    assert 8 * len(stream) == kc.describe(model, f"given:{recipe}|zstd")[0].bits
    # Who has the weights needs no recipe.
    assert_same(kc.decode_checkpoint(stream, given=model), model.state_dict())


@pytest.fixture(scope="module")
def resnet18(request: pytest.FixtureRequest) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath)
        torch.manual_seed(0)
        network: nn.Module = importlib.import_module(HERE).resnet18()
    return network


def test_a_new_resnet18_is_two_kilobytes_given_its_seed(resnet18: nn.Module) -> None:
    recipe = f"seed:factory={HERE}:resnet18,seed=0"
    stream = kc.encode_checkpoint(resnet18, "lin", given=recipe)
    assert sum(parameter.numel() for parameter in resnet18.parameters()) == 11_689_512
    assert len(stream) < 2000
    assert_same(kc.decode_checkpoint(stream, given=recipe), resnet18.state_dict())


@pytest.mark.parametrize("spec", ["zstd", "planes|zstd"])
def test_a_new_resnet18_is_incompressible_to_everything_else(resnet18: nn.Module, spec: str) -> None:
    assert kc.describe(resnet18, spec)[0].bits_per_weight > 26


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lzma", "bz2", "planes|lzma", "palette|entropy", "context", "best", "mix", "lin"])
def test_a_new_resnet18_is_incompressible_to_the_slower_ones(resnet18: nn.Module, spec: str) -> None:
    # The largest three matrices hold 60 % of the weights: more of what the others are.
    [description] = kc.describe(resnet18, spec, exclude=["layer4.0.conv2*", "layer4.1*"])
    assert description.bits_per_weight > 26


def test_a_recipe_may_have_arguments_and_make_a_state_dict() -> None:
    recipe = f"seed:factory={HERE}:two_layers,seed=3,width=7"
    assert given_of(given_of(recipe).stream_text("00")).text == recipe
    assert given_of(recipe).open()[0]["0.weight"].shape == (7, 20)
    assert given_of(f"seed:factory={HERE}:state_dict,seed=-1").open()[0]["w"].shape == (40, 30)


def test_decoding_never_runs_what_a_stream_names_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    recipe = f"seed:factory={HERE}:two_layers,seed=5"
    stream = kc.encode_checkpoint(given_of(recipe).open()[0], "zstd", given=recipe)
    monkeypatch.setenv("KCOMPLEX_TEST_CALLED", str(called))
    with pytest.raises(StreamError, match=r"imports and calls .*two_layers.*giving the same again"):
        kc.decode_checkpoint(stream)
    with pytest.raises(StreamError, match="given other weights"):
        kc.decode_checkpoint(stream, given=base())
    assert not called.exists()
    kc.decode_checkpoint(stream, given=recipe)
    assert called.exists()


def test_other_weights_than_the_given_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = kc.encode_checkpoint(later(), "zstd", given=base())
    with pytest.raises(StreamError, match="give them for decoding"):
        kc.decode_checkpoint(stream)
    with pytest.raises(StreamError, match="given other weights"):
        kc.decode_checkpoint(stream, given=later())
    recipe = f"seed:factory={HERE}:two_layers,seed=5"
    stream = kc.encode_checkpoint(given_of(recipe).open()[0], "zstd", given=recipe)
    with pytest.raises(StreamError, match=r"given other weights"):
        kc.decode_checkpoint(stream, given=recipe.replace("seed=5", "seed=6"))
    # A PyTorch that draws other numbers is told.
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(StreamError, match=r"and this is 1\.0"):
        kc.decode_checkpoint(stream, given=recipe.replace("seed=5", "seed=6"))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("seed:factory=nothing", "isn't of the form"),
        ("seed:factory=a:b,seed=x", "isn't of the form"),
        ("seed:factory=a:b,seed", "isn't of the form"),
        (
            "seed:factory=kcomplex_absent:b,seed=1",
            "'kcomplex_absent' can't be imported .*ModuleNotFoundError.*PYTHONPATH",
        ),
        (f"seed:factory={HERE}:absent,seed=1", "has no function 'absent'"),
        (f"seed:factory={HERE}:broken,seed=1", "broken failed .RuntimeError: no such network"),
        (f"seed:factory={HERE}:ending,seed=1", "ending failed .SystemExit: 3"),
        (f"seed:factory={HERE}:nothing,seed=1", "nothing failed .*can't take weights from a NoneType"),
        (f"seed:factory={HERE}:two_layers,seed=1,depth=3", "TypeError"),
        ("nothing.safetensors", "nothing.safetensors"),
        ("", "name a checkpoint"),
    ],
)
def test_what_cannot_be_given_is_one_clear_error(wrong: str, told: str) -> None:
    with pytest.raises(KComplexError, match=told):
        kc.describe(base(), "zstd", given=wrong)


@pytest.mark.parametrize("spec", ["l2", "plugin_entropy", "given:x|zstd|zstd", "given:x|given:y|zstd"])
def test_estimators_without_a_use_for_given_weights_say_so(spec: str) -> None:
    with pytest.raises(KComplexError):
        kc.build_estimator(spec if spec.startswith("given") else f"given:x|{spec}")
    with pytest.raises(SpecError, match="no use for given weights"):
        kc.describe(base(), "l2", given=base())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_relative_stream_is_refused_or_decodes_to_others(data: st.DataObject) -> None:
    stream = bytearray(_STREAM or _STREAM.extend(kc.encode_checkpoint(later(), "planes|zstd", given=base())) or _STREAM)
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
    else:
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        kc.decode_checkpoint(bytes(stream), given=base())
    except KComplexError:
        return


def test_files_go_and_come_back_given_a_file(tmp_path: Path) -> None:
    names = ("old.safetensors", "new.safetensors", "new.kcz", "back.safetensors")
    old, new, packed, back = (tmp_path / name for name in names)
    safetensors.torch.save_file(base(), old)
    safetensors.torch.save_file(later(), new)
    size = encode(new, packed, "planes|zstd", given=old, jobs=2)
    assert size < 0.8 * encode(new, tmp_path / "plain.kcz", "planes|zstd")
    assert str(old).encode() not in packed.read_bytes()
    assert verify(packed, new, given=old, jobs=2) == 0
    decode(packed, back, given=old)
    assert back.read_bytes() == new.read_bytes()
    with Container(packed, given=old) as container:
        assert torch.equal(container.tensor("moved"), later()["moved"])
    with pytest.raises(StreamError, match="give them for decoding"):
        verify(packed)
    with pytest.raises(StreamError, match="other weights"):
        verify(packed, given=new)
    with pytest.raises(VerificationError):
        verify(packed, old, given=old)


_STREAM: list[int] = []


class Tied(nn.Module):
    """An output layer that shares the embedding's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(200, 100)
        self.lm_head = nn.Linear(100, 200, bias=False)
        self.lm_head.weight = self.wte.weight


@pytest.mark.parametrize("stored", ["wte.weight", "lm_head.weight"])
def test_a_tied_tensor_is_given_under_any_of_its_names(tmp_path: Path, stored: str) -> None:
    model, path = Tied(), tmp_path / "base.safetensors"
    safetensors.torch.save_file({stored: model.wte.weight.detach()}, path)
    for given_ in (path, model.state_dict(), model):
        description = kc.describe(model, "lin", given=given_)[0]
        assert description.bits < 1500
        prove(model, description, given=given_)
