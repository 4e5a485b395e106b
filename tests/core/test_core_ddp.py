"""Attachment under DistributedDataParallel: two gloo processes against each other and against one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pullback.core.attachment import attach
from pullback.core.clip import ClipGradNorm
from pullback.core.kinds import Transform
from pullback.core.streams import generator
from pullback.testing import run_ranks


class Noise(Transform):
    def pre_step_(self, batch):
        for index, grad in zip(batch.indices, batch.grads, strict=True):
            grad.add_(torch.randn(grad.shape, generator=generator("test", 0, batch.step, index)), alpha=0.1)


def train(policy):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    data, wanted = torch.randn(20, 8, 4).double(), torch.randn(20, 8, 2).double()
    model = DistributedDataParallel(net) if world > 1 else net
    torch.manual_seed(rank)  # the global generators of the ranks differ: streams must not notice
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    handle = attach(optimizer, ClipGradNorm(0.5), Noise(), nonfinite=policy)
    size = 8 // world
    for step in range(20):
        rows = slice(rank * size, (rank + 1) * size)
        loss = (model(data[step, rows]) - wanted[step, rows]).square().mean()
        if policy == "skip" and step == 7 and rank == world - 1:
            loss = loss * float("nan")  # one rank alone: all must leave the step out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [handle.steps, handle.skipped, torch.cat([p.detach().flatten() for p in net.parameters()])]


def found_on(_rank):
    return [train("raise"), train("skip")]


@pytest.mark.slow
def test_ranks_are_equal_and_equal_one_process():
    (alone,) = run_ranks(found_on, ranks=1)
    for first, second, single, counts in zip(*run_ranks(found_on), alone, ([20, 0], [19, 1]), strict=True):
        assert torch.equal(first[2], second[2])
        assert (first[2] - single[2]).abs().max() <= 1e-12
        assert first[:2] == second[:2] == single[:2] == counts
