"""`best` is no longer than any member of its portfolio, pays for its choice, and picks whom it should."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kcomplex as kc
from kcomplex.compressors.best.best import _MEMBERS, _TIERS, Best
from kcomplex.compressors.best.race import View
from kcomplex.errors import StreamError, WeightsError
from kcomplex.estimators.code import EncodedTensor, Outcome
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.structure import TensorEntry
from kcomplex.kcz.container import Container, encode
from kcomplex.measuring.stream import decode_checkpoint, encode_checkpoint
from kcomplex.sources.open import open_weights
from kcomplex.weights import TensorHandle, words_of


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of_scales(*shape: int) -> torch.Tensor:
    return noise(*shape, seed=9) * torch.logspace(-1, 1, shape[0])[:, None]


def motifs(count: int) -> torch.Tensor:
    return noise(60, 8, seed=8)[torch.randint(60, (count,), generator=torch.Generator().manual_seed(1))].reshape(-1, 40)


TENSORS = {
    "gaussian": noise(60, 50),
    "quantised": (rows_of_scales(60, 50) * 4).round().clamp(-100, 100) * 0.25,
    "integers": (rows_of_scales(60, 50) * 4).round().clamp(-100, 100).to(torch.int8),
    "sparse": noise(60, 50, seed=5) * (noise(60, 50, seed=1) > 1.5),
    "constant": torch.ones(3000),
    "half": noise(60, 50, seed=6).half(),
    "random bytes": torch.randint(0, 256, (3000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "repeated": noise(30, seed=7).repeat(100),
    "scalar": torch.tensor(3.25),
    "nothing": torch.zeros(0, 4),
}


def chosen(tensors: dict[str, torch.Tensor], tier: str = "fast") -> dict[str, str]:
    """Return the member that each tensor was coded by; every tensor must come back."""
    code = Best(tier)
    weights = open_weights(tensors)
    shared = code.prepare(weights)
    writing, reading = code.memory(shared), code.memory(shared)
    found = {}
    for name, handle in weights.items():
        tensor = code.encode(handle, writing)
        back = code.decode(entry_of(handle, tensor), tensor.to_bytes(), reading)
        assert words_of(back).tobytes() == handle.words().tobytes()
        if tensor.size:
            found[name] = _MEMBERS[tensor.choice]
    return found


def entry_of(handle: TensorHandle, encoded: EncodedTensor) -> TensorEntry:
    return TensorEntry((handle.name,), handle.dtype, handle.shape, (encoded.size,), (encoded.choice,))


@pytest.mark.parametrize("tier", ["fast", "tight"])
@pytest.mark.parametrize("name", TENSORS)
def test_is_no_longer_than_any_member(name, tier):
    weights = open_weights({name: TENSORS[name]})
    handle = weights[name]

    def length(code):
        return code.encode(handle, code.memory(b"")).size

    members = [build_estimator(_MEMBERS[place]) for place in _TIERS[tier] if not _MEMBERS[place].startswith("mosaic")]
    assert length(Best(tier)) <= min(map(length, members))


def test_picks_the_member_that_fits():
    found = chosen({name: tensor for name, tensor in TENSORS.items() if name != "repeated"})
    assert found["random bytes"] in ("raw", "entropy")
    assert found["gaussian"] in ("planes|entropy", "planes|context")
    assert found["quantised"] == "palette|context"
    assert chosen({"repeated": TENSORS["repeated"]})["repeated"] in ("planes|zstd", "mosaic|entropy")
    assert "nothing" not in found
    assert chosen({"mosaic": motifs(3000), "noise": noise(60, 50)})["mosaic"] == "mosaic|entropy"


def test_tight_picks_prediction_and_long_repeats():
    related = noise(200, 4, seed=2) @ noise(4, 32, seed=3) + 0.05 * noise(200, 32, seed=4)
    assert chosen({"related": (related * 16).round().to(torch.int8)}, "tight") == {"related": "lin"}


LONG = {
    "rows of scales": (rows_of_scales(700, 300) * 4).round().clamp(-100, 100) * 0.25,
    "columns of scales": (rows_of_scales(300, 700) * 4).round().clamp(-100, 100).T.contiguous().to(torch.int8),
    "gaussian": noise(400, 256),
    "half": noise(400, 256, seed=6).bfloat16(),
    "sparse": noise(400, 256, seed=5) * (noise(400, 256, seed=1) > 1.5),
    "bytes": torch.randint(0, 256, (200, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "repeated": noise(10, 512, seed=7).repeat(20, 1),
    "vector": (noise(100_000, seed=3) * 3).round(),
    "constant": torch.ones(300, 200),
    "complex": torch.complex(noise(200, 200, seed=4), noise(200, 200, seed=5)),
}


@pytest.mark.parametrize("name", LONG)
def test_long_tensors_are_coded_whole_by_few_and_hardly_longer_than_by_the_best(name, monkeypatch):
    tensor, whole = LONG[name], []
    encode = View.encode

    def counting(view, code, memory):
        whole.append(view.handle.elements == tensor.numel())
        return encode(view, code, memory)

    handle = open_weights({name: tensor})[name]
    members = [build_estimator(_MEMBERS[place]) for place in _TIERS["fast"] if not _MEMBERS[place].startswith("mosaic")]
    least = min(member.encode(handle, member.memory(b"")).size for member in members)
    monkeypatch.setattr(View, "encode", counting)
    assert Best().encode(handle, Best().memory()).size <= 1.001 * least + 8
    assert sum(whole) <= 3
    assert set(chosen({name: tensor})) == {name}


def test_trials_leave_no_trace_in_what_is_learned():
    """A tensor that `lin` didn't win mustn't have taught it."""
    tensors = {f"{index} {name}": tensor for index in range(2) for name, tensor in TENSORS.items()}
    decoded = decode_checkpoint(encode_checkpoint(tensors, "best:tier=tight"))
    for name, tensor in tensors.items():
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 255), st.sampled_from([(0, 3), (4,), ()]))
def test_what_is_no_stream_is_refused_or_has_the_shape(data, choice, shape):
    entry = TensorEntry(("w",), torch.int16, shape, (len(data),), (choice,))
    try:
        tensor = Best().decode(entry, data, Best().memory())
    except StreamError:
        return
    assert tensor.shape == shape
    assert math.prod(shape) == tensor.numel()


@pytest.mark.parametrize("choice", [_MEMBERS.index("lin"), len(_MEMBERS), 127, 128, 255])
def test_a_choice_that_the_portfolio_has_not_is_refused(choice):
    entry = TensorEntry(("w",), torch.int8, (4,), (1,), (choice,))
    with pytest.raises(StreamError, match="portfolio"):
        Best("fast").decode(entry, b"\0", Best("fast").memory())


def relative(tensors: dict[str, torch.Tensor], known: dict[str, torch.Tensor], tier: str) -> dict[str, str]:
    """Return the member that each tensor was coded by given another; every tensor must come back."""
    code, weights = Best(tier), open_weights(tensors)
    writing, reading = code.memory(), code.memory()
    found = {}
    for name, handle in weights.items():
        tensor = code.encode(handle, writing, known[name])
        back = code.decode(entry_of(handle, tensor), tensor.to_bytes(), reading, known[name])
        assert (back.dtype, tuple(back.shape)) == (handle.dtype, handle.shape)
        assert words_of(back).tobytes() == handle.words().tobytes()
        found[name] = ("given " if tensor.choice >= 128 else "") + _MEMBERS[tensor.choice % 128]
    return found


@pytest.mark.parametrize("tier", ["fast", "tight"])
def test_given_others_whatever_is_shortest_is_coded(tier):
    tensors = {name: tensor for source in (TENSORS, LONG) for name, tensor in source.items() if tensor.numel() < 60_000}
    known = {name: tensor.clone() for name, tensor in tensors.items()}
    known["gaussian"] += 1e-4 * noise(60, 50, seed=11)
    known["half"] = noise(60, 50, seed=12)
    known["integers"] = known["integers"] + torch.eye(60, 50, dtype=torch.int8)
    known["quantised"] = noise(60, 50, seed=13)
    known["nothing"] = known["nothing"].double()
    found = relative(tensors, known, tier)
    assert found["gaussian"].startswith("given ")
    assert found["integers"].startswith("given ")
    if tier == "fast":
        assert not any(found[name].startswith("given ") for name in ("half", "quantised"))
    assert found["nothing"] == "raw"


def test_long_tensors_are_given_others():
    known = noise(400, 300, seed=2)
    near = {"w": known + 1e-3 * noise(400, 300, seed=3), "c": torch.complex(known, known).repeat(1, 2)}
    given = {"w": known, "c": near["c"] * 1.0001}
    assert all(member.startswith("given ") for member in relative(near, given, "fast").values())
    far = {"w": (noise(400, 300, seed=4) * 3).round()}
    assert relative(far, {"w": known}, "fast")["w"] in ("entropy", "palette|context")


def test_a_file_given_others_is_the_shorter_of_both_ways_for_each_tensor(tmp_path):
    old = {"near": noise(200, 100), "far": noise(200, 100, seed=1), "same": noise(9, 9)}
    new = {"near": old["near"] * 1.001, "far": (noise(200, 100, seed=2) * 3).round(), "same": old["same"]}
    for tier in ("fast", "tight"):
        path = tmp_path / f"{tier}.kcz"
        size = encode(new, path, f"best:tier={tier}", given=old)
        assert size < encode(new, tmp_path / "other.kcz", "planes|zstd", given=old)
        assert size < encode(new, tmp_path / "other.kcz", f"best:tier={tier}")
        with Container(path, given=old) as container:
            for name, tensor in new.items():
                assert torch.equal(container.tensor(name), tensor)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 255), st.sampled_from([(0, 3), (4,), ()]), st.booleans())
def test_what_is_no_relative_stream_is_refused_or_has_the_shape(data, first, shape, tight):
    known = torch.zeros(shape, dtype=torch.float16)
    for dtype in (torch.int16, torch.float16):
        try:
            code = Best("tight" if tight else "fast")
            entry = TensorEntry(("w",), dtype, shape, (len(data),), (first,))
            tensor = code.decode(entry, data, code.memory(), known)
        except StreamError:
            continue
        assert (tensor.dtype, tensor.shape) == (dtype, shape)


def small_tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {f"layers.{index}.bias": torch.randn(3, generator=random) for index in range(1000)}


def rounded_layers() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {f"{index}.weight": (torch.randn(8, 8, generator=random) / 8).round(decimals=1) for index in range(60)}


def related_layers() -> dict[str, torch.Tensor]:
    """Floats from which `lin` learns a little with each tensor, and wins none of the first."""
    return {f"{index}": noise(30, 20, seed=index) * 0.1 for index in range(20)}


@pytest.mark.parametrize("tier", ["fast", "tight"])
@pytest.mark.parametrize("network", [small_tensors, rounded_layers, related_layers])
def test_no_member_alone_is_shorter_on_the_whole(network, tier):
    tensors = network()
    best = kc.describe(tensors, Best(tier))[0].bits
    for place in _TIERS[tier]:
        alone = kc.describe(tensors, _MEMBERS[place])[0].bits
        assert best <= max(1.001 * alone, alone + 8 * 16), _MEMBERS[place]
    assert best == 8 * len(kc.encode_checkpoint(tensors, Best(tier)))


def test_one_member_for_all_is_written_to_a_file_too(tmp_path):
    tensors = related_layers()
    size = kc.encode(tensors, tmp_path / "w.kcz", "best:tier=tight")
    assert size <= 1.001 * kc.encode(tensors, tmp_path / "lin.kcz", "lin")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["lin.kcz", "w.kcz"]
    kc.verify(tmp_path / "w.kcz", tensors)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_file_in_which_a_member_learns_is_read_in_any_order(tmp_path, jobs):
    tensors = {**related_layers(), "integers": TENSORS["integers"], "same": related_layers()["3"]}
    path = tmp_path / "w.kcz"
    kc.encode(tensors, path, "best:tier=tight", jobs=jobs)
    kc.verify(path, tensors, jobs=jobs)
    with Container(path) as container:
        assert any(entry.choices == (_MEMBERS.index("lin"),) for entry in container.entries)
        for name in ("7", "3", "same", "integers", "0", "19"):
            assert torch.equal(container.tensor(name), tensors[name])


def test_rivals_do_not_depend_on_the_order_of_choices():
    forwards, backwards = (Outcome(100.0, 50.0, choices) for choices in ((2, 3, 4, 2, 3, 4), (4, 3, 2, 2, 3, 4)))
    assert Best().rivals(forwards) == Best().rivals(backwards)


def test_a_rival_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, handle, memory, known=None):
        raise WeightsError("out of order")

    monkeypatch.setattr("kcomplex.compressors.best.best._OneForAll.encode", fail)
    with pytest.raises(WeightsError, match="out of order"):
        kc.encode(related_layers(), tmp_path / "w.kcz", "best:tier=tight")
    assert list(tmp_path.iterdir()) == []
