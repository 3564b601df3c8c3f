"""A tensor that is the same as an earlier one costs a few bytes under every code."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import kcomplex as kc
from kcomplex.errors import StreamError
from kcomplex.estimators.duplicates import distinct_weights
from kcomplex.estimators.structure import TensorEntry, decode_structure, encode_structure
from kcomplex.kcz.container import Container
from kcomplex.measuring.stream import prove
from kcomplex.sources.open import open_weights
from kcomplex.weights import DTYPES, TensorHandle, Weights, words_of

RANDOM = torch.Generator().manual_seed(0)
FLOATS = torch.randn(100, 120, generator=RANDOM)
INTEGERS = torch.randint(-7, 8, (100, 120), generator=RANDOM).to(torch.int8)
LOSSLESS = ("raw", "zstd", "palette|entropy", "mix", "lin", "context", "lzma", "mosaic|entropy", "best")
LOSSY = ("uniform:bits=4|entropy", "grid:step=0.1|lin", "mosaic:s=2,k=8|entropy")
# For three tensors that are the same as another: names, shapes, references.
FEW_BYTES = 24


def copies(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor, and the same again: in other memory, as rows of another length, and transposed."""
    return {"a": tensor, "b": tensor.clone(), "c": tensor.clone().reshape(-1, 60), "d": tensor.t().contiguous()}


@pytest.mark.parametrize("tensor", [FLOATS, INTEGERS], ids=["float32", "int8"])
@pytest.mark.parametrize("spec", LOSSLESS + LOSSY)
def test_the_same_again_costs_a_few_bytes(spec: str, tensor: torch.Tensor) -> None:
    once = kc.describe({"a": tensor}, spec)[0]
    again = kc.describe(copies(tensor), spec)[0]
    assert again.bits <= once.bits + 8 * FEW_BYTES
    assert [item.same_as for item in again.tensors] == ["", "a", "a", "a"]
    prove(copies(tensor), again)
    if spec in LOSSLESS:
        decoded = kc.decode_checkpoint(kc.encode_checkpoint(copies(tensor), spec))
        for name, original in copies(tensor).items():
            assert torch.equal(decoded[name], original)
            assert decoded[name].data_ptr() != decoded["a"].data_ptr() or name == "a"


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_may_be_the_same(name: str) -> None:
    tensor = torch.arange(48, dtype=torch.uint8)
    if name == "bool":
        tensor = tensor & 1
    matrix = torch.stack([tensor, tensor.flip(0)]).view(DTYPES[name])
    found = distinct_weights(open_weights({"a": matrix, "b": matrix.clone(), "c": matrix.t().contiguous()})).originals
    assert {duplicate: tuple(original) for duplicate, original in found.items()} == {
        "b": ("a", False),
        "c": ("a", True),
    }


def test_only_the_same_bits_are_the_same() -> None:
    tensors = {
        "zeros": torch.zeros(4, 3),
        "negative zeros": -torch.zeros(4, 3),
        "integers": torch.zeros(4, 3, dtype=torch.int32),
        "in another order": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "of the same sum": torch.tensor([[4.0, 3.0], [2.0, 1.0]]),
        "tiny": torch.tensor([7], dtype=torch.uint8),
        "tiny again": torch.tensor([7], dtype=torch.uint8),
    }
    assert distinct_weights(open_weights(tensors)).originals == {}


