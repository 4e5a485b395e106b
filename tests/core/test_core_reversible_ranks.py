"""Two processes: each parameter is ready once, also when several steps share it, and ranks agree with one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pullback.core.reversible import CouplingStep, ReversibleSequence
from pullback.testing import run_ranks


class Net(nn.Module):
    """Columns that share a function, begin with an empty slot, and are supervised in mid-sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4))
        fns = [nn.Linear(3, 4), shared, nn.Linear(4, 4), shared, nn.Linear(4, 4)]
        learned = lambda: nn.Parameter(torch.full((4,), 0.8))  # noqa: E731
        steps = [
            CouplingStep(n % 2, [1 - n % 2] if n else [], fn, learned(), context=[] if n else [0])
            for n, fn in enumerate(fns)
        ]  # fmt: skip
        steps[2].tap = True
        self.seq = ReversibleSequence(steps, anchor_every=3)
        self.double()

    def forward(self, x):
        return torch.cat(self.seq((None, None), (x,)), 1)


def batch(step):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def gradients(model, inner, part):
    """Weights after three steps, the second of which accumulates two backward passes; batch statistics frozen."""
    inner.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)[part]).square().mean().backward()
        if step == 1:
            model(batch(7)[part]).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in inner.parameters()])


def found_on(rank):
    inner = Net()
    wrapped = nn.parallel.DistributedDataParallel(inner)
    return gradients(wrapped, inner, slice(rank, None, 2))


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    first, second = run_ranks(found_on)
    assert torch.equal(first, second)
    alone = Net()
    wanted = gradients(alone, alone, slice(None))
    torch.testing.assert_close(first, wanted, rtol=0, atol=1e-12)
    plainly = Net()
    plainly.seq.reversible = False
    torch.testing.assert_close(wanted, gradients(plainly, plainly, slice(None)), rtol=0, atol=1e-12)
    assert not torch.equal(wanted, torch.cat([p.detach().reshape(-1) for p in Net().parameters()]))
