"""Two gloo processes: with the covariance averaged they equal one process, replicated or sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pullback.methods.tract import tract
from pullback.testing import run_ranks


def network():
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)).double()


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).flatten().clone()


def train(how, sync, shares=(4, 4), accumulate=1):
    rank, world = dist.get_rank(), dist.get_world_size()
    net = network()
    tract(net[0], lam=0.25, sync_covariance=sync and world > 1)
    model = net
    if world > 1 and how == "replicated":
        model = DistributedDataParallel(net)
    elif world > 1:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(net, mesh=mesh)
    generator = torch.Generator().manual_seed(1)
    data = (
        torch.randn(6, sum(shares), 2, 5, 5, generator=generator).double()
        * torch.arange(1, 9)[:, None, None, None]
    )
    wanted = torch.randn(6, sum(shares), 3, generator=generator).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    start = sum(shares[:rank])
    rows = slice(start, start + shares[rank]) if world > 1 else slice(None)
    for step in range(6):
        if step % accumulate == 0:
            optimizer.zero_grad()
        # A share of the mean over the whole batch, times the number of ranks that average: exact for any shares.
        loss = (model(data[step, rows]) - wanted[step, rows]).square().sum() / (3 * sum(shares)) * world
        loss.backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
    return torch.cat([whole(p) for p in net.parameters()])


def refusal():
    # Tensor parallelism keeps the weight sharded in the forward pass.
    layer = nn.Linear(4, 4)
    tract(layer)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    try:
        layer(torch.randn(2, 4))
    except TypeError as error:
        return str(error)
    return ""


def found_on(_rank):
    found = {
        "replicated": train("replicated", True),
        "sharded": train("sharded", True),
        "unequal shares": train("replicated", True, shares=(7, 1)),
        "an empty share": train("replicated", True, shares=(8, 0)),
        "accumulated": train("replicated", True, accumulate=2),
        "each its own": train("replicated", False),
    }
    return found | ({"refusal": refusal()} if dist.get_world_size() > 1 else {})


@pytest.mark.slow
def test_ranks_equal_one_process():
    (alone,), (first, second) = run_ranks(found_on, ranks=1), run_ranks(found_on)
    for name, weights in alone.items():
        assert torch.equal(first[name], second[name]), name
        gap = (first[name] - weights).abs().max()
        # Covariances of their own are a different method on two ranks than on one.
        assert gap > 1e-6 if name == "each its own" else gap < 1e-12, name
    assert "weight must be held whole in the forward pass, got a DTensor" in first["refusal"]
