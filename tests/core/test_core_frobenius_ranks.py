"""The projector over shards and replicas: two gloo processes against each other and against one process."""

import pytest
import torch
from torch import nn

from pullback.core.frobenius import FrobeniusProjector
from pullback.testing import run_ranks

STEPS = 4


def network():
    # 5 and 1 rows do not divide by 2: the second rank has a smaller shard of the one and none of the other.
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)).double()


def train(net, rank=0, world=1, **settings):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(STEPS, 8, 4, generator=g).double(), torch.randn(STEPS, 8, 3, generator=g).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    projector = FrobeniusProjector({n: p for n, p in net.named_parameters() if p.dim() > 1}, **settings)
    projector.attach(optimizer)
    size = 8 // world
    for step in range(STEPS):
        rows = slice(rank * size, (rank + 1) * size)
        optimizer.zero_grad()
        (net(x[step, rows]) - y[step, rows]).square().mean().backward()
        optimizer.step()
    whole = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]
    growth = [float(value) for value in projector.growth().values()]
    norms = torch.stack(list(projector.norms().values()))
    return torch.cat([each.reshape(-1) for each in whole]), norms, growth


def found_on(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    net = network()
    for layer in (net[0], net[2], net[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    found = {"shards": train(net, rank, 2)}
    inner = network()
    wrapped = nn.parallel.DistributedDataParallel(inner)
    found["replicas"] = train(wrapped, rank, 2, every=2)
    refused = []
    partial = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    sharded = next(iter(net.parameters()))
    for params, settings in ((partial, {}), (sharded, {"per": "row"})):
        try:
            FrobeniusProjector({"w": params}, **settings)
        except (ValueError, RuntimeError) as error:
            refused.append(str(error))
    return found, refused


@pytest.mark.timeout(240)
def test_shards_and_replicas_are_projected_as_one_process_projects():
    (first, refused), (second, _) = run_ranks(found_on)
    for name, settings in (("shards", {}), ("replicas", {"every": 2})):
        weights, norms, _ = train(network(), **settings)
        assert torch.equal(first[name][0], second[name][0])
        assert torch.equal(first[name][1], second[name][1])
        torch.testing.assert_close(first[name][0], weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(first[name][1], norms, rtol=1e-14, atol=0)
        assert first[name][2] == pytest.approx([1.0] * 3, rel=1e-12)
    assert "must be cut or copied" in refused[0]
    assert "w must not be sharded for per='row', got a DTensor" in refused[1]
