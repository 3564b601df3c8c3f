"""Modes in the loops that people have: several ranks, mixed precision, accumulated gradients, compilation."""

import os
import sys
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kcomplex.training.protocol.sequence import mode
from tests.children import until

SPECS = [
    "uniform_qat:bits=3",
    "codeq:bits=3,target_zeros=0.5",
    "codeq:learnable_bits=true,per_channel=true",
    "momos:capacity=0.25",
    "low_rank:every=2",
    "momos:capacity=0.25,every=2 steps,quantiser=uniform_qat,bits=4",
    "momos:capacity=0.25,quantiser=codeq,bits=3,selection=spread",
    "gradual_pruning:zeros=0.6,span=4,every=1",
    "lottery_ticket:rounds=1,epochs=1",
    "hashed_sharing:share=0.3",
    "pmmp:alpha=0.001",
    "fpp:alpha=0.001",
    "drr:alpha=0.001,cleaning=graph",
    "relaxed_l1:alpha=0.001|uniform_qat:bits=4",
]
RANK = """
import gc
import sys
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from kcomplex.training.protocol.sequence import mode

rank, path, specs = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)


def same_weights(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 4))
    configured = mode(spec)
    configured.prepare(model)
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(configured.parameter_groups(lr=0.01), lr=0.01)
    torch.manual_seed(100 + rank)
    for epoch in range(2):
        for _ in range(3):
            inputs = torch.randn(8, 20)
            optimizer.zero_grad()
            (cross_entropy(replica(inputs), inputs[:, :4].argmax(1)) + configured.penalty()).backward()
            optimizer.step()
            configured.after_step()
        configured.after_epoch()
    configured.begin_fine_tuning(lambda: 0.0)
    own = torch.cat([value.detach().double().flatten() for value in configured.convert(model).state_dict().values()])
    other = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(other, own)
    assert torch.equal(*other), spec


for spec in specs:
    same_weights(spec)
# A replica holds the group, and a thread of the group that outlives the interpreter aborts the process.
gc.collect()
torch.distributed.destroy_process_group()
"""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 20, generator=generator) for _ in range(count)]
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def test_all_ranks_hold_the_same_weights(tmp_path, children):
    command, environment = [sys.executable, "-c", RANK], {**os.environ, "OMP_NUM_THREADS": "1"}
    told = [tmp_path / f"{rank}.txt" for rank in range(2)]
    with ExitStack() as stack:
        ranks = [
            children.start(
                [*command, str(rank), tmp_path / "meeting", *SPECS[1::2]],
                stderr=stack.enter_context(told[rank].open("w")),
                env=environment,
            )
            for rank in range(2)
        ]
    # A rank that fails leaves the other one waiting.
    until(lambda: any(process.poll() for process in ranks) or all(process.poll() == 0 for process in ranks))
    assert [process.poll() for process in ranks] == [0, 0], [path.read_text() for path in told]


@pytest.mark.parametrize("spec", SPECS)
def test_mixed_precision_accumulation_and_schedulers(spec):
    model, configured = network(), mode(spec)
    configured.prepare(model)
    optimizer = torch.optim.SGD(configured.parameter_groups(lr=0.02), lr=0.02, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40)
    data = batches(80)
    losses = []
    for index, (x, y) in enumerate(data):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x), y) / 2
        (loss + configured.penalty() / 2).backward()
        losses.append(2 * loss.item())
        if index % 2:
            optimizer.step()
            configured.after_step()
            scheduler.step()
            optimizer.zero_grad()
    configured.after_epoch()
    assert sum(losses[-10:]) < sum(losses[:10])
    plain = configured.convert(model)
    assert all(parameter.isfinite().all() for parameter in plain.parameters())


# PyTorch's own, once a process.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("spec", ["codeq:bits=3", "uniform_qat:bits=3", "momos:capacity=0.25,quantiser=codeq,bits=3"])
def test_compiled_networks_compute_what_the_eager_ones_do(spec):
    model, configured = network(), mode(spec)
    configured.prepare(model)
    configured.after_epoch()
    # The backend is of no matter: this traces the network as every backend needs it.
    compiled = torch.compile(model, backend="eager")
    (x, y), *_ = batches(1)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        loss = cross_entropy(run(x), y)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
