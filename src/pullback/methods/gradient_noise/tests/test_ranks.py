"""Two processes: replicas draw the same noise, shards draw their own."""

from __future__ import annotations

import pytest
import torch

from pullback.methods.gradient_noise import GradientNoise
from pullback.testing import run_ranks


def _replicas(rank):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientNoise(0.5, seed=2).attach(optimizer)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _shards():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    grads = {}
    for name, placement in (("sharded", Shard(0)), ("replicated", Replicate())):
        weight = torch.nn.Parameter(distribute_tensor(torch.zeros(2001, 50), mesh, [placement]))
        weight.grad = distribute_tensor(torch.zeros(2001, 50), mesh, [placement])
        optimizer = torch.optim.SGD([weight], lr=0.1)
        GradientNoise(0.25).attach(optimizer)
        optimizer.step()
        grads[name] = weight.grad.to_local().clone()
    return grads


def found_on(rank):
    return {"replicas": _replicas(rank), "shards": _shards()}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(found_on)


def test_replicas_stay_equal(ranks):
    first, second = (rank["replicas"] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shards_draw_their_own_noise_and_copies_the_same(ranks):
    first, second = (rank["shards"] for rank in ranks)
    assert torch.equal(first["replicated"], second["replicated"])
    assert first["sharded"].shape[0] + second["sharded"].shape[0] == 2001
    rows = torch.stack([first["sharded"][:1000].flatten(), second["sharded"][:1000].flatten()])
    assert rows.std(1).tolist() == pytest.approx([0.5, 0.5], rel=0.02)
    assert abs(torch.corrcoef(rows)[0, 1]) < 4 / 50_000**0.5
