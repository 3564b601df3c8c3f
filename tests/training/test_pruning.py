"""Prices, thresholds and masks, which all pruning modes share; DRR and R-L1 by their golden values."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kcomplex.errors import SpecError, WeightsError
from kcomplex.training.protocol.mode import Mode
from kcomplex.training.protocol.sequence import mode
from kcomplex.training.pruning.drr import DRR
from kcomplex.training.pruning.fpp import FPP
from kcomplex.training.pruning.layerwise import Layerwise
from kcomplex.training.pruning.pmmp import PMMP
from kcomplex.training.pruning.pruning import Pruning
from kcomplex.training.pruning.relaxed_l1 import RelaxedL1

PRUNING: list[type[Pruning]] = [PMMP, FPP, DRR, RelaxedL1]
every_mode = pytest.mark.parametrize("kind", PRUNING, ids=lambda kind: kind.name)


def single(values: list[float]) -> nn.Linear:
    """Return a layer whose weights are these values."""
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


def gradient(configured: Mode, values: list[float]) -> tuple[float, list[float]]:
    layer = single(values).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values], dtype=torch.float64))
    configured.prepare(layer)
    penalty = configured.penalty()
    penalty.backward()
    assert layer.weight.grad is not None
    return penalty.item(), layer.weight.grad[0].tolist()


THETA = [-0.3, 0.0, 0.05, 2.0]


def test_the_smooth_count_is_the_published_one():
    penalty, slopes = gradient(DRR(alpha=1e-3, beta=5.0), THETA)
    assert penalty == pytest.approx(0.001998023657, abs=1e-12)
    assert slopes == pytest.approx([-1.11565e-3, 0, 3.89400e-3, 2.26999649e-7], abs=1e-8)
    penalty, slopes = gradient(DRR(alpha=1e-3, beta=5.0, l2=1e-4), THETA)
    assert slopes[-1] == pytest.approx(4.0023e-4, abs=1e-8)
    assert penalty == pytest.approx(0.001998023657 + 1e-4 * 4.0925, abs=1e-12)


def test_the_sharper_the_smooth_count_the_closer_it_is_to_the_number_of_weights():
    penalties = [gradient(DRR(alpha=1.0, beta=beta), THETA)[0] for beta in (1.0, 10.0, 100.0, 1e4)]
    assert penalties == sorted(penalties)
    assert penalties[-1] == pytest.approx(3.0)


def test_layers_are_weighed_as_published():
    model = nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))
    configured = DRR(alpha=1e-3, per_layer=True, include=("*",))
    configured.prepare(model)
    factors = configured.layer_factors()
    assert factors == pytest.approx(
        {
            f"{layer}.{part}": factor
            for layer, factor in enumerate((0.377367, 2.952492, 87.9901))
            for part in ("weight", "bias")
        },
        rel=1e-6,
    )
    expected = sum(
        factors[name] * 1e-3 * (1 - torch.exp(-5 * parameter.abs())).sum().item()
        for name, parameter in model.named_parameters()
    )
    assert configured.penalty().item() == pytest.approx(expected, rel=1e-5)


def test_the_sum_of_magnitudes_pulls_alike_at_every_weight():
    penalty, slopes = gradient(RelaxedL1(alpha=1e-3, l2=1e-4), THETA)
    assert penalty == pytest.approx(1e-3 * 2.35 + 1e-4 * 4.0925)
    assert slopes == pytest.approx([-1e-3 - 6e-5, 0, 1e-3 + 1e-5, 1e-3 + 4e-4])


@every_mode
def test_the_price_is_in_bits_or_in_nats(kind):
    # The identity's figures: a float32 weight on ImageNet, on MNIST's 45,000, and on 6.16 GB of text.
    for samples, price in ((1_281_024, 1.7315e-5), (45_000, 4.929e-4), (6_159_990_784, 3.6008e-9)):
        assert kind(bits_per_parameter=32.0, samples=samples).price == pytest.approx(price, rel=1e-4)
    assert kind(alpha=1e-4, samples=1347).price == 1e-4
    assert mode(f"{kind.name}:bits_per_parameter=4,samples=10").price == pytest.approx(0.4 * math.log(2))
    with pytest.raises(SpecError, match="samples"):
        kind().prepare(nn.Linear(2, 2))


@every_mode
@pytest.mark.parametrize(
    "options",
    [{"alpha": -1.0}, {"samples": 0}, {"rising_epochs": -1}, {"tolerance": math.nan}, {"error_tolerance": -0.1}],
)
def test_senseless_options_are_refused(kind, options):
    with pytest.raises(SpecError, match=next(iter(options))):
        kind(**options)


@every_mode
def test_the_price_rises_in_equal_steps_and_survives_a_restart(kind):
    def attached(**options):
        configured = kind(**options)
        configured.prepare(single([0.5, -0.2]))
        return configured

    rising = attached(alpha=0.4, rising_epochs=4)
    for epoch, price in enumerate((0.1, 0.2, 0.3, 0.4, 0.4)):
        assert rising.penalty().item() == pytest.approx(attached(alpha=price).penalty().item())
        assert rising.settled() == (epoch >= 4)
        again = attached(alpha=0.4, rising_epochs=4)
        again.load_state_dict(rising.state_dict())
        assert again.penalty().item() == rising.penalty().item()
        rising.after_epoch()


def test_a_price_that_nothing_pays_while_training_cannot_rise():
    with pytest.raises(SpecError, match="rising_epochs"):
        Layerwise(rising_epochs=2)


def test_a_count_without_sharpness_is_refused():
    with pytest.raises(SpecError, match="beta"):
        DRR(beta=0.0)


@every_mode
def test_pruning_goes_by_the_share_of_mistakes_where_that_is_asked_for(kind):
    layer = single([0.1, -0.2, 0.3, -0.4])

    def mistakes() -> float:
        return 0.01 * int((layer.weight == 0).sum())

    configured = kind(alpha=1e-3, error_tolerance=0.025)
    configured.prepare(layer)
    with pytest.raises(SpecError, match="error"):
        configured.begin_fine_tuning(lambda: math.nan)
    configured.begin_fine_tuning(lambda: math.nan, mistakes)
    assert (layer.weight[0] == 0).tolist() == [True, True, False, False]


@every_mode
def test_a_loss_that_is_not_a_number_prunes_nothing(kind):
    layer = single([0.1, -0.2, 0.3, -0.4])
    before = layer.weight.detach().clone()
    configured = kind(alpha=1e-3)
    configured.prepare(layer)
    with pytest.raises(WeightsError, match="nan"):
        configured.begin_fine_tuning(lambda: math.nan)
    assert torch.equal(layer.weight, before)
    assert configured.penalty().item() > 0


@every_mode
def test_what_is_pruned_stays_pruned_whatever_the_momentum(kind):
    layer = single([0.01, 0.8, -0.02, 0.5])
    wanted = layer.weight.detach().clone()
    configured = kind(alpha=1e-3)
    configured.prepare(layer)
    optimizer = torch.optim.Adam(configured.parameter_groups(lr=0.05), lr=0.05)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            ((layer.weight - wanted - 1).square().sum() + configured.penalty()).backward()
            optimizer.step()
            configured.after_step()

    steps(3)
    with torch.no_grad():
        layer.weight.copy_(wanted)
    configured.begin_fine_tuning(lambda: 1 + (layer.weight - wanted).detach().square().sum().item())
    steps(10)
    assert (layer.weight[0] == 0).tolist() == [True, False, True, False]
    assert configured.penalty().item() == 0
    assert configured.report()["zeros"] == 0.5


@every_mode
def test_a_state_of_another_model_is_refused(kind):
    first, second = kind(alpha=0.1), kind(alpha=0.1)
    model = nn.Linear(3, 3)
    first.prepare(model)
    second.prepare(nn.Linear(3, 4))
    first.begin_fine_tuning(lambda: 1.0)
    with pytest.raises(WeightsError, match="weight"):
        second.load_state_dict(first.state_dict())


def saddle_steps(configured: PMMP, count: int, lr: float = 0.1) -> tuple[nn.Linear, Callable[[], dict[str, float]]]:
    layer = single([0.3]).double()
    with torch.no_grad():
        layer.weight.fill_(0.3)
    configured.prepare(layer)
    optimizer = torch.optim.SGD(configured.parameter_groups(lr=lr), lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        ((layer.weight - 1).square().sum() + configured.penalty()).backward()
        optimizer.step()
        configured.after_step()
    return layer, lambda: {key: part.item() for key, part in configured.companions["weight"].items()}


@pytest.mark.parametrize("longest", [None, 2])
def test_fictitious_play_follows_the_averaged_opponents(longest):
    theta, w, gamma, u = 0.3, 0.3, 0.8, 0.5
    means = [theta, w, gamma, u]
    for count in range(1, 6):
        share = 1 / (min(count, longest or count) + 1)
        mean_theta, mean_w, mean_gamma, mean_u = means
        slopes = (
            2 * (theta - 1) + 2 * mean_u * (theta - w * gamma),
            2 * mean_u * gamma * (w - theta),
            mean_u * (w * w - 2 * w * theta) + 0.2,
            -(mean_theta**2 - 2 * mean_theta * mean_w * mean_gamma + mean_w**2 * mean_gamma),
        )
        theta, w, gamma, u = (value - 0.1 * slope for value, slope in zip((theta, w, gamma, u), slopes, strict=True))
        gamma, u = min(max(gamma, 0.0), 1.0), max(u, 0.0)
        means = [mean + (new - mean) * share for mean, new in zip(means, (theta, w, gamma, u), strict=True)]
    configured = FPP(alpha=0.2, u0=0.5, p0=0.8, gamma_lr=0.1, u_lr=0.1, longest=longest)
    layer, companions = saddle_steps(configured, 5)
    assert layer.weight.item() == pytest.approx(theta, abs=1e-12)
    assert companions() == pytest.approx({"w": w, "gamma": gamma, "u": u}, abs=1e-12)
    assert {key: mean.item() for key, mean in configured.state_dict()["means"]["weight"].items()} == pytest.approx(
        dict(zip(("theta", "w", "gamma", "u"), means, strict=True)), abs=1e-12
    )


def test_the_first_step_of_fictitious_play_is_that_of_pmmp():
    options = {"alpha": 0.2, "u0": 0.5, "p0": 0.8, "gamma_lr": 0.1, "u_lr": 0.1}
    (one, first), (other, second) = saddle_steps(PMMP(**options), 1), saddle_steps(FPP(**options), 1)
    assert one.weight.item() == pytest.approx(other.weight.item(), abs=1e-15)
    assert first() == pytest.approx(second(), abs=1e-15)


def test_means_forget_nothing_or_something():
    with pytest.raises(SpecError, match="longest"):
        FPP(longest=0)


@pytest.mark.parametrize("kind", [PMMP, FPP])
def test_a_phase_may_end_when_the_probabilities_are_decided(kind):
    configured = kind(alpha=0.1)
    layer = single([0.5] * 200)
    configured.prepare(layer)
    assert configured.settled()
    with torch.no_grad():
        configured.companions["weight"]["gamma"][0, :3] = 0.5
    assert not configured.settled()
    configured.begin_fine_tuning(lambda: 1.0)
    assert configured.settled()


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_short_weights_are_priced_in_full_precision(kind, dtype):
    model = nn.Linear(50, 40).to(dtype)
    configured = kind(alpha=1e-3)
    configured.prepare(model)
    penalty = configured.penalty()
    assert penalty.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
    exact = kind(alpha=1e-3)
    double = nn.Linear(50, 40).double()
    double.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    exact.prepare(double)
    assert penalty.item() == pytest.approx(exact.penalty().item(), rel=1e-5)
    configured.begin_fine_tuning(lambda: 1.0)
    assert configured.penalty().dtype == penalty.dtype
