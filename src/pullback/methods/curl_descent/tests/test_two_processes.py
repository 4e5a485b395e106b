"""Two gloo processes: DDP replicas, hooks before the average, and FSDP2 shards equal one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pullback.methods.curl_descent import RuleFlip

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


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
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
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2, join=True)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one_process(ranks, way):
    assert torch.equal(ranks[0][way], ranks[1][way])
    alone = model()
    torch.testing.assert_close(ranks[0][way], train(alone, alone, way, slice(None)), rtol=0, atol=1e-12)


def test_flips_matter_and_sharded_hooks_are_refused(ranks):
    assert not torch.allclose(ranks[0]["attach"], ranks[0]["rows"])
    assert all(bool(rank["refused"]) for rank in ranks)
