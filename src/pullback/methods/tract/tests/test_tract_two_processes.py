"""Two gloo processes: with the covariance averaged they equal one process, replicated or sharded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

WORKER = """
import datetime, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh, Shard
from torch.nn.parallel import DistributedDataParallel
from pullback.methods.tract import tract

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )


def network():
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)).double()


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).flatten().clone()


def train(how, sync, shares=(4, 4), accumulate=1):
    net = network()
    handle = tract(net[0], lam=0.25, sync_covariance=sync and world > 1)
    model = net
    if world > 1 and how == "replicated":
        model = DistributedDataParallel(net)
    elif world > 1:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(net, mesh=mesh)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(6, sum(shares), 2, 5, 5, generator=generator).double() * torch.arange(1, 9)[:, None, None, None]
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
    mesh = init_device_mesh("cpu", (world,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    try:
        layer(torch.randn(2, 4))
    except TypeError as error:
        return str(error)
    return ""


found = {
    "replicated": train("replicated", True),
    "sharded": train("sharded", True),
    "unequal shares": train("replicated", True, shares=(7, 1)),
    "an empty share": train("replicated", True, shares=(8, 0)),
    "accumulated": train("replicated", True, accumulate=2),
    "each its own": train("replicated", False),
}
if world > 1:
    found["refusal"] = refusal()
torch.save(found, sys.argv[4])
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
os._exit(0)  # everything is saved; under load gloo's own threads may still abort an ordinary exit
"""


def run(folder, world):
    files = [folder / f"{world}-{rank}.pt" for rank in range(world)]
    arguments = [str(world), str(folder / f"store{world}")]
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKER, str(rank), *arguments, str(file)])
        for rank, file in enumerate(files)
    ]
    try:
        codes = [process.wait(timeout=250) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.slow
def test_ranks_equal_one_process(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    (alone,), (first, second) = run(tmp_path, 1), run(tmp_path, 2)
    for name, weights in alone.items():
        assert torch.equal(first[name], second[name]), name
        gap = (first[name] - weights).abs().max()
        # Covariances of their own are a different method on two ranks than on one.
        assert gap > 1e-6 if name == "each its own" else gap < 1e-12, name
    assert "weight must be held whole in the forward pass, got a DTensor" in first["refusal"]
