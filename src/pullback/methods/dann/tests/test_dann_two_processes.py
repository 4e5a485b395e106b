"""Two processes with DistributedDataParallel: ranks agree with each other and with one process on the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback.core import schedules
from pullback.methods.dann import DomainAdversarialLoss, GradientReversal
from pullback.testing import run_ranks

STEPS = 10


class Adapted(nn.Module):
    """All that is trained, so that one forward of the concatenated batch goes through the wrapper."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.label = nn.Linear(7, 3)
        self.adversary = DomainAdversarialLoss(nn.Linear(7, 1), GradientReversal(schedules.dann()))
        self.double()

    def forward(self, xs, ys, xt):
        features = self.trunk(torch.cat([xs, xt]))
        fs, ft = features[: len(xs)], features[len(xs) :]
        return F.cross_entropy(self.label(fs), ys) + self.adversary(fs, ft)


def data():
    g = torch.Generator().manual_seed(1)
    xs, xt = (
        torch.randn(STEPS, 8, 5, generator=g).double(),
        torch.randn(STEPS, 4, 5, generator=g).double() + 1,
    )
    return xs, torch.randint(3, (STEPS, 8), generator=g), xt


def train(model, inner, part):
    xs, ys, xt = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        inner.adversary.grl.progress(step / STEPS)
        optimizer.zero_grad()
        model(xs[step][part], ys[step][part], xt[step][part]).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in inner.parameters()])


def adapted_on(rank):
    inner = Adapted()
    return train(nn.parallel.DistributedDataParallel(inner), inner, slice(rank, None, 2))


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    first, second = run_ranks(adapted_on)
    assert torch.equal(first, second)
    alone = Adapted()
    torch.testing.assert_close(first, train(alone, alone, slice(None)), rtol=0, atol=1e-12)
