"""Two processes that share one training run equal one process on the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pullback.methods.rev_mbconv_unet import ReversibleUNet, soft_dice
from pullback.testing import run_ranks

STEPS = 5


def train(rank=None):
    """Weights after some steps; a rank takes every second example."""
    torch.manual_seed(0)
    net = ReversibleUNet(1, 2, spatial_dims=2, widths=(4, 8), blocks=(2, 1)).double()
    model = net if rank is None else nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    g = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 1, 8, 8, generator=g, dtype=torch.float64)
        y = torch.cat([x > 0, x > 0.7], 1)
        part = slice(rank, None, 1 if rank is None else 2)
        optimizer.zero_grad()
        soft_dice(model(x[part]), y[part]).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.timeout(280)
def test_two_ranks_equal_one_process():
    first, second = run_ranks(train)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, train(), rtol=0, atol=1e-11)
