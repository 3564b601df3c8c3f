import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.errors import SpecError
from kcomplex.training.protocol.mode import Mode
from kcomplex.training.protocol.sequence import Sequence, mode

SPECS = [
    "drr:alpha=0.002,tolerance=0.2,include=*|uniform_qat:bits=3,include=*",
    "pmmp:alpha=0.002,u0=2,gamma_lr=0.1,tolerance=0.2|codeq:bits=3,dead_zone_lr=0.05",
    "relaxed_l1:alpha=0.002,tolerance=0.2|momos:block_size=1,motifs=8",
]
INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :2].mean(1).argsort().argsort() * 3 // 32


class Loop:
    def __init__(self, spec: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        self.mode: Mode = mode(spec)
        self.mode.prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.mode.parameter_groups(lr=0.02), lr=0.02)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            (cross_entropy(self.model(INPUTS), LABELS) + self.mode.penalty()).backward()
            self.optimizer.step()
            self.mode.after_step()
        self.mode.after_epoch()

    def take_up(self) -> None:
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for group in self.mode.parameter_groups(lr=0.02):
            if not known.issuperset(map(id, group["params"])):
                self.optimizer.add_param_group(group)

    def begin_fine_tuning(self) -> None:
        self.mode.begin_fine_tuning(lambda: float(cross_entropy(self.model(INPUTS), LABELS).detach()))
        self.take_up()


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_pruned_stays_so_and_what_is_left_is_quantised(spec):
    loop = Loop(spec)
    loop.steps(20)
    assert loop.model[0].weight.unique().numel() > 40
    loop.begin_fine_tuning()
    pruned = {name: mask.clone() for name, mask in loop.mode.first.pruned_state.pruned.items()}
    assert 0.1 < torch.cat([mask.flatten() for mask in pruned.values()]).double().mean() < 1
    loop.steps(10)
    plain = loop.mode.convert(loop.model)
    for name in ("0.weight", "2.weight"):
        weights = plain.get_parameter(name)
        assert weights.unique().numel() <= 8
        if "momos" not in spec:
            assert (weights[pruned[name]] == 0).all()
    expected = {name: loop.model.get_submodule(name[0]).weight.detach() for name in ("0.weight", "2.weight")}
    assert all(torch.equal(plain.get_parameter(name), weights) for name, weights in expected.items())
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert 0 < loop.mode.report()["zeros"] < 1 or "momos" in spec


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fine_tuning", [False, True])
def test_resuming_continues_bit_for_bit(spec, fine_tuning):
    first = Loop(spec)
    first.steps(5)
    if fine_tuning:
        first.begin_fine_tuning()
        first.steps(3)
    second = Loop(spec)
    second.mode.load_state_dict(copy.deepcopy(first.mode.state_dict()))
    second.take_up()
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for loop in (first, second):
        loop.steps(3)
        if not fine_tuning:
            loop.begin_fine_tuning()
            loop.steps(3)
    mine, yours = first.mode.convert(first.model).state_dict(), second.mode.convert(second.model).state_dict()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.mark.parametrize("spec", SPECS)
def test_specifications_build_sequences_again(spec):
    built = mode(spec)
    assert isinstance(built, Sequence)
    assert mode(built.spec) == built


def test_both_modes_get_the_number_of_samples():
    built = mode("pmmp|drr:samples=5").with_samples(70)
    assert (built.first.samples, built.second.samples) == (70, 5)


def test_three_modes_are_refused():
    with pytest.raises(SpecError, match="third"):
        mode("drr|uniform_qat|momos")


def test_a_state_from_before_fine_tuning_is_refused_after_it():
    loop = Loop(SPECS[0])
    before = loop.mode.state_dict()
    loop.begin_fine_tuning()
    with pytest.raises(SpecError, match="before"):
        loop.mode.load_state_dict(before)


def test_an_unattached_sequence_says_so():
    with pytest.raises(SpecError, match="prepare"):
        mode(SPECS[0]).state_dict()
    with pytest.raises(SpecError, match="prepare"):
        mode(SPECS[0]).report()
