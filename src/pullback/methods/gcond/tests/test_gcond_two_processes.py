"""Two processes: accumulators are averaged before conflicts are resolved, as one process on all data would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pullback.methods.gcond import GradientConductor, TaskAccumulator
from pullback.testing import run_ranks

STEPS, K = 8, 4
WEIGHTS = {"fit": 0.6, "size": 0.4}
OPTIONS: Any = {"accumulate": K, "dominance_window": 2, "nonfinite": "skip"}
LOSSES = {"fit": lambda out: (out - 1).square().mean(), "size": lambda out: (out + 1).abs().mean()}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def data():
    return torch.randn(STEPS, K, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(model, net, part, mode, *, spoil):
    """``spoil``: one rank's share of step 5 holds NaN, so that all ranks must leave that step out."""
    conductor = GradientConductor(model, WEIGHTS, mode=mode, **OPTIONS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, betas=(0.0, 0.95))
    winners = []
    for step, micro_batches in enumerate(data()):
        for k, x in enumerate(micro_batches):
            bad = float("nan") if spoil and step == 5 and k == 1 else 1.0
            if mode == "sequential":
                with conductor.no_sync():
                    out = bad * model(x[part])
                conductor.backward({name: loss(out) for name, loss in LOSSES.items()})
            else:
                task = conductor.tasks[k // 2]
                with conductor.accumulate(task):
                    (bad * LOSSES[task](model(x[part]))).backward()
        info = conductor.step()
        winners.append(-1 if info.winner is None else conductor.tasks.index(info.winner))
        optimizer.step()
        optimizer.zero_grad()
    state = conductor.state_dict()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {
        "flat": flat,
        "winners": winners,
        "skipped": state["skipped"],
        "momentum": state["writer"]["momentum"][0],
    }


def counted(reductions, bucket):
    """DistributedDataParallel's own reduction of gradients, counted."""
    reductions.append(bucket.index())
    work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def found_on(rank):
    found, reductions = {}, []
    for mode in ("stochastic", "sequential"):
        net = network()
        model = nn.parallel.DistributedDataParallel(net)
        model.register_comm_hook(reductions, counted)
        found[mode] = train(model, net, slice(rank, None, 2), mode, spoil=rank == 1)
    found["reductions"] = len(reductions)
    net = network()
    try:
        TaskAccumulator(net, ("a",))
        found["refusal"] = ""
    except ValueError as error:
        found["refusal"] = str(error)
    alone = TaskAccumulator(net, ("a",), process_group=None)
    shared = TaskAccumulator(net, ("a",), process_group=dist.group.WORLD)
    x = torch.full((1, 4), float(rank + 1), dtype=torch.float64)
    for name, tasks in (("alone", alone), ("shared", shared)):
        with tasks.accumulate("a"):
            F.linear(x, net[0].weight).sum().backward()
        found[name] = tasks.jacobian()[0, :2].tolist()
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(found_on)


@pytest.mark.parametrize("mode", ["stochastic", "sequential"])
def test_two_ranks_are_equal_and_equal_one_process(ranks, mode):
    first, second = (rank[mode] for rank in ranks)
    assert torch.equal(first["flat"], second["flat"])
    assert torch.equal(first["momentum"], second["momentum"])
    assert first["winners"] == second["winners"]
    assert first["skipped"] == second["skipped"] == 1
    assert [rank["reductions"] for rank in ranks] == [0, 0]  # DDP's own: the conductor reduces once per step
    net = network()
    alone = train(net, net, slice(None), mode, spoil=True)
    assert alone["winners"] == first["winners"]
    assert len(set(first["winners"])) > 1
    torch.testing.assert_close(first["flat"], alone["flat"], rtol=0, atol=1e-12)


def test_ranks_that_share_nothing_must_say_so(ranks):
    for r, rank in enumerate(ranks):
        assert rank["refusal"].startswith("process_group must be given when 2 processes run")
        assert rank["alone"] == [r + 1.0, r + 1.0]
        assert rank["shared"] == [1.5, 1.5]
