"""Attachment under DistributedDataParallel: two gloo processes against each other and against one process."""

import subprocess
import sys

import pytest
import torch

WORKER = """
import datetime, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from pullback.core.attachment import attach
from pullback.core.clip import ClipGradNorm
from pullback.core.kinds import Transform
from pullback.core.streams import generator

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)


class Noise(Transform):
    def pre_step_(self, batch):
        for index, grad in zip(batch.indices, batch.grads, strict=True):
            grad.add_(torch.randn(grad.shape, generator=generator("test", 0, batch.step, index)), alpha=0.1)


if world > 1:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120)
    )


def train(policy):
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


torch.save([train("raise"), train("skip")], sys.argv[4])
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
os._exit(0)  # everything is saved; under load gloo's own threads may still abort an ordinary exit
"""


def run(tmp_path, world):
    files = [tmp_path / f"{world}-{rank}.pt" for rank in range(world)]
    arguments = [str(world), str(tmp_path / f"store{world}")]
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKER, str(rank), *arguments, str(file)])
        for rank, file in enumerate(files)
    ]
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.slow
def test_ranks_are_equal_and_equal_one_process(tmp_path):
    (alone,) = run(tmp_path, 1)
    for first, second, single, counts in zip(*run(tmp_path, 2), alone, ([20, 0], [19, 1]), strict=True):
        assert torch.equal(first[2], second[2])
        assert (first[2] - single[2]).abs().max() <= 1e-12
        assert first[:2] == second[:2] == single[:2] == counts
