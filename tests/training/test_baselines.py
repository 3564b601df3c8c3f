"""The methods to compare with: gradual pruning, lottery tickets, low rank, hashed sharing; batch normalisation."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import kcomplex as kc
from kcomplex.errors import SpecError
from kcomplex.training.protocol.batch_norm import reestimate_batch_norm
from kcomplex.training.protocol.mode import Mode
from kcomplex.training.protocol.sequence import mode
from kcomplex.training.pruning.gradual_pruning import GradualPruning
from kcomplex.training.pruning.lottery_ticket import LotteryTicket
from kcomplex.training.sharing.hashed_sharing import HashedSharing
from kcomplex.training.sharing.low_rank import LowRank
from kcomplex.training.sharing.momos import MoMos

INPUTS = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, 0, :, :2].mean((1, 2)).argsort().argsort() * 3 // 32
MODES = {
    "gradual": lambda **options: GradualPruning(zeros=0.7, span=9, every=3, **options),
    "gradual per tensor": lambda **options: GradualPruning(zeros=0.7, span=9, every=3, scope="tensor", **options),
    "lottery": lambda **options: LotteryTicket(share=0.4, rounds=2, epochs=1, rewind_step=2, **options),
    "low rank": lambda **options: LowRank(nuclear=1e-2, energy=0.9, every=3, **options),
    "hashed": lambda **options: HashedSharing(share=0.2, chunk=4, **options),
}


@pytest.fixture(params=list(MODES))
def make(request):
    return MODES[request.param]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3)
    )


class Loop:
    """A training in progress."""

    def __init__(self, configured: Mode) -> None:
        self.model = network()
        self.mode = configured
        self.mode.prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.mode.parameter_groups(lr=0.01), lr=0.01)

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.model(INPUTS), LABELS)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            (self.loss() + self.mode.penalty()).backward()
            self.optimizer.step()
            self.mode.after_step()
        self.mode.after_epoch()

    def state(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "mode": self.mode}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict) -> None:
        for name, part in (("model", self.model), ("optimizer", self.optimizer), ("mode", self.mode)):
            part.load_state_dict(state[name])


@pytest.mark.parametrize("fine_tuning", [False, True])
def test_training_resumes_bit_for_bit(make, fine_tuning):
    first = Loop(make())
    first.steps(4)
    if fine_tuning:
        first.mode.begin_fine_tuning(lambda: 0.0)
        first.steps(1)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Loop(make())
    second.load(torch.load(file, weights_only=True))
    for loop in (first, second):
        loop.steps(5)
        loop.steps(3)
    for ours, theirs in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    converted = (loop.mode.convert(loop.model).state_dict().values() for loop in (first, second))
    assert all(torch.equal(*pair) for pair in zip(*converted, strict=True))
    assert first.mode.report() == second.mode.report()


def test_training_lowers_the_loss(make):
    loop = Loop(make())
    before = loop.loss().item()
    loop.steps(15)
    loop.steps(15)
    loop.mode.begin_fine_tuning(lambda: 0.0)
    loop.steps(10)
    assert loop.loss().item() < 0.9 * before


def test_converting_gives_a_plain_network_and_leaves_biases_and_norms_alone(make):
    loop = Loop(make())
    loop.steps(9)
    before = copy.deepcopy(loop.model.state_dict())
    plain = loop.mode.convert(loop.model)
    assert set(plain.state_dict()) == set(network().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
    for name in ("0.bias", "1.weight", "4.bias"):
        assert torch.equal(plain.get_parameter(name), loop.model.get_parameter(name))
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert kc.describe(plain, "zstd")[0].bits > 0


def test_specifications_and_entry_points_build_the_modes_again(make):
    configured = make()
    assert mode(configured.spec) == configured
    assert getattr(kc.modes, type(configured).__name__) is type(configured)


def test_a_mode_serves_one_model_and_says_so(make):
    configured = make()
    with pytest.raises(SpecError, match="prepare"):
        configured.report()
    configured.prepare(network())
    with pytest.raises(SpecError, match="already"):
        configured.prepare(network())


def test_tied_weights_stay_tied(make):
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embedding"].weight
    configured = make()
    configured.prepare(model)
    plain = configured.convert(model)
    assert plain["head"].weight is plain["embedding"].weight


def test_the_schedule_is_the_cubic_one():
    pruning = GradualPruning(zeros=0.8, initial_zeros=0.2, begin=10, span=100, every=1)
    assert pruning.zeros_at(9) == 0
    assert pruning.zeros_at(10) == pytest.approx(0.2)
    assert pruning.zeros_at(60) == pytest.approx(0.8 - 0.6 / 8)
    assert pruning.zeros_at(110) == pruning.zeros_at(500) == 0.8


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_gradual_pruning_follows_its_schedule_and_never_restores(scope):
    loop = Loop(GradualPruning(zeros=0.75, span=6, every=2, scope=scope))
    gone = torch.zeros(768, dtype=torch.bool)
    for step in range(1, 10):
        loop.steps(1)
        latest = step - step % 2 if step < 6 else 6
        expected = loop.mode.zeros_at(latest) if latest else 0
        assert loop.mode.report()["zeros"] == pytest.approx(expected, abs=0.01)
        now = (loop.model[4].weight == 0).flatten()
        assert not (gone & ~now).any()
        gone = now
    if scope == "tensor":
        assert (loop.model[6].weight == 0).double().mean() == pytest.approx(0.75, abs=0.02)


def test_fine_tuning_prunes_the_rest():
    loop = Loop(GradualPruning(zeros=0.75, span=1000))
    loop.steps(3)
    loop.mode.begin_fine_tuning(lambda: 0.0)
    loop.steps(3)
    assert loop.mode.report()["zeros"] == pytest.approx(0.75, abs=0.01)


def test_tickets_are_rewound_to_the_step_asked_for():
    loop = Loop(LotteryTicket(share=0.5, rounds=2, epochs=1, rewind_step=2))
    loop.steps(2)
    assert loop.mode.rounds_done == 1
    early = copy.deepcopy(loop.mode.state_dict()["rest"])
    for left in (0.5, 0.25):
        weights = loop.model[4].weight
        kept = weights != 0
        assert torch.equal(weights[kept], early["4.weight"][kept])
        assert torch.equal(loop.model[4].bias, early["4.bias"])
        assert loop.mode.report()["zeros"] == pytest.approx(1 - left, abs=0.01)
        loop.steps(4)
    loop.steps(1)
    assert loop.mode.report() == {"zeros": pytest.approx(0.75, abs=0.01), "rounds": 2}
    assert not torch.equal(loop.model[4].bias, early["4.bias"])


def test_a_step_to_rewind_to_must_come_in_the_first_round():
    loop = Loop(LotteryTicket(rounds=1, epochs=1, rewind_step=50))
    with pytest.raises(SpecError, match="rewind_step"):
        loop.steps(3)


def test_truncation_keeps_the_energy_and_no_more_singular_values_than_it_takes():
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    configured = LowRank(energy=0.9, every=1)
    torch.manual_seed(0)
    nn.init.normal_(model[0].weight)
    before = model[0].weight.detach().clone()
    configured.prepare(model)
    configured.after_step()
    after = model[0].weight.detach()
    singular = torch.linalg.svdvals(before.double()).square()
    rank = int(torch.linalg.matrix_rank(after, rtol=1e-4))
    assert singular[:rank].sum() >= 0.9 * singular.sum() > singular[: rank - 1].sum()
    assert configured.report()["rank"] == rank / 20
    left, right = configured.factors()["0.weight"]
    torch.testing.assert_close(left @ right, after, rtol=1e-4, atol=1e-5)
    configured.after_step()
    torch.testing.assert_close(model[0].weight.detach(), after, rtol=1e-4, atol=1e-5)
    assert configured.report()["rank"] == rank / 20


def test_the_nuclear_norm_lowers_the_rank():
    ranks = []
    for nuclear in (0.0, 0.03):
        loop = Loop(LowRank(nuclear=nuclear, energy=0.95, every=5))
        loop.steps(60)
        ranks.append(loop.mode.report()["rank"])
    assert ranks[1] < ranks[0]


def test_the_penalty_is_the_nuclear_norm_where_it_was_linearised():
    model = network()
    configured = LowRank(nuclear=1.0)
    configured.prepare(model)
    expected = sum(
        torch.linalg.svdvals(model[i].weight.detach().reshape(len(model[i].weight), -1)).sum() for i in (0, 4, 6)
    )
    assert configured.penalty().item() == pytest.approx(float(expected), rel=1e-4)


def test_thin_layers_compute_what_the_dense_ones_do():
    loop = Loop(LowRank(nuclear=0.05, energy=0.7, every=5))
    loop.steps(20)
    plain, thin = loop.mode.convert(loop.model).eval(), loop.mode.factorised(loop.model).eval()
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (plain, thin)]
    assert sizes[1] < sizes[0]
    torch.testing.assert_close(thin(INPUTS), plain(INPUTS), rtol=1e-4, atol=1e-4)


def test_all_weights_come_from_the_bank():
    model = network()
    deviation = model[4].weight.std().item()
    configured = HashedSharing(share=0.2, chunk=4)
    configured.prepare(model)
    entries = math.ceil(0.2 * (36 + 768 + 36))
    assert configured.report() == {"parameters": entries, "share": entries / 840, "zeros": 0.0}
    weights = [model[index].weight.detach() for index in (0, 4, 6)]
    scaled = torch.cat(
        [
            (w / m.parametrizations.weight[0].factors.abs()[0]).flatten()
            for w, m in zip(weights, (model[0], model[4], model[6]), strict=True)
        ]
    )
    assert scaled.abs().mul(1e4).round().unique().numel() <= entries
    assert 0.5 * deviation < float(weights[1].std()) < 2 * deviation
    assert sum(parameter.numel() for parameter in model.parameters()) == entries + 4 + 4 + 4 + 12 + 3


def test_chunks_lie_all_over_the_bank():
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    HashedSharing(share=0.05, chunk=4).prepare(model)
    used = model[0].parametrizations.weight[0].places.unique()
    assert len(used) == 500


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (GradualPruning, {"zeros": 1.0}),
        (GradualPruning, {"zeros": 0.5, "initial_zeros": 0.6}),
        (GradualPruning, {"span": 0}),
        (GradualPruning, {"scope": "layer"}),
        (LotteryTicket, {"share": 0.0}),
        (LotteryTicket, {"epochs": 0}),
        (LowRank, {"nuclear": -1.0}),
        (LowRank, {"energy": 0.0}),
        (LowRank, {"every": 0}),
        (HashedSharing, {"share": 0.0}),
        (HashedSharing, {"chunk": 0}),
    ],
)
def test_senseless_options_are_refused(cls, options):
    with pytest.raises(SpecError, match=cls.name):
        cls(**options)


def test_statistics_are_those_of_the_projected_network():
    model = network().train()
    momos = MoMos(capacity=0.25, include=("4.weight", "0.weight"))
    momos.prepare(model)
    for _ in range(20):
        model(INPUTS)
    momos.after_epoch()
    stale = model[1].running_mean.clone()
    assert reestimate_batch_norm(model, [INPUTS[:16], (INPUTS[16:], LABELS[16:])]) == 1
    before = model[0](INPUTS)
    torch.testing.assert_close(model[1].running_mean, before.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model[1].running_mean, stale)
    assert model.training
    assert model[1].momentum == 0.1


def test_re_estimation_needs_batches_only_where_there_is_something_to_estimate():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecError, match="batches"):
        reestimate_batch_norm(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert reestimate_batch_norm(nn.Linear(2, 2), []) == 0
