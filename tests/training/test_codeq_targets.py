"""CoDeQ: targets, exclusions, bit operations, and integers in a file."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.errors import FormatError, SourceNotFoundError, SpecError, WeightsError
from kcomplex.training.protocol.sequence import mode
from kcomplex.training.quantising.bit_operations import bit_operations, weight_bits
from kcomplex.training.quantising.codeq import CoDeQ
from kcomplex.training.quantising.integers import load_integers, read_integers, save_integers

OPTIMIZERS = {"adamw": (torch.optim.AdamW, 3e-3), "sgd": (torch.optim.SGD, 3e-2)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))


def trained(configured: CoDeQ, steps: int, optimizer: str = "adamw") -> nn.Module:
    model = network()
    configured.prepare(model)
    inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    labels = inputs[:, :4].argmax(1)
    cls, lr = OPTIMIZERS[optimizer]
    stepping = cls(configured.parameter_groups(lr=lr), lr=lr)
    for _ in range(steps):
        stepping.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        stepping.step()
        configured.after_step()
    return model


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_the_target_of_zeros_is_reached_and_held(target, optimizer):
    configured = CoDeQ(bits=3, target_zeros=target, dead_zone_lr=1e-2)
    trained(configured, 300, optimizer)
    assert configured.report()["zeros"] == pytest.approx(target, abs=0.03)


@pytest.mark.parametrize("target", [3.0, 5.5])
def test_the_target_of_bits_is_reached_together_with_that_of_zeros(target):
    configured = CoDeQ(learnable_bits=True, target_bits=target, target_zeros=0.5, dead_zone_lr=1e-2, bits_lr=1e-2)
    trained(configured, 400)
    # Bits are whole numbers, and there are only three tensors.
    assert configured.report()["bits"] == pytest.approx(target, abs=0.7)
    assert configured.report()["zeros"] == pytest.approx(0.5, abs=0.05)


def test_fine_tuning_fixes_dead_zones_and_bits():
    configured = CoDeQ(learnable_bits=True, target_zeros=0.5)
    model = trained(configured, 20)
    configured.begin_fine_tuning(lambda: 0.0)
    logits = [value.clone() for name, value in model.state_dict().items() if "logit" in name]
    optimizer = torch.optim.AdamW(configured.parameter_groups(lr=0.01), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
        configured.after_step()
    after = [value for name, value in model.state_dict().items() if "logit" in name]
    assert all(torch.equal(*pair) for pair in zip(logits, after, strict=True))


def test_a_state_with_other_targets_is_refused():
    configured, other = CoDeQ(target_zeros=0.5), CoDeQ()
    configured.prepare(network())
    other.prepare(network())
    with pytest.raises(SpecError, match="targets"):
        other.load_state_dict(configured.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"target_zeros": 1.0},
        {"target_zeros": -0.1},
        {"target_bits": 3.0},
        {"target_bits": 9.0, "learnable_bits": True},
        {"target_zeros": 0.5, "reference": True},
        {"per_channel": True, "reference": True},
    ],
)
def test_senseless_targets_are_refused(options):
    with pytest.raises(SpecError, match="codeq"):
        CoDeQ(**options)


class Named(nn.Module):
    """A first convolution whose name is also that of one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential()
        self.layer1.conv1 = nn.Conv2d(4, 4, 3)
        self.layer1.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer1(self.conv1(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"exclude": ("conv1",)}, {"layer1.conv1.weight", "fc.weight"}),
        ({"exclude": ("conv1.weight", "fc")}, {"layer1.conv1.weight"}),
        ({"exclude": ("*conv1",)}, {"fc.weight"}),
        ({"exclude": ("type:Linear",)}, {"conv1.weight", "layer1.conv1.weight"}),
        ({"include": ("type:_ConvNd",)}, {"conv1.weight", "layer1.conv1.weight"}),
        ({"include": ("layer1.*",), "exclude": ("type:_BatchNorm",)}, {"layer1.conv1.weight", "layer1.conv1.bias"}),
        ({"include": ("fc",)}, {"fc.weight"}),
    ],
)
def test_parameters_are_chosen_by_exact_name_and_by_type(options, names):
    configured = CoDeQ(**options)
    configured.prepare(Named())
    assert set(configured.integers()) == names


