"""What the modes that work on single weights have in common: uniform_qat, codeq and the pruning ones."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.errors import SpecError
from kcomplex.sources.open import open_weights
from kcomplex.training.protocol.mode import Mode, chosen_parameters
from kcomplex.training.protocol.sequence import mode
from kcomplex.training.pruning.drr import DRR
from kcomplex.training.pruning.fpp import FPP
from kcomplex.training.pruning.layerwise import Layerwise
from kcomplex.training.pruning.pmmp import PMMP
from kcomplex.training.pruning.pruning import Pruning
from kcomplex.training.pruning.relaxed_l1 import RelaxedL1
from kcomplex.training.quantising.codeq import CoDeQ
from kcomplex.training.quantising.uniform_qat import UniformQAT
from kcomplex.training.sharing.momos import MoMos
from kcomplex.weights import words_of

INPUTS = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, 0, :, :2].mean((1, 2)).argsort().argsort() * 3 // 32
OPTIMIZERS = {
    "adam": (torch.optim.Adam, 0.02),
    "adamw": (torch.optim.AdamW, 0.02),
    "sgd": (partial(torch.optim.SGD, momentum=0.5), 0.1),
}
MODES = {
    "uniform_qat": lambda **options: UniformQAT(bits=3, **options),
    "uniform_qat per channel": lambda **options: UniformQAT(bits=3, per_channel=True, **options),
    "codeq": lambda **options: CoDeQ(bits=3, dead_zone_lr=0.05, **options),
    "codeq reference": lambda **options: CoDeQ(bits=3, dead_zone_lr=0.05, reference=True, **options),
    "codeq bits": lambda **options: CoDeQ(learnable_bits=True, max_bits=4, bits_lr=0.05, **options),
    "codeq targets": lambda **options: CoDeQ(
        initial_logit=0.5,
        bits_lr=0.05,
        dead_zone_lr=0.05,
        learnable_bits=True,
        target_bits=4,
        target_zeros=0.4,
        per_channel=True,
        **options,
    ),
    "pmmp": lambda **options: PMMP(alpha=2e-3, gamma_lr=0.1, u0=2.0, tolerance=0.2, **options),
    "fpp": lambda **options: FPP(alpha=2e-3, gamma_lr=0.1, u0=2.0, tolerance=0.2, **options),
    "drr": lambda **options: DRR(alpha=2e-3, l2=1e-4, tolerance=0.2, **options),
    "drr per layer": lambda **options: DRR(alpha=2e-3, per_layer=True, tolerance=0.2, **options),
    "layerwise": lambda **options: Layerwise(alpha=1e-3, steps=100, tolerance=0.2, **options),
    "relaxed_l1": lambda **options: RelaxedL1(alpha=2e-3, l2=1e-4, tolerance=0.2, **options),
}


@pytest.fixture(params=list(MODES))
def make(request: pytest.FixtureRequest) -> Callable[..., Mode]:
    return MODES[request.param]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3)
    )


class Loop:
    """A training in progress."""

    def __init__(self, configured: Mode, optimizer: str = "adamw") -> None:
        self.model = network()
        self.mode = configured
        self.mode.prepare(self.model)
        cls, lr = OPTIMIZERS[optimizer]
        self.optimizer = cls(self.mode.parameter_groups(lr=lr, weight_decay=1e-3), lr=lr)

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.model(INPUTS), LABELS)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            (self.loss() + self.mode.penalty()).backward()
            self.optimizer.step()
            self.mode.after_step()
        self.mode.after_epoch()

    def begin_fine_tuning(self) -> None:
        self.mode.begin_fine_tuning(self.evaluate)

    def evaluate(self) -> float:
        self.model.eval()
        with torch.no_grad():
            loss = float(self.loss())
        self.model.train()
        return loss

    def state(self) -> dict:
        return copy.deepcopy(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "mode": self.mode.state_dict()}
        )

    def load(self, state: dict) -> None:
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mode.load_state_dict(state["mode"])


def bits_of(source: nn.Module) -> dict[str, bytes]:
    return {name: words_of(handle.read()).tobytes() for name, handle in open_weights(source).items()}


def flattened(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in flattened(value)]


def test_accumulated_gradients_are_those_of_the_whole_batch(make):
    whole, parts = Loop(make()), Loop(make())
    for loop in (whole, parts):
        loop.model.eval()
        loop.steps(2)
    assert bits_of(whole.model) == bits_of(parts.model)
    (whole.loss() + whole.mode.penalty()).backward()
    for half in (slice(0, 16), slice(16, 32)):
        loss = cross_entropy(parts.model(INPUTS[half]), LABELS[half])
        ((loss + parts.mode.penalty()) / 2).backward()
    for mine, yours in zip(whole.optimizer.param_groups, parts.optimizer.param_groups, strict=True):
        for one, other in zip(mine["params"], yours["params"], strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_autocast_leaves_the_penalty_exact(make):
    loop = Loop(make())
    loop.steps(2)
    outside = loop.mode.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loop.mode.penalty()
        loss = loop.loss() + inside
    assert torch.equal(inside, outside)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in loop.model.parameters())
    assert all(parameter.grad.dtype == torch.float32 for parameter in loop.model.parameters())


def test_scaled_gradients_are_unscaled_with_the_penalty(make):
    plain, scaled = Loop(make()), Loop(make())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (plain.loss() + plain.mode.penalty()).backward()
    scaler.scale(scaled.loss() + scaled.mode.penalty()).backward()
    scaler.unscale_(scaled.optimizer)
    for mine, yours in zip(plain.optimizer.param_groups, scaled.optimizer.param_groups, strict=True):
        for one, other in zip(mine["params"], yours["params"], strict=True):
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_training_lowers_the_loss_whatever_the_optimiser(make, optimizer):
    loop = Loop(make(), optimizer)
    before = loop.evaluate()
    loop.steps(30)
    loop.begin_fine_tuning()
    loop.steps(5)
    assert loop.evaluate() < 0.9 * before


def test_converting_gives_exactly_the_weights_that_the_network_computes_with(make):
    loop = Loop(make())
    loop.steps(12)
    loop.begin_fine_tuning()
    loop.steps(3)
    before = copy.deepcopy(loop.model.state_dict())
    plain = loop.mode.convert(loop.model)
    assert bits_of(plain) == bits_of(loop.model)
    fresh = network(seed=9)
    assert set(plain.state_dict()) == set(fresh.state_dict())
    fresh.load_state_dict(plain.state_dict())
    loop.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(INPUTS), loop.model(INPUTS), rtol=0, atol=0)
    loop.model.train()
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
    loop.steps(1)
    assert bits_of(plain) != bits_of(loop.model)


def test_training_is_deterministic(make):
    runs = []
    for _ in range(2):
        loop = Loop(make())
        loop.steps(6)
        loop.begin_fine_tuning()
        loop.steps(2)
        runs.append(loop)
    assert bits_of(runs[0].model) == bits_of(runs[1].model)


@pytest.mark.parametrize("interrupted", ["while regularised", "while fine-tuning"])
def test_resuming_continues_bit_for_bit(make, interrupted):
    first = Loop(make())
    first.steps(6)
    if interrupted == "while fine-tuning":
        first.begin_fine_tuning()
        first.steps(2)
    second = Loop(make())
    second.load(first.state())
    for loop in (first, second):
        loop.steps(4)
    assert bits_of(first.model) == bits_of(second.model)
    ours, theirs = flattened(first.state()), flattened(second.state())
    assert len(ours) == len(theirs)
    assert all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


def test_a_state_survives_a_file_that_may_hold_only_weights(make, tmp_path):
    loop = Loop(make())
    loop.steps(3)
    loop.begin_fine_tuning()
    torch.save(loop.state(), tmp_path / "state.pt")
    second = Loop(make())
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert bits_of(second.model) == bits_of(loop.model)


def test_biases_and_norms_are_left_alone_by_default(make):
    loop = Loop(make())
    assert {name for name in loop.model.state_dict() if name.endswith("weight")} >= {"1.weight"}
    loop.steps(8)
    loop.begin_fine_tuning()
    weights = open_weights(loop.mode.convert(loop.model))
    for name in ("0.bias", "1.weight", "1.bias", "4.bias", "6.bias"):
        values = weights[name].values()
        assert len(set(values.tolist())) == len(values), name
        assert (values != 0).all()


def test_globs_choose_other_parameters(make):
    excluded = Loop(make(exclude=("6.*",)))
    excluded.steps(8)
    excluded.begin_fine_tuning()
    included = Loop(make(include=("6.weight",)))
    included.steps(8)
    included.begin_fine_tuning()
    for loop, touched, untouched in ((excluded, "4.weight", "6.weight"), (included, "6.weight", "4.weight")):
        weights = open_weights(loop.mode.convert(loop.model))
        distinct = {name: weights[name].read().unique().numel() for name in (touched, untouched)}
        assert distinct[untouched] == weights[untouched].elements
        assert distinct[touched] < weights[touched].elements


def test_a_pattern_that_matches_nothing_is_an_error(make):
    with pytest.raises(SpecError, match="nowhere"):
        make(include=("nowhere.*",)).prepare(network())


def test_a_mode_serves_one_model_and_says_so(make):
    configured = make()
    with pytest.raises(SpecError, match="prepare"):
        configured.parameter_groups(lr=0.1)
    with pytest.raises(SpecError, match="prepare"):
        configured.report()
    configured.prepare(network())
    with pytest.raises(SpecError, match="already"):
        configured.prepare(network())


def test_a_refused_model_leaves_the_mode_free_for_another(make):
    configured, model = make(exclude=("nowhere.*",)), network()
    with pytest.raises(SpecError, match="nowhere"):
        configured.prepare(model)
    with pytest.raises(SpecError, match="prepare"):
        configured.report()
    configured = make()
    with pytest.raises(SpecError, match="no parameter"):
        configured.prepare(nn.ReLU())
    with pytest.raises(SpecError, match="prepare"):
        configured.report()
    configured.prepare(model)
    assert configured.report()


def test_an_attached_mode_changes_no_other_model(make):
    configured, other = make(), network()
    configured.prepare(network())
    names, before = list(other.state_dict()), configured.report()
    with pytest.raises(SpecError, match="already"):
        configured.prepare(other)
    assert list(other.state_dict()) == names
    assert configured.report() == before


@pytest.mark.parametrize(
    "configured", [PMMP(alpha=0.1), DRR(alpha=0.1), MoMos()], ids=lambda configured: configured.name
)
def test_there_is_no_state_before_preparing(configured):
    with pytest.raises(SpecError, match="prepare"):
        configured.state_dict()


def test_complex_parameters_are_refused_before_anything_changes(make):
    model = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(SpecError, match="complex64"):
        make().prepare(model)
    assert list(model.state_dict()) == ["weight", "bias"]


def test_a_pattern_alone_is_a_tuple_of_one():
    for pattern in ("4.weight", ("4.weight",), ["4.weight"]):
        chosen = [full for _, _, full in chosen_parameters(network(), None, (), pattern)]
        assert chosen == ["0.weight", "1.weight", "6.weight"]
        assert [full for _, _, full in chosen_parameters(network(), None, pattern, ())] == ["4.weight"]


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "middle": nn.Linear(8, 8), "head": nn.Linear(8, 20)})
    model["head"].weight = model["embedding"].weight
    return model


@pytest.mark.parametrize("pattern", ["head.weight", "embedding.*"])
def test_a_shared_parameter_goes_by_all_its_names(pattern):
    types = (nn.Linear, nn.Embedding)
    assert [full for _, _, full in chosen_parameters(tied(), types, (), pattern)] == ["middle.weight"]
    assert [full for _, _, full in chosen_parameters(tied(), types, pattern, ())] == ["embedding.weight"]
    # Wherever it is of the right kind, it is one of the parameters to choose.
    assert [full for _, _, full in chosen_parameters(tied(), (nn.Linear,), (), ())] == [
        "embedding.weight",
        "middle.weight",
    ]


def test_a_shared_module_goes_by_all_its_names():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": layer, "last": layer, "other": nn.Linear(3, 3)})
    assert [full for _, _, full in chosen_parameters(model, None, (), "last.*")] == ["other.weight"]


@pytest.mark.parametrize("configured", [lambda: UniformQAT(bits=2), lambda: MoMos(motifs=5)], ids=["qat", "momos"])
@pytest.mark.parametrize("embedding", ["one", "several"])
def test_the_projections_of_attention_are_weights_too(configured, embedding):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    if embedding == "several":
        model.self_attn = nn.MultiheadAttention(8, 2, kdim=4, vdim=12, batch_first=True)
    attached = configured()
    attached.prepare(model)
    attached.after_epoch()
    plain = attached.convert(model)
    matrices = {name: weights.detach() for name, weights in plain.named_parameters() if weights.ndim == 2}
    assert len(matrices) == (4 if embedding == "one" else 6)
    for name, weights in matrices.items():
        blocks = weights.reshape(-1, 4 if isinstance(attached, MoMos) else 1)
        assert len(torch.unique(blocks, dim=0)) <= 5, name
    if embedding == "one":
        inputs = torch.randn(3, 7, 8)
        model(inputs).sum().backward()
        torch.testing.assert_close(plain.eval()(inputs), model.eval()(inputs))


def test_every_trainable_parameter_is_in_one_group(make):
    loop = Loop(make())
    grouped = [id(parameter) for group in loop.optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert {id(parameter) for parameter in loop.model.parameters()} <= set(grouped)


def test_a_tied_weight_stays_tied(make):
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embedding"].weight
    configured = make()
    if isinstance(configured, Layerwise):
        with pytest.raises(SpecError, match="Embedding"):
            configured.prepare(model)
        return
    configured.prepare(model)
    assert torch.equal(model["head"].weight, model["embedding"].weight)
    plain = configured.convert(model)
    assert plain["head"].weight is plain["embedding"].weight
    assert len(open_weights(plain)) == 1
    if not isinstance(configured, Pruning):
        assert torch.equal(plain["head"].weight, model["head"].weight)
        assert plain["head"].weight.unique().numel() < 20 * 8


def test_reports_are_numbers_and_count_the_zeros(make):
    loop = Loop(make())
    loop.steps(4)
    loop.begin_fine_tuning()
    weights = open_weights(loop.mode.convert(loop.model), include=("0.weight", "4.weight", "6.weight"))
    zeros = sum(int((handle.values() == 0).sum()) for handle in weights.values())
    report = loop.mode.report()
    assert report["zeros"] == pytest.approx(zeros / weights.elements)
    assert all(isinstance(value, float) for value in report.values())


def test_specifications_build_the_modes_again(make):
    configured = make()
    assert mode(configured.spec) == configured


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_kept(make, dtype):
    model = nn.Linear(6, 5).to(dtype)
    configured = make()
    configured.prepare(model)
    inputs = torch.ones(2, 6, dtype=dtype)
    (model(inputs).sum() + configured.penalty()).backward()
    configured.begin_fine_tuning(lambda: float(model(inputs).detach().square().sum()))
    plain = configured.convert(model)
    assert plain.weight.dtype == dtype
    assert bits_of(plain) == bits_of(model)
