"""Two gloo processes: replicas stay equal, and sharded parameters end where one process does."""

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
from pullback.methods.lanton import LANTON, LayerNoise, lmo_groups

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).flatten().clone()


def train(sharded, **settings):
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


runs = {"ddp": train(False), "fsdp": train(True), "nesterov": train(True, nesterov=True, noise_every=2)}
torch.save(runs, sys.argv[4])
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
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path):
    (alone,) = run(tmp_path, 1)
    first, second = run(tmp_path, 2)
    for name, wanted in alone.items():
        assert torch.equal(first[name][0], second[name][0])
        assert first[name][1:] == second[name][1:]
        assert (first[name][0] - wanted[0]).abs().max() <= 1e-9
        for got, numbers in zip(first[name][1:], wanted[1:], strict=True):
            assert got == pytest.approx(numbers, rel=1e-5)
    assert min(alone["fsdp"][3]) < 0.045  # rates that differ, so that a wrong norm would show
