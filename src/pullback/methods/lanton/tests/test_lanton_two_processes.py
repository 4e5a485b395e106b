"""Two gloo processes: replicas stay equal, and sharded parameters end where one process does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pullback.methods.lanton import LANTON, LayerNoise, lmo_groups
from pullback.testing import run_ranks


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).flatten().clone()


def train(sharded, **settings):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    # 5 and 1 rows do not divide by 2: the second rank has a smaller shard of the one, and none of the other.
    linear = nn.Linear
    net = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 1), nn.Tanh(), linear(1, 6), linear(6, 3)).double()
    data, wanted = torch.randn(8, 8, 4).double(), torch.randn(8, 8, 3).double()
    model = net
    if world > 1 and sharded:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import init_device_mesh

        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    elif world > 1:
        model = DistributedDataParallel(net)
    torch.manual_seed(rank)
    optimizer = LANTON(lmo_groups(net), lr=0.05, alpha=0.01, ns_dtype="float64", weight_decay=0.1, **settings)
    noise = LayerNoise(net)
    noise.attach(optimizer)
    size = 8 // world
    for step in range(8):
        rows = slice(rank * size, (rank + 1) * size)
        loss = (model(data[step, rows]) - wanted[step, rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = torch.cat([whole(p) for p in net.parameters()])
    found = optimizer.noise(), noise.noise(), optimizer.layer_rates()
    return [values, *(list(each.values()) for each in found)]


def found_on(_rank):
    return {
        "ddp": train(False),
        "fsdp": train(True),
        "nesterov": train(True, nesterov=True, noise_every=2),
    }


@pytest.mark.slow
def test_two_processes_end_where_one_does():
    (alone,) = run_ranks(found_on, ranks=1)
    first, second = run_ranks(found_on)
    for name, wanted in alone.items():
        assert torch.equal(first[name][0], second[name][0])
        assert first[name][1:] == second[name][1:]
        assert (first[name][0] - wanted[0]).abs().max() <= 1e-9
        for got, numbers in zip(first[name][1:], wanted[1:], strict=True):
            assert got == pytest.approx(numbers, rel=1e-5)
    assert min(alone["fsdp"][3]) < 0.045  # rates that differ, so that a wrong norm would show