def test_bit_operations_count_excluded_layers_at_full_precision():
    model = Named()
    with torch.no_grad():
        model.conv1.weight[:2] = 0
        model.fc.weight[:] = 0
    inputs = torch.randn(2, 3, 8, 8)
    frame = bit_operations(model, inputs, {"conv1.weight": 4.0})
    first = 2 * 4 * 6 * 6 * 27
    inner = 2 * 4 * 4 * 4 * 36
    assert frame["macs"].to_dict() == {"conv1.weight": first, "layer1.conv1.weight": inner, "fc.weight": 2 * 2 * 4}
    assert frame.loc["conv1.weight", "bit_operations"] == first * 0.5 * 4 * 32
    assert frame.loc["fc.weight", "bit_operations"] == frame.loc["fc.weight", "full"] == 16 * 1024
    assert frame.attrs["relative"] == pytest.approx(frame["bit_operations"].sum() / frame["full"].sum())
    assert bit_operations(model, inputs, {}).attrs["relative"] == 1
    assert bit_operations(model, inputs, {"conv1.weight": 4}, activation_bits=8).loc[
        "conv1.weight", "bit_operations"
    ] == pytest.approx(first * 0.5 * 4 * 8)


def test_five_per_cent_is_four_bits_at_three_fifths_zeros():
    model = nn.Linear(50, 20)
    with torch.no_grad():
        model.weight.view(-1)[:600] = 0
    assert bit_operations(model, torch.randn(1, 50), {"weight": 4}).attrs["relative"] == pytest.approx(0.05)


def test_bit_operations_of_attention_transposed_convolutions_and_shared_layers():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    query = torch.randn(1, 5, 8)
    frame = bit_operations(attention, (query, query, query), {})
    assert frame["macs"].to_dict() == {"in_proj_weight": 3 * 5 * 8 * 8, "out_proj.weight": 5 * 8 * 8}
    several = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
    key, value = torch.randn(1, 3, 4), torch.randn(1, 3, 6)
    frame = bit_operations(several, (query, key, value), {})
    assert frame.loc["k_proj_weight", "macs"] == 3 * 4 * 8
    transposed = nn.ConvTranspose2d(2, 3, 3)
    assert bit_operations(transposed, torch.randn(1, 2, 4, 4), {}).loc["weight", "macs"] == 2 * 16 * 27
    layer = nn.Linear(4, 4)
    assert bit_operations(nn.Sequential(layer, layer), torch.randn(1, 4), {}).loc["0.weight", "macs"] == 32


def test_bits_are_those_of_what_multiplies_and_is_quantised():
    model = Named()
    chained = mode("gradual_pruning:span=3|uniform_qat:bits=5,include=*,exclude=fc")
    chained.prepare(model)
    assert weight_bits(model) == {}
    chained.begin_fine_tuning(lambda: 0.0)
    bits = weight_bits(model)
    assert bits == {"conv1.weight": 5, "layer1.conv1.weight": 5}
    frame = bit_operations(chained.convert(model), torch.randn(1, 3, 8, 8), bits)
    assert frame["bits"].to_dict() == {"conv1.weight": 5, "layer1.conv1.weight": 5, "fc.weight": 32}
    assert weight_bits(nn.ReLU()) == {}


def test_bits_of_something_that_multiplies_nothing_are_refused():
    with pytest.raises(SpecError, match="bias"):
        bit_operations(nn.Linear(3, 3), torch.randn(1, 3), {"bias": 4})
    with pytest.raises(SpecError, match="none at all"):
        bit_operations(nn.ReLU(), torch.randn(1, 3), {})


