"""Attachment under FSDP2 (`fully_shard`): two gloo processes against each other and against one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from pullback.core.attachment import attach
from pullback.core.checks import NonFiniteError
from pullback.core.clip import ClipGradNorm
from pullback.core.finite import all_finite
from pullback.core.kinds import Transform
from pullback.testing import run_ranks


class Decay(Transform):
    when = "both"

    def pre_step_(self, batch):
        for gradient in batch.grads:
            gradient.mul_(1 / (1 + batch.step))

    def post_step_(self, batch):
        for parameter in batch.params:
            parameter.mul_(0.999)


def build(head_sharded):
    # 5 and 1 rows do not divide by 2: the second rank has a smaller shard of the one, and none of the other.
    world = dist.get_world_size()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)).double()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in (net[0], net[2], net[4]) if head_sharded else (net[0], net[2]):
            fully_shard(layer, mesh=mesh)
        if head_sharded:
            fully_shard(net, mesh=mesh)
    return net


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).flatten().clone()


def train(*transforms, policy="raise", trouble="", head_sharded=True):
    rank, world = dist.get_rank(), dist.get_world_size()
    net = build(head_sharded)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(8, 8, 4, generator=generator).double()
    wanted = torch.randn(8, 8, 3, generator=generator).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    handle = attach(optimizer, *transforms, nonfinite=policy, names=net)
    size = 8 // world
    error = ""
    for step in range(8):
        rows = slice(rank * size, (rank + 1) * size)
        loss = (net(data[step, rows]) - wanted[step, rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in () if head_sharded or world == 1 else net[4].parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        if step == 3 and trouble:
            gradient = net[0].weight.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            value = {"nan": float("nan"), "large": 1e200}[trouble]
            if rank == world - 1:  # the last row lies on the last rank alone
                local[-1, 0] = value
        try:
            optimizer.step()
        except NonFiniteError as found:
            error = str(found)
    return [handle.steps, handle.skipped, torch.cat([whole(p) for p in net.parameters()]), error]


def found_on(_rank):
    return {
        "clip": train(ClipGradNorm(0.05), Decay()),
        "clip by the largest entry": train(ClipGradNorm(0.02, norm_type=math.inf), Decay()),
        "partly sharded": train(ClipGradNorm(0.05), Decay(), head_sharded=False),
        "partly sharded, largest entry": train(ClipGradNorm(0.02, norm_type=math.inf), head_sharded=False),
        "skip": train(Decay(), policy="skip", trouble="nan"),
        "raise": train(Decay(), policy="raise", trouble="nan"),
        "large and finite": train(Decay(), ClipGradNorm(0.05, norm_type=math.inf), trouble="large"),
    }


@pytest.mark.slow
def test_shards_are_trained_as_one_process_trains_the_whole():
    (alone,), (first, second) = run_ranks(found_on, ranks=1), run_ranks(found_on)
    counts = {"skip": [7, 1], "raise": [7, 0]}
    for name, (*found, weights, error) in alone.items():
        assert found == first[name][:2] == second[name][:2] == counts.get(name, [8, 0]), name
        assert torch.equal(first[name][2], second[name][2]), name
        assert (first[name][2] - weights).abs().max() <= 1e-12, name
        # Also the rank whose own entries are sound names the parameter, with the count over all shards.
        assert first[name][3] == second[name][3] == error, name
    assert "step 3: the gradient of '0.weight' holds NaN in 1 of 20 entries" in alone["raise"][3]


@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_clip_counts_repeated_rows_of_sparse_gradients_once(order):
    sparse, dense = (torch.nn.Embedding(6, 3, sparse=kind) for kind in (True, False))
    dense.load_state_dict(sparse.state_dict())
    for table in (sparse, dense):
        table(torch.tensor([1, 1, 4])).square().sum().backward()
        ClipGradNorm(0.1, norm_type=order).update_(table)
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_only_nan_and_inf_are_no_numbers(dtype):
    large = torch.full((10_000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([large, large])
    for bad in (float("nan"), float("inf"), -float("inf")):
        other = large.clone()
        other[-1] = bad
        assert not all_finite([large, other])
