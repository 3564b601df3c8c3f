"""Lossy files as short as a wish allows; what is decoded is what was measured."""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import nn

import kcomplex as kc
from kcomplex.errors import KComplexError, SourceNotFoundError, SpecError, WeightsError
from kcomplex.kcz.container import Container, encode, verify
from kcomplex.measuring.measure import describe
from kcomplex.measuring.stream import prove
from kcomplex.quantising.quantisation import quantise
from kcomplex.sources.open import open_weights
from kcomplex.weights import words_of


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 50, generator=generator)
    return {
        "weight": weight,
        "tied": weight,
        "small": 0.01 * torch.randn(30, 20, generator=generator),
        "half": torch.randn(300, generator=generator).to(torch.bfloat16),
        "zeros": torch.zeros(5, 5),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def decoded(path) -> dict[str, torch.Tensor]:
    with Container(path) as container:
        return {name: container.tensor(name) for entry in container.entries for name in entry.names}


class Digits:
    """A small classifier of digits, and its loss on images that it wasn't trained on."""

    def __init__(self):
        images, labels = load_digits(return_X_y=True)
        inputs, targets = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
        self.inputs, self.targets = inputs[1200:], targets[1200:]
        torch.manual_seed(0)
        network = self.network()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(150):
            loss = torch.nn.functional.cross_entropy(network(inputs[:1200]), targets[:1200])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def network(self):
        return torch.nn.Sequential(
            torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        )

    @torch.no_grad()
    def loss(self, tensors):
        network = self.network()
        network.load_state_dict(tensors)
        return torch.nn.functional.cross_entropy(network(self.inputs), self.targets).item()


@pytest.fixture(scope="module")
def digits():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Digits()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("estimator", ["grid|mix", "grid|entropy", "grid:trellis=False,price=0|zstd"])
@pytest.mark.parametrize("mse", [1e-6, 1e-3])
def test_the_error_is_as_large_as_wished_and_no_larger(tmp_path, estimator, mse):
    path = tmp_path / "model.kcz"
    told = quantise(checkpoint(), path, estimator, mse=mse)
    assert 0.97 * mse <= told.distortion <= mse
    assert told.bits == 8 * path.stat().st_size
    # The number of steps is kept, and counts in no mean.
    assert told.quantised_weights == told.weights - 1
    assert verify(path, checkpoint()) * told.weights == pytest.approx(told.distortion * told.quantised_weights)
    differences = [
        torch.square(tensor.double() - decoded(path)[name].double()).sum().item()
        for name, tensor in checkpoint().items()
        if name != "tied"
    ]
    assert sum(differences) / told.quantised_weights == pytest.approx(told.distortion, rel=1e-9)


def test_bits_are_as_many_as_wished_and_no_more(tmp_path):
    path = tmp_path / "model.kcz"
    bits = {}
    for wished in (3.0, 5.0):
        told = quantise(checkpoint(), path, "grid|entropy", bits=wished)
        assert wished - 0.05 <= told.bits_per_weight <= wished
        assert told.bits == 8 * path.stat().st_size
        bits[wished] = told.distortion
    assert bits[5.0] < bits[3.0] / 10


def test_an_error_costs_fewer_bits_than_uniform_levels_do(tmp_path):
    tensors = {name: tensor for name, tensor in checkpoint().items() if name in ("weight", "small")}
    (uniform,) = describe(tensors, "uniform:bits=5|entropy")
    told = quantise(tensors, tmp_path / "model.kcz", "grid|entropy", mse=uniform.distortion)
    assert sum(item.bits for item in told.tensors) < 0.95 * sum(item.value for item in uniform.tensors)


def test_the_smallest_code_within_a_loss_is_smaller_than_uniform_levels(tmp_path, digits):
    path = tmp_path / "digits.kcz"
    told = quantise(digits.weights, path, evaluate=digits.loss, within=0.02)
    assert told.baseline == digits.loss(digits.weights)
    assert told.loss <= told.limit == pytest.approx(1.02 * told.baseline)
    assert digits.loss(decoded(path)) == told.loss
    assert told.evaluations <= 100
    uniform = tmp_path / "uniform.kcz"
    for bits in range(2, 17):
        size = encode(digits.weights, uniform, f"uniform:bits={bits}|entropy")
        if digits.loss(decoded(uniform)) <= told.limit:
            break
    assert told.bits < 0.8 * 8 * size


def test_the_search_is_repeatable_and_stays_within_its_evaluations(tmp_path, digits):
    calls = []

    def loss(tensors):
        calls.append(sorted(tensors))
        return digits.loss(tensors)

    first, second = tmp_path / "first.kcz", tmp_path / "second.kcz"
    told = [
        quantise(digits.weights, path, "grid|entropy", evaluate=loss, evaluations=25, jobs=jobs)
        for path, jobs in ((first, 1), (second, 2))
    ]
    assert told[0] == told[1]
    assert first.read_bytes() == second.read_bytes()
    assert told[0].evaluations == 25
    assert len(calls) == 50
    assert calls[0] == sorted(digits.weights)


def test_a_caller_may_change_what_it_evaluates(tmp_path):
    tensors = checkpoint()
    path = tmp_path / "model.kcz"

    def loss(state):
        value = 1 + torch.square(state["weight"] - tensors["weight"]).sum().item()
        for tensor in state.values():
            tensor.zero_()
        return value

    told = quantise(tensors, path, "grid|entropy", evaluate=loss, within=0.1, evaluations=20)
    assert told.loss <= 1.1
    assert 1 + torch.square(decoded(path)["weight"] - tensors["weight"]).sum().item() == told.loss
    assert tensors["weight"].abs().sum() > 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_as_too_large(tmp_path, wrong):
    tensors = checkpoint()

    def loss(state):
        error = torch.square(state["weight"] - tensors["weight"]).mean().item()
        return wrong if error > 1e-4 else 1.0

    told = quantise(tensors, tmp_path / "model.kcz", "grid|entropy", evaluate=loss)
    assert told.loss == 1.0


def test_tensors_are_told_with_their_steps(tmp_path):
    told = quantise(checkpoint(), tmp_path / "model.kcz", "grid|entropy", mse=1e-4)
    frame = told.to_frame().set_index("tensor")
    assert list(frame.columns) == ["shape", "weights", "step", "bits", "bits_per_weight", "distortion"]
    assert frame["bits"].sum() < told.bits
    assert frame["weights"].sum() == told.weights == open_weights(checkpoint()).elements
    assert math.isnan(frame["step"]["steps"])
    assert (frame["distortion"] * frame["weights"]).sum() / told.quantised_weights == pytest.approx(told.distortion)
    assert told.to_dict()["bits_per_weight"] == told.bits_per_weight


def test_shared_and_whole_tensors_come_back(tmp_path):
    path = tmp_path / "model.kcz"
    quantise(open_weights(checkpoint()), path, "grid|entropy", mse=1e-4)
    back = decoded(path)
    assert back.keys() == checkpoint().keys()
    assert words_of(back["tied"]).tolist() == words_of(back["weight"]).tolist()
    assert back["steps"] == 7
    assert back["half"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({}, "exactly one"),
        ({"mse": 1e-4, "bits": 3}, "exactly one"),
        ({"mse": 0.0}, "mse"),
        ({"bits": math.nan}, "bits"),
        ({"evaluate": len, "within": -0.1}, "within"),
        ({"evaluate": len, "evaluations": 1}, "evaluations"),
        ({"bits": 3, "estimator": "zstd"}, "quantiser"),
        ({"bits": 3, "estimator": "uniform|zstd"}, "step"),
    ],
)
def test_senseless_wishes_are_refused(tmp_path, wishes, told):
    with pytest.raises(SpecError, match=told):
        quantise(checkpoint(), tmp_path / "model.kcz", **wishes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "wishes", "told"),
    [
        (checkpoint(), {"bits": 0.1}, "allow more bits"),
        (checkpoint(), {"mse": 1e-30}, "lossless"),
        (checkpoint(), {"evaluate": lambda state: math.nan}, "as they are is nan"),
        (checkpoint(), {"evaluate": lambda state: "much"}, "returned a str"),
        (checkpoint(), {"evaluate": lambda state: state["weight"]}, "returned a Tensor"),
        ({"steps": torch.tensor(3)}, {"mse": 1e-4}, "no floating-point tensor"),
        ({"w": torch.tensor([1.0, math.nan])}, {"mse": 1e-4}, "'w'"),
        ({"w": torch.tensor([1.0, math.inf])}, {"bits": 30}, "'w'"),
    ],
)
def test_wishes_that_cant_be_met_leave_no_file(tmp_path, tensors, wishes, told):
    with pytest.raises(WeightsError, match=told):
        quantise(tensors, tmp_path / "model.kcz", **wishes)
    assert not list(tmp_path.iterdir())


