"""What every registered estimator must do, alone or in the pipelines that it is made for."""

import dataclasses
import json
import math
import tracemalloc
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcomplex.cli.estimators import stage_kind
from kcomplex.errors import KComplexError, PluginError
from kcomplex.estimators import pipeline
from kcomplex.estimators.code import Code
from kcomplex.estimators.coder import Coder, Quantiser, Transform
from kcomplex.estimators.estimator import Estimator
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.spec import build, spec_of, split_stages
from kcomplex.measuring.descriptions import Descriptions
from kcomplex.measuring.floor import tensor_floor
from kcomplex.measuring.shuffling import shuffled_weights
from kcomplex.measuring.stream import decode_checkpoint, encode_checkpoint, prove
from kcomplex.registry import registry
from kcomplex.sources.open import open_weights
from kcomplex.weights import DTYPES, Weights, words_of

GROUP = "kcomplex.estimators"

# PyTorch says so once a process, whoever first makes a complex32 tensor.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

# Specifications that between them name every estimator; a new one gets its line here.
SPECS = [
    "raw",
    "zlib",
    "zlib:level=1",
    "bz2",
    "lzma",
    "lzma:preset=1,extreme=False,aligned=False",
    "zstd",
    "zstd:level=19,long=True",
    "brotli:quality=4",
    "entropy",
    "entropy:coder=ans",
    "mix",
    "lin",
    "palette|lin",
    "context",
    "palette|context",
    "uniform:bits=4|context",
    "best",
    "best:tier=tight",
    "uniform:bits=4|mix",
    "planes|zstd",
    "planes:unit=bit|entropy",
    "palette|entropy",
    "palette|planes|lzma:preset=1",
    "plugin_entropy",
    "palette|plugin_entropy",
    "uniform|entropy",
    "uniform:bits=4,per_row=True|palette|zstd",
    "uniform:bits=12|planes|zlib",
    "uniform:bits=4|plugin_entropy",
    "deadzone|entropy",
    "deadzone:bits=8,zeros=0.9|lzma",
    "deadzone:per_row=True|entropy",
    "grid:step=0.1|entropy",
    "grid:step=0.1,trellis=False,contexts=False|mix",
    "grid:step=0.1,trellis=False,price=0.0,rounding=0.3|zstd",
    "lloyd:k=8|entropy",
    "lloyd:k=30,price=1.0,shared=True|context",
    "sign|entropy",
    "sign:per_row=True|raw",
    "mosaic|entropy",
    "mosaic:s=2,k=8|entropy",
    "mosaic:s=3,capacity=0.2|zstd",
    "sparsity",
    "l2",
    "bdm",
    "published",
    "published:metric=lzma,binarised=True",
]


# Every coder, on data that takes much less than a bit a weight.
LONG_RUNS = [
    "raw",
    "zlib",
    "bz2",
    "lzma",
    "zstd",
    "zstd:long=True",
    "brotli",
    "entropy",
    "entropy:coder=ans",
    "palette|context",
    "palette|mix",
    "palette|bz2",
    "palette|lzma",
    "palette|zstd",
    "planes|brotli",
    "planes:unit=bit|bz2",
]


def loaded(name):
    try:
        return registry(GROUP).load(name)
    except PluginError as error:
        pytest.skip(str(error))


def built(spec: str) -> Estimator:
    try:
        return build_estimator(spec)
    except PluginError as error:
        pytest.skip(str(error))


def is_quantised(spec: str) -> bool:
    stages = [build(GROUP, stage) for stage in split_stages(spec)]
    return any(isinstance(stage, Quantiser) and not stage.lossless for stage in stages)


def codes(*, quantised: bool | None = None) -> list[str]:
    """The specifications of kind ``code``; those with, or those without a quantiser."""
    chosen = []
    for spec in SPECS:
        try:
            if isinstance(build_estimator(spec), Code) and quantised in (None, is_quantised(spec)):
                chosen.append(spec)
        except PluginError:
            continue
    return chosen


def is_lossless_length(spec: str) -> bool:
    """Whether a specification is a code or an ideal length that loses nothing."""
    try:
        description = build_estimator(spec).describe(open_weights({"w": torch.randn(9, 9)}))
    except PluginError:
        return False
    return description.kind != "proxy" and description.lossless is True