def test_the_weights_of_a_mode_in_training_are_not_counted():
    model = network()
    CoDeQ().prepare(model)
    with pytest.raises(SpecError, match=r"not plain parameters: 0\.weight, .*convert"):
        bit_operations(model, torch.zeros(1, 20), {})


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_reload_into_the_plain_module_bit_for_bit(tmp_path, per_channel, dtype):
    model = Named().to(dtype)
    configured = CoDeQ(bits=5, per_channel=per_channel, exclude=("fc",))
    configured.prepare(model)
    plain = configured.convert(model)
    save_integers(tmp_path / "model.safetensors", plain, configured.integers())
    fresh = Named().to(dtype)
    fresh.load_state_dict(load_integers(tmp_path / "model.safetensors"))
    for name, value in plain.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    stored = read_integers(tmp_path / "model.safetensors")
    assert set(stored) == {"conv1.weight", "layer1.conv1.weight"}
    item = stored["layer1.conv1.weight"]
    assert (item.bits, item.symbols.dtype, item.step.numel()) == (5, torch.int8, 4 if per_channel else 1)


def test_bit_operations_of_a_tied_weight_are_those_of_what_multiplies():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))
    model[2].weight = model[0].weight
    configured = CoDeQ(bits=4)
    configured.prepare(model)
    bits = weight_bits(model)
    assert bits == {"0.weight": 4, "1.weight": 4, "2.weight": 4}
    frame = bit_operations(configured.convert(model), torch.arange(5), bits)
    assert frame["macs"].to_dict() == {"1.weight": 5 * 64, "2.weight": 5 * 160}
    assert frame["bits"].to_dict() == {"1.weight": 4, "2.weight": 4}


def test_bit_operations_take_quantised_embeddings_and_leave_them_out():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    frame = bit_operations(model, torch.arange(5), {"0.weight": 2, "1.weight": 4})
    assert list(frame.index) == ["1.weight"]
    with pytest.raises(SpecError, match=r"2\.weight"):
        bit_operations(model, torch.arange(5), {"2.weight": 4})


def test_tied_weights_are_stored_once_and_come_back_under_both_names(tmp_path):
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "head": nn.Linear(8, 20)})
    model["head"].weight = model["embedding"].weight
    configured = CoDeQ()
    configured.prepare(model)
    plain = configured.convert(model)
    save_integers(tmp_path / "a.safetensors", plain, configured.integers())
    state = load_integers(tmp_path / "a.safetensors")
    assert set(state) == set(plain.state_dict())
    assert torch.equal(state["head.weight"], plain["embedding"].weight)


def test_other_weights_than_the_integers_are_refused(tmp_path):
    model = nn.Linear(5, 5)
    configured = CoDeQ()
    configured.prepare(model)
    plain = copy.deepcopy(configured.convert(model))
    with torch.no_grad():
        plain.weight += 1
    with pytest.raises(WeightsError, match="weight"):
        save_integers(tmp_path / "a.safetensors", plain, configured.integers())
    assert not list(tmp_path.iterdir())


def test_broken_files_of_integers_are_refused(tmp_path):
    model = nn.Linear(5, 5)
    configured = CoDeQ()
    configured.prepare(model)
    path = tmp_path / "a.safetensors"
    save_integers(path, configured.convert(model), configured.integers())
    data = path.read_bytes()
    with pytest.raises(SourceNotFoundError):
        load_integers(tmp_path / "b.safetensors")
    for broken in (data[:40], b"", data[:-7], data.replace(b'\\"bits\\": 4', b'\\"bits\\": 1'), b"\x00" * 64):
        path.write_bytes(broken)
        with pytest.raises(FormatError):
            load_integers(path)
    path.write_bytes(data.replace(b"kcomplex integers 1", b"kcomplex integers 9"))
    with pytest.raises(FormatError, match="save_integers"):
        load_integers(path)
