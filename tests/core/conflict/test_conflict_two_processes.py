"""The conflict monitor under DistributedDataParallel: two gloo processes against one process with all the data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pullback import ConflictMonitor
from pullback.testing import run_ranks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        z = self.trunk(x).tanh()
        return self.a(z), self.b(z)


def train(reduce, form, watched=True):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = Net().double()
    data = torch.randn(6, 8, 4).double()
    model = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ConflictMonitor(model, ("a", "b"), every=2, reduce=reduce)
    size = 8 // world
    for step in range(6):
        a, b = model(data[step, rank * size : (rank + 1) * size])
        losses = {"a": (a - 1).square().mean(), "b": (b + 1).square().mean()}
        total = losses["a"] + 0.5 * losses["b"]
        optimizer.zero_grad()
        if not watched:
            total.backward()
        elif form == "call":
            monitor(losses, total)
            total.backward()
        else:
            with monitor.around(losses, total):
                total.backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {"state": monitor.state_dict(), "weights": weights}


def found_on(_rank):
    found = {
        f"{reduce}-{form}": train(reduce, form) for reduce in (True, False) for form in ("call", "around")
    }
    found["plain"] = train(True, "call", watched=False)
    return found


@pytest.mark.slow
def test_reduced_reports_are_equal_on_all_ranks_and_equal_one_process():
    (alone,) = run_ranks(found_on, ranks=1)
    first, second = run_ranks(found_on)
    for form in ("call", "around"):
        one, other, single = (each[f"True-{form}"]["state"] for each in (first, second, alone))
        assert one["steps"] == [0, 2, 4]
        assert one["passes"] == other["passes"] == [2, 2, 2]  # nothing is spared under several ranks
        assert torch.equal(one["gram"], other["gram"])
        assert torch.equal(one["weights"], other["weights"])
        assert torch.allclose(one["gram"], single["gram"], rtol=1e-9, atol=1e-14)
    assert alone["True-around"]["state"]["passes"] == [1, 1, 1]
    local, elsewhere = (each["False-call"]["state"]["gram"] for each in (first, second))
    assert not torch.allclose(local, elsewhere, rtol=1e-3)  # each rank its own
    for found in (first, second):  # and training does not notice
        assert all(torch.equal(found[key]["weights"], found["plain"]["weights"]) for key in found)