def network() -> dict[str, torch.Tensor]:
    """A small network with tensors of many dtypes, empty and 0-d ones and one that isn't contiguous."""
    random = torch.Generator().manual_seed(7)
    weight = torch.randn(20, 30, generator=random)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=random),
        "conv.bias": torch.zeros(8),
        "fc.weight": weight.t(),
        "fc.bias": torch.randn(11, generator=random, dtype=torch.float64),
        "half": torch.randn(40, generator=random).to(torch.float16),
        "brain": torch.randn(4, 10, generator=random).to(torch.bfloat16),
        "eighth": torch.randn(33, generator=random).to(torch.float8_e4m3fn),
        "steps": torch.tensor(12345),
        "codes": torch.randint(-8, 8, (5, 9), generator=random, dtype=torch.int8),
        "mask": torch.rand(17, generator=random) < 0.3,
        "waves": torch.randn(6, generator=random, dtype=torch.complex64),
        "scalar": torch.tensor(0.5),
        "none": torch.zeros(0, 4),
    }


@cache
def stream_of_the_network(spec: str) -> bytes:
    return encode_checkpoint(network(), spec)


def tensors_of_any_bits() -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """Checkpoints whose tensors hold any bits that their dtype allows: NaN payloads, infinities, both zeros."""

    @st.composite
    def tensor(draw):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 6), max_size=3))
        size = math.prod(shape) * dtype.itemsize
        few = draw(st.booleans())
        data = draw(st.binary(min_size=size, max_size=size)) if not few else bytes([0, 128, 255, 127] * size)[:size]
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else torch.zeros(0, dtype=torch.uint8)
        if dtype is torch.bool:
            flat = flat & 1
        value = flat.view(dtype).reshape(shape)
        if draw(st.booleans()) and value.dim() > 1:
            value = value.transpose(0, -1)
        if draw(st.booleans()) and value.dim():
            value = value[::2]
        return value

    return st.dictionaries(st.text("abc.é", min_size=1, max_size=5), tensor(), min_size=1, max_size=4)