@pytest.mark.parametrize("spec", ["planes|zstd", "lin", "uniform:bits=4|entropy"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_holds_the_same_tensor_once(tmp_path: Path, spec: str, jobs: int) -> None:
    source, path, output = (tmp_path / name for name in ("a.safetensors", "a.kcz", "b.safetensors"))
    safetensors.torch.save_file(copies(FLOATS), source)
    size = kc.encode(source, path, spec, jobs=jobs)
    assert size <= kc.encode({"a": FLOATS}, tmp_path / "once.kcz", spec) + 4 * 40 + FEW_BYTES
    seen = []
    kc.decode(path, output, jobs=jobs, progress=lambda entry: seen.append(entry.names[0]))
    assert sorted(seen) == ["a", "b", "c", "d"]
    decoded = safetensors.torch.load_file(output)
    assert torch.equal(decoded["d"], decoded["a"].t())
    assert torch.equal(decoded["c"].reshape(-1), decoded["a"].reshape(-1))
    kc.verify(path, source, jobs=jobs)
    with Container(path) as container:
        for name in "dcba":
            assert torch.equal(container.tensor(name), decoded[name])
    if "uniform" not in spec:
        assert output.read_bytes() == source.read_bytes()


def test_given_weights_know_the_same_tensor_too() -> None:
    given = {name: tensor + 0.01 for name, tensor in copies(FLOATS).items()}
    new = copies(FLOATS)
    description = kc.describe(new, "lin", given=given)[0]
    assert description.bits <= kc.describe({"a": FLOATS}, "lin", given=given)[0].bits + 8 * FEW_BYTES
    prove(new, description, given=given)


@pytest.mark.parametrize(
    ("original", "transposed", "shape", "dtype"),
    [
        (1, False, (4, 3), torch.float32),
        (0, False, (4, 4), torch.float32),
        (0, True, (4, 3), torch.float32),
        (0, False, (4, 3), torch.int32),
    ],
)
def test_a_stream_that_names_an_impossible_original_is_refused(
    original: int, transposed: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    entries = [
        TensorEntry(("a",), torch.float32, (4, 3), (3,)),
        TensorEntry(("b",), dtype, shape, (), (), original, transposed),
    ]
    with pytest.raises(StreamError, match="can't be the same as"):
        decode_structure(encode_structure("raw", 0, entries))


def test_the_same_as_a_duplicate_names_its_original() -> None:
    stream = kc.encode_checkpoint(copies(FLOATS), "raw")
    assert [entry.original for entry in decode_structure(stream).tensors] == [None, 0, 0, 0]
    assert words_of(kc.decode_checkpoint(stream)["c"]).tobytes() == words_of(FLOATS).tobytes()


@pytest.mark.parametrize("shape", [(40,), (8, 4, 3, 3)])
def test_the_same_vector_or_convolution_is_proved(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=RANDOM)
    for spec in ("zstd", "uniform:bits=4|entropy"):
        tensors = {"a": tensor, "b": tensor.clone()}
        prove(tensors, kc.describe(tensors, spec)[0])


def test_many_tensors_of_one_histogram_are_each_read_a_few_times() -> None:
    reads = []

    def mask(seed: int) -> torch.Tensor:
        reads.append(seed)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        return (order < 20).reshape(8, 8)

    handles = [TensorHandle(f"{seed:02}", (8, 8), torch.bool, lambda seed=seed: mask(seed)) for seed in range(40)]
    assert distinct_weights(Weights(handles)).originals == {}
    assert len(reads) <= 3 * len(handles)


def test_steps_are_searched_for_once_for_tensors_that_are_the_same(tmp_path: Path) -> None:
    tensors = {"a": FLOATS, "b": FLOATS.clone(), "c": torch.randn(30, 30, generator=RANDOM)}

    def loss(state: dict[str, torch.Tensor]) -> float:
        return (
            1.0 + 1e3 * float((state["b"] - FLOATS).square().mean()) + float((state["c"] - tensors["c"]).abs().mean())
        )

    found = kc.quantise(tensors, tmp_path / "w.kcz", evaluate=loss, within=0.02, evaluations=12)
    kc.decode(tmp_path / "w.kcz", tmp_path / "w.safetensors")
    assert found.loss == pytest.approx(loss(safetensors.torch.load_file(tmp_path / "w.safetensors")), abs=1e-12)
    steps = {item.name: item.step for item in found.tensors}
    assert steps["a"] == steps["b"]


@pytest.mark.parametrize("spec", ["zstd", "lloyd:k=8,shared=True|entropy", "mosaic:s=2,k=8|entropy"])
def test_the_floor_is_that_of_what_is_coded(spec: str) -> None:
    tensors = {**copies(FLOATS), "other": torch.randn(50, 40, generator=RANDOM)}
    (explanation,) = kc.explain(tensors, spec)
    assert [floor.name for floor in explanation.floors] == ["a", "other"]
    decoded = kc.decode_checkpoint(kc.encode_checkpoint(tensors, spec))
    for floor in explanation.floors:
        assert floor.distinct == decoded[floor.name].unique().numel()