def test_what_cant_be_read_or_written_is_told(tmp_path):
    with pytest.raises(SourceNotFoundError):
        quantise(tmp_path / "nothing.safetensors", tmp_path / "model.kcz", mse=1e-4)
    (tmp_path / "file").write_text("")
    with pytest.raises(KComplexError, match="can't be written"):
        quantise(checkpoint(), tmp_path / "file" / "model.kcz", "grid|entropy", mse=1e-4)


def test_an_error_of_the_evaluation_passes_through(tmp_path):
    def loss(state):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantise(checkpoint(), tmp_path / "model.kcz", evaluate=loss)


def normalised() -> nn.Sequential:
    """Return a network whose normalisation has statistics of its own, some of them tiny."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 10))
    with torch.no_grad():
        network[1].running_var.copy_(torch.logspace(-6, 1, 64))
    return network


@pytest.mark.parametrize("wish", [{"mse": 1e-3}, {"bits": 4.0}])
def test_norms_and_statistics_are_kept_exactly(tmp_path: Path, wish: dict[str, float]) -> None:
    state = normalised().state_dict()
    told = kc.quantise(state, tmp_path / "w.kcz", "grid|entropy", **wish)
    kc.decode(tmp_path / "w.kcz", tmp_path / "w.safetensors")
    decoded = safetensors.torch.load_file(tmp_path / "w.safetensors")
    kept = {name for name, tensor in state.items() if torch.equal(tensor, decoded[name])}
    assert kept == {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert {item.name for item in told.tensors if item.step is None} == kept
    kc.verify(tmp_path / "w.kcz", state)


def test_a_quantiser_before_a_code_keeps_norms_and_statistics(tmp_path: Path) -> None:
    state = normalised().state_dict()
    # Equal bits, of which one is quantised and the other isn't.
    state["2.bias"] = state["1.running_var"][:10].clone()
    state["0.bias"] = state["1.running_var"].clone()
    description = kc.describe(state, "uniform:bits=3|entropy")[0]
    prove(state, description)
    exact = description.to_frame().set_index("tensor")["exact"]
    assert exact.loc[["1.running_var", "1.weight", "0.weight", "0.bias"]].tolist() == [True, True, False, False]
    assert description.to_frame().set_index("tensor")["mse"]["0.bias"] > 0
    kc.encode(state, tmp_path / "w.kcz", "uniform:bits=3|entropy")
    kc.verify(tmp_path / "w.kcz", state)


def test_patterns_choose_what_is_quantised(tmp_path: Path) -> None:
    state = normalised().state_dict()
    path = tmp_path / "w.kcz"

    def quantised(**patterns: str) -> set[str]:
        told = kc.quantise(state, path, "grid|entropy", mse=1e-3, **patterns)
        kc.verify(path, state)
        return {item.name for item in told.tensors if item.step is not None}

    assert quantised(include="1.*") == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert quantised(exclude="*.bias") == {"0.weight", "2.weight"}
    assert quantised(include="*", exclude="1.*") == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with pytest.raises(WeightsError, match="no tensor matches 'no such'"):
        quantised(include="no such")


@pytest.mark.parametrize("wish", ["mse", "bits"])
def test_wishes_are_averages_over_what_is_quantised(tmp_path: Path, wish: str) -> None:
    alone = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    beside = alone | {"steps": torch.randint(1 << 40, (100, 100), generator=torch.Generator().manual_seed(1))}
    limit = {"mse": 1e-4, "bits": 4.0}[wish]
    one, other = (kc.quantise(state, tmp_path / "w.kcz", "grid|entropy", **{wish: limit}) for state in (alone, beside))
    assert one.quantised_weights == other.quantised_weights == 10_000
    steps = [next(item.step for item in found.tensors if item.name == "w") for found in (one, other)]
    assert steps[0] == pytest.approx(steps[1], rel=0.02)
    assert other.distortion == pytest.approx(one.distortion, rel=0.05)