def with_bits(dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a dtype whose bytes are 0, 1, 2 ... 255; of booleans, 0 and 1."""
    return torch.arange(2 if dtype is torch.bool else 256).to(torch.uint8).view(dtype)


def assert_same_bits(decoded: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> None:
    assert decoded.keys() == original.keys()
    for name, tensor in original.items():
        assert decoded[name].dtype == tensor.dtype
        assert decoded[name].shape == tensor.shape
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes()


@pytest.mark.parametrize("name", registry(GROUP).names())
def test_is_called_what_its_entry_point_says(name):
    cls = loaded(name)
    assert cls.name == name
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert issubclass(cls, (Estimator, Coder, Transform, Quantiser))
    assert build(GROUP, name) == cls()


@pytest.mark.parametrize("name", registry(GROUP).names())
def test_is_listed_with_its_kind(name):
    kind = stage_kind(loaded(name))
    assert kind in ("code", "ideal", "proxy", "transform", "quantiser")
    if kind in ("code", "ideal", "proxy"):
        assert build_estimator(name).kind == kind


@pytest.mark.parametrize("spec", SPECS)
def test_every_stage_is_built_again_from_its_specification_and_repr(spec):
    built(spec)
    for stage in (build(GROUP, text) for text in split_stages(spec)):
        assert build(GROUP, spec_of(stage)) == stage
        assert eval(repr(stage), {type(stage).__name__: type(stage)}) == stage
        assert hash(stage) == hash(build(GROUP, spec_of(stage)))


@pytest.mark.parametrize("spec", SPECS)
def test_is_built_again_from_its_specification_and_repr(spec):
    measure = built(spec)
    assert measure.spec == spec
    assert build_estimator(measure.spec) == measure
    stages = [build(GROUP, stage) for stage in split_stages(spec)]
    assert eval(repr(measure), vars(pipeline) | {type(stage).__name__: type(stage) for stage in stages}) == measure
    assert json.loads(json.dumps(dataclasses.asdict(measure))) == dataclasses.asdict(measure)


@pytest.mark.parametrize("spec", SPECS)
def test_describes_with_parts_that_sum_to_the_value(spec):
    weights = open_weights(network())
    description = built(spec).describe(weights)
    assert description.estimator == spec
    assert description.kind == built(spec).kind
    assert math.isfinite(description.value)
    assert {tensor.name for tensor in description.tensors} | {item.name for item in description.skipped} == set(weights)
    assert description.weights == sum(tensor.weights for tensor in description.tensors)
    assert description.raw_bits == sum(tensor.raw_bits for tensor in description.tensors)
    assert (description.lossless is None) == (description.kind == "proxy")
    if description.unit == "bits":
        assert math.fsum(description.parts.values()) == description.value
        assert all(math.fsum(tensor.parts.values()) == tensor.value for tensor in description.tensors if tensor.parts)
    else:
        assert math.isnan(description.bits_per_weight)


@pytest.mark.parametrize("spec", SPECS)
def test_measures_every_dtype(spec):
    # 1, 2 and 4 are exact in every dtype but bool.
    values = 2.0 ** (torch.arange(30) % 3)
    tensors = {name: values.to(dtype).reshape(5, 6) for name, dtype in DTYPES.items()}
    description = built(spec).describe(open_weights(tensors))
    assert len(description.tensors) + len(description.skipped) == len(DTYPES)
    assert math.isfinite(description.value)


@pytest.mark.parametrize("spec", SPECS)
def test_a_description_is_plain_data(spec):
    description = built(spec).describe(open_weights(network()))
    stored = json.loads(Descriptions([description]).to_json())[0]
    assert stored["value"] == description.value
    assert len(description.to_frame()) == len(description.tensors)


@pytest.mark.parametrize("spec", SPECS)
def test_does_not_depend_on_the_number_of_jobs(spec):
    measure, weights, seen = built(spec), open_weights(network()), []
    one = measure.describe(weights, jobs=1)
    two = measure.describe(weights, jobs=2, progress=seen.append)
    assert dataclasses.replace(one, seconds=0) == dataclasses.replace(two, seconds=0)
    assert [handle.name for handle in seen] == [tensor.name for tensor in one.tensors]


@pytest.mark.parametrize("spec", SPECS)
def test_does_not_change_the_weights(spec):
    tensors = network()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    built(spec).describe(open_weights(tensors))
    assert_same_bits(tensors, copies)


@pytest.mark.parametrize("spec", codes())
def test_a_code_is_as_long_as_it_says_and_decodes_to_what_it_says(spec):
    tensors = network()
    description = build_estimator(spec).describe(open_weights(tensors))
    stream = encode_checkpoint(tensors, spec)
    assert 8 * len(stream) == description.bits
    prove(tensors, description)
    decoded = decode_checkpoint(stream)
    for tensor in description.tensors:
        if tensor.exact:
            assert_same_bits({tensor.name: decoded[tensor.name]}, {tensor.name: tensors[tensor.name]})
    if not is_quantised(spec):
        assert description.lossless
        assert description.distortion == 0


@pytest.mark.parametrize("spec", codes(quantised=False))
@settings(max_examples=25, deadline=None)
@given(tensors=tensors_of_any_bits())
def test_a_lossless_code_gives_back_every_bit(spec, tensors):
    stream = encode_checkpoint(tensors, spec)
    assert_same_bits(decode_checkpoint(stream), tensors)
    assert 8 * len(stream) == build_estimator(spec).describe(open_weights(tensors)).bits


@pytest.mark.parametrize("spec", codes(quantised=False))
def test_a_lossless_code_gives_back_every_dtype(spec):
    tensors = {name: with_bits(dtype) for name, dtype in DTYPES.items()}
    assert_same_bits(decode_checkpoint(encode_checkpoint(tensors, spec)), tensors)


@pytest.mark.parametrize("spec", codes())
def test_long_tensors_are_coded_in_pieces(spec, monkeypatch):
    monkeypatch.setattr("kcomplex.estimators.symbols.PIECE_SYMBOLS", 50)
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 100)
    tensors = network()
    description = build_estimator(spec).describe(open_weights(tensors))
    prove(tensors, description)


@pytest.mark.parametrize("spec", LONG_RUNS)
@pytest.mark.parametrize("share", [0.0, 0.001])
def test_a_code_of_nearly_nothing_can_be_decoded(spec, share):
    built(spec)
    random = torch.Generator().manual_seed(0)
    values = torch.zeros(4_000_000)
    places = torch.randint(values.numel(), (int(share * values.numel()),), generator=random)
    values[places] = torch.randn(places.numel(), generator=random)
    tensors = {"w": values}
    assert_same_bits(decode_checkpoint(encode_checkpoint(tensors, spec)), tensors)


@pytest.mark.parametrize("spec", codes())
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_stream_is_refused_or_decodes_within_bounded_memory(spec, data):
    stream = bytearray(stream_of_the_network(spec))
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    tracemalloc.start()
    try:
        decode_checkpoint(bytes(stream))
    except KComplexError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # The models of lin take 27 MB whatever they decode.
    assert peak < 1 << 26


@pytest.mark.parametrize("spec", codes())
def test_a_stream_that_is_cut_is_refused(spec):
    stream = stream_of_the_network(spec)
    for length in np.linspace(0, len(stream) - 1, 40).astype(int):
        with pytest.raises(KComplexError):
            decode_checkpoint(stream[:length])


# Bits by which a code may be below the order-0 bound of shuffled weights: by chance it happens once in 2**39 times.
SLACK = 40


def quantised_network() -> dict[str, torch.Tensor]:
    """Tensors as quantised networks have them: heavy tails, scales that differ by row."""
    random = torch.Generator().manual_seed(11)

    def matrix() -> torch.Tensor:
        tails = torch.rand(48, 64, generator=random).pow(-0.3)
        return torch.randn(48, 64, generator=random) * tails * (torch.rand(48, 1, generator=random) + 0.2)

    eight, four, dead, few = matrix(), matrix(), matrix(), matrix()
    return {
        "8 bits": (40 * eight).round().clamp(-127, 127).to(torch.int8),
        "4 bits": (3 * four).round().clamp(-7, 7) * 0.037,
        "90 % zeros": (5 * torch.where(dead.abs() > dead.abs().quantile(0.9), dead, 0)).round() / 5,
        "few values": torch.randn(40, generator=random)[(13 * few).long().abs() % 40],
    }


def below_order_0(weights: Weights, spec: str) -> float:
    """By how many bits an estimator is below the order-0 bound at most: that of a tensor, or of all together.

    The bound is the logarithm of the number of orders that a tensor's words can stand in, not their number times their
    empirical entropy: that is a few bits more than what a code of the same counts needs for one given tensor. Among
    shuffled tensors each order is as likely, and a code has too few short streams for all of them; see
    `floor.arrangement_bits`. A tensor's own bits are all of its stream, since any byte of it may tell
    something; all together are payload and tables, and the structure without names, shapes and dtypes.
    """
    description = build_estimator(spec).describe(weights)
    bounds = [tensor_floor(handle).arrangement_bits for handle in weights.values()]
    own = [tensor.value for tensor in description.tensors]
    shared = description.parts.get("tables", 0.0) - sum(item.parts.get("tables", 0.0) for item in description.tensors)
    missing = [bound - bits - shared for bound, bits in zip(bounds, own, strict=True)]
    return max(*missing, sum(bounds) - sum(own) - shared)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if is_lossless_length(spec)])
def test_shuffled_weights_are_never_below_order_0(spec):
    shuffled = shuffled_weights(open_weights(quantised_network()))
    assert below_order_0(shuffled, spec) <= SLACK


def test_weights_in_order_are_below_order_0():
    """The control of the control: codes do go below the bound where there is an order."""
    tensors = {name: tensor.reshape(-1).sort().values for name, tensor in quantised_network().items()}
    assert below_order_0(open_weights(tensors), "palette|zstd") > 1000


def test_every_registered_estimator_is_covered():
    covered = {build(GROUP, stage).name for spec in SPECS for stage in split_stages(spec)}
    assert covered == set(registry(GROUP).names())
