"""Two gloo processes: DDP replicas, hooks before the average, and FSDP2 shards equal one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods.curl_descent import RuleFlip
from pullback.testing import run_ranks

STEPS = 3
WAYS = ("attach", "hook", "rows", "random", "shards", "row shards", "random shards")
SETTINGS: dict[str, Any] = {
    "rows": {"side": "post"},
    "random": {"which": "random"},
    "row shards": {"side": "post"},
    "random shards": {"which": "random"},
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def train(net, inner, way, part):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(STEPS, 8, 5, generator=g).double(), torch.randn(STEPS, 8, 3, generator=g).double()
    rule = RuleFlip([inner[0], inner[2]], fraction=0.4, **SETTINGS.get(way, {}))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rule.hook() if way == "hook" else rule.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        (net(x[step][part]) - y[step][part]).square().mean().backward()
        optimizer.step()
    gathered = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in inner.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in gathered])


def _sharded_hook_is_refused(inner):
    try:
        RuleFlip(inner[0], fraction=0.4).hook()
    except TypeError as error:
        return "must be held whole by this process" in str(error)
    return False


def found_on(rank):
    found = {}
    for way in WAYS:
        inner = model()
        if "shards" in way:
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import init_device_mesh

            fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
            found["refused"] = torch.tensor(_sharded_hook_is_refused(inner))
            found[way] = train(inner, inner, way, slice(rank, None, 2))
        else:
            found[way] = train(nn.parallel.DistributedDataParallel(inner), inner, way, slice(rank, None, 2))
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(found_on)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one_process(ranks, way):
    assert torch.equal(ranks[0][way], ranks[1][way])
    alone = model()
    torch.testing.assert_close(ranks[0][way], train(alone, alone, way, slice(None)), rtol=0, atol=1e-12)


def test_flips_matter_and_sharded_hooks_are_refused(ranks):
    assert not torch.allclose(ranks[0]["attach"], ranks[0]["rows"])
    assert all(bool(rank["refused"]) for rank in ranks)
