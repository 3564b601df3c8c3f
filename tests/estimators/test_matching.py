"""Which given tensor is known for which of one's own: aliases, prefixes, wrappers, rows; never silently."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.errors import FormatError, StreamError, WeightsError
from kcomplex.estimators.description import Description, GivenMatch
from kcomplex.estimators.matching import Naming
from kcomplex.estimators.structure import Reader
from kcomplex.kcz.container import Container, decode, encode
from kcomplex.measuring.stream import prove
from kcomplex.sources.open import open_weights
from kcomplex.weights import Weights
from tests import children

Tensors = dict[str, torch.Tensor]


def network() -> Tensors:
    random = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(40, 8, generator=random),
        "layers.0.weight": torch.randn(16, 8, generator=random),
        "layers.0.bias": torch.randn(16, generator=random),
        "layers.1.weight": torch.randn(16, 8, generator=random),
    }


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor for name, tensor in tensors.items()}


def described(tensors: Tensors, base: Tensors, spec: str = "zstd") -> tuple[Description, GivenMatch]:
    """Return a description that was proven by decoding, and what it tells of the match."""
    description: Description = kc.describe(tensors, spec, given=base)[0]
    prove(tensors, description, given=base)
    assert description.given is not None
    return description, description.given


PREFIXES = ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "base_model.model.", "transformer.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("ours", [True, False])
def test_one_prefix_on_either_side_is_seen_through(prefix: str, ours: bool) -> None:
    longer = renamed(network(), lambda name: prefix + name)
    tensors, base = (longer, network()) if ours else (network(), longer)
    description, match = described(tensors, base)
    assert sum(tensor.value for tensor in description.tensors) == 0
    assert (match.tensors, match.matched, match.renamed, match.unmatched) == (4, 4, 4, ())
    assert match.matched_bytes == match.raw_bytes == description.raw_bits // 8
    assert str(match) == f"4 of 4 tensors (100.0% of the bytes), 4 by prefix {prefix!r}"


@pytest.mark.parametrize(
    "name", ["layers.0._orig_mod.weight", "module.layers.0.weight", "x.layers._fsdp_wrapped_module.0.module.weight"]
)
def test_wrappers_inside_of_names_are_seen_through(name: str) -> None:
    tensors = {**network(), name: network()["layers.0.weight"] + 1}
    del tensors["layers.0.weight"]
    for one, other in ((tensors, network()), (network(), tensors)):
        _, match = described(one, other)
        assert (match.matched, match.renamed) == (4, 1)


def test_a_wrapper_and_a_prefix_may_stand_together() -> None:
    tensors = renamed(network(), lambda name: "model." + name.replace("layers.", "layers._orig_mod."))
    _, match = described(tensors, network())
    assert (match.matched, match.renamed) == (4, 4)
    assert match.naming == "prefix 'model.' and wrapper '_orig_mod'"


def test_the_prefix_that_matches_most_is_taken_and_exact_names_come_first() -> None:
    base = {**network(), "other.extra.weight": torch.ones(5), "more.embed.weight": torch.zeros(40, 8)}
    tensors = {
        **renamed(network(), lambda name: "model." + name),
        "embed.weight": base["embed.weight"],
        "extra.weight": torch.ones(5),
    }
    _, match = described(tensors, base)
    # "model.embed.weight" is the same as "embed.weight", which comes first.
    assert match.naming == "prefix 'model.'"
    assert match.matched == match.tensors - 1
    assert match.unmatched == ("extra.weight",)


segments = st.sampled_from(["a", "b", "module", "_orig_mod", "0", "weight"])
names = st.lists(segments, min_size=1, max_size=4).map(".".join)
tensors_of = st.dictionaries(
    names, st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 2)), min_size=1, max_size=6
).map(lambda shapes: {name: torch.full((rows, columns), value) for name, (rows, columns, value) in shapes.items()})


@settings(max_examples=80, deadline=None)
@given(tensors=tensors_of, base=tensors_of, spec=st.sampled_from(["raw", "zstd"]))
def test_whatever_the_names_and_rows_are_every_bit_comes_back_or_none_is_given(
    tensors: Tensors, base: Tensors, spec: str
) -> None:
    try:
        stream = kc.encode_checkpoint(tensors, spec, given=base)
    except WeightsError:
        assert all(base[name].shape != tensors[name].shape for name in {*tensors} & {*base})
        return
    decoded = kc.decode_checkpoint(stream, given=base)
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())
    assert 8 * len(stream) == kc.describe(tensors, spec, given=base)[0].bits


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    given_rows=st.integers(1, 12),
    dtype=st.sampled_from(["float32", "bfloat16", "complex64", "int8"]),
)
def test_common_rows_are_used_where_most_are_common(rows: int, given_rows: int, dtype: str) -> None:
    whole = torch.arange(24).reshape(12, 2).to(getattr(torch, dtype))
    tensors, base = (
        {"w": whole[:rows].clone(), "b": torch.ones(3)},
        {"w": whole[:given_rows].clone(), "b": torch.ones(3)},
    )
    description, match = described(tensors, base, "raw")
    used = 2 * min(rows, given_rows) >= max(rows, given_rows)
    assert match.matched == 1 + used
    assert match.resized == (used and rows != given_rows)
    if rows <= given_rows and used:
        assert description.tensors[1].value == 0


@pytest.mark.parametrize("spec", ["zstd", "lin", "planes|zstd", "best"])
def test_a_resized_vocabulary_costs_about_its_new_rows(spec: str) -> None:
    random = torch.Generator().manual_seed(1)
    old, new = torch.randn(200, 16, generator=random), torch.randn(8, 16, generator=random)
    tuned = torch.cat([old + 1e-6 * torch.randn(200, 16, generator=random), new])
    fewer, same, more = ({"embed": tuned[:rows].clone()} for rows in (190, 200, 208))
    least, most = kc.describe(same, spec, given={"embed": old})[0].bits, kc.describe(more, spec)[0].bits
    description, match = described(more, {"embed": old}, spec)
    assert description.bits < (least + most) / 2
    assert str(match) == "1 of 1 tensors (100.0% of the bytes), 1 by common rows"
    assert described(fewer, {"embed": old}, spec)[0].bits < 1.01 * least


def test_copies_of_tied_tensors_are_given_by_whichever_name_is() -> None:
    shared = torch.randn(30, 10)
    tensors = {"lm_head.weight": shared, "wte.weight": shared.clone(), "b": torch.ones(2)}
    for stored in ("wte.weight", "lm_head.weight", "transformer.wte.weight"):
        description, match = described(tensors, {stored: shared})
        assert [tensor.value for tensor in description.tensors[1:]] == [0, 0]
        assert (match.tensors, match.matched) == (3, 2)


def test_shapes_that_differ_otherwise_are_told_as_not_given() -> None:
    base = {**network(), "layers.1.weight": torch.zeros(16, 9), "embed.weight": torch.zeros(2, 8)}
    _, match = described(network(), base)
    assert match.unmatched == ("embed.weight (40x8, given as 2x8)", "layers.1.weight (16x8, given as 16x9)")
    assert str(match).endswith("not embed.weight (40x8, given as 2x8), layers.1.weight (16x8, given as 16x9)")


def test_frames_and_json_tell_how_much_is_given() -> None:
    tensors = {**network(), "head": torch.ones(3)}
    found = kc.describe(tensors, "zstd", given=network())
    assert found.to_frame()[["given_tensors", "given_of"]].to_numpy().tolist() == [[4, 5]]
    assert json.loads(found.to_json())[0]["given"]["unmatched"] == ["head"]
    plain = kc.describe(tensors, "zstd")
    assert (plain[0].given, json.loads(plain.to_json())[0]["given"]) == (None, None)


def test_where_none_is_given_it_is_an_error_that_shows_both_sides(tmp_path: Path) -> None:
    told = r"none of its 4 tensors is given by .*: here embed.weight, .* and 1 more; there x, y; give the weights that"
    for call in (kc.describe, kc.encode_checkpoint):
        with pytest.raises(WeightsError, match=told):
            call(network(), "lin", given={"x": torch.ones(3), "y": torch.ones(4)})
    with pytest.raises(WeightsError, match="none of its 4 tensors"):
        encode(network(), tmp_path / "out.kcz", "lin", given={"x": torch.ones(3)})
    assert not list(tmp_path.iterdir())
    with pytest.raises(WeightsError, match=r"here w \(3x4, given as 5x6\)"):
        kc.describe({"w": torch.ones(3, 4)}, "lin", given={"w": torch.ones(5, 6)})


@pytest.mark.parametrize(
    "names",
    [
        ["base_model.model.layers.0.lora_A.weight", "base_model.model.layers.0.lora_B.weight"],
        ["base_model.model.layers.0.lora_embedding_A", "base_model.model.layers.0.lora_magnitude_vector"],
        ["lora_unet_layers_0.lora_down.weight", "lora_unet_layers_0.alpha"],
    ],
)
def test_an_adapter_given_its_base_is_refused_with_what_to_do(names: list[str]) -> None:
    adapter = {name: torch.randn(2 + place, 8) for place, name in enumerate(names)}
    with pytest.raises(WeightsError, match=r"none of its 2 .* merge it into its base .* or take the adapter alone"):
        kc.describe(adapter, "lin", given=network())


_ENCODE = """
import sys
from kcomplex.kcz.container import encode
encode(sys.argv[1], sys.argv[2], "zstd", given=sys.argv[3])
"""


def test_another_process_writes_the_same_bytes_and_this_one_reads_them(tmp_path: Path) -> None:
    tensors = {
        **renamed(network(), lambda name: "module." + name),
        "model.layers.0.weight": torch.ones(16, 8),
        "module.more": torch.ones(9, 4),
    }
    base = {**network(), "model.layers.1.weight": torch.zeros(16, 8), "more": torch.ones(7, 4)}
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    safetensors.torch.save_file(tensors, new)
    safetensors.torch.save_file(base, old)
    encode(new, tmp_path / "here.kcz", "zstd", given=old)
    children.run([sys.executable, "-c", _ENCODE, new, tmp_path / "there.kcz", old])
    assert (tmp_path / "here.kcz").read_bytes() == (tmp_path / "there.kcz").read_bytes()
    decode(tmp_path / "there.kcz", tmp_path / "back.safetensors", given=old)
    assert (tmp_path / "back.safetensors").read_bytes() == new.read_bytes()


texts = st.text(max_size=5)


@given(
    st.builds(Naming, st.lists(texts, max_size=2).map(tuple), texts, texts, st.dictionaries(texts, texts, max_size=2))
)
def test_a_naming_comes_back(naming: Naming) -> None:
    data = naming.to_bytes()
    reader = Reader(data + b"rest")
    assert Naming.read(reader) == naming
    assert reader.rest() == b"rest"


@given(st.binary(max_size=30))
def test_any_other_bytes_are_a_naming_or_refused(data: bytes) -> None:
    try:
        Naming.read(Reader(data))
    except StreamError:
        return


def test_names_that_stay_as_they_are_take_one_byte_and_streams_without_are_refused() -> None:
    assert Naming().to_bytes() == b"\0"
    with pytest.raises(StreamError, match="encode the weights anew"):
        Naming.read(Reader(b""))


def test_given_files_are_closed_when_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, packed = tmp_path / "old.safetensors", tmp_path / "new.kcz"
    safetensors.torch.save_file({"w": torch.randn(300, 40)}, old)
    opened: list[Weights] = []

    def remembered(source: str) -> Weights:
        opened.append(open_weights(source))
        return opened[-1]

    monkeypatch.setattr("kcomplex.estimators.given.open_weights", remembered)
    encode(old, packed, "zstd", given=old)
    kc.describe(old, "zstd", given=old)
    with pytest.raises(WeightsError, match="none of its 1"):
        kc.describe({"x": torch.ones(2)}, "zstd", given=old)
    kc.decode_checkpoint(kc.encode_checkpoint(old, "zstd", given=old), given=old)
    with Container(packed, given=old) as container:
        container.tensor("w")
        assert torch.equal(opened[-1]["w"].read(), container.tensor("w"))
    assert len(opened) == 6
    for weights in opened:
        with pytest.raises(FormatError, match="closed"):
            weights["w"].read()


def test_weights_that_are_given_stay_open(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    safetensors.torch.save_file(network(), path)
    with kc.open_weights(path) as base:
        for _ in range(2):
            assert kc.describe(network(), "zstd", given=base)[0].bits < 1500
        assert torch.equal(base["embed.weight"].read(), network()["embed.weight"])
