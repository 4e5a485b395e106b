"""Two gloo processes: gradients are averaged, ranks stay equal, and NaN on one is refused by both."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pullback.methods.eqprop import EquilibriumProp, HopfieldMLP
from pullback.testing import run_ranks

STEPS = 6


def network():
    torch.manual_seed(0)
    return HopfieldMLP([6, 8, 3]).double()


def train(model, inner, part):
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(STEPS, 8, 6, generator=g).double(), torch.randint(3, (STEPS, 8), generator=g)
    ep = EquilibriumProp(model, estimator="random_sign", beta=0.2)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        ep.backward(x[step, part], y[step, part])
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in inner.parameters()])


def replica(rank):
    inner = network()
    found = train(DistributedDataParallel(inner), inner, slice(rank, None, 2))
    ep = EquilibriumProp(DistributedDataParallel(inner))
    x = torch.full((2, 6), float("nan") if rank else 0.5, dtype=torch.float64)
    said = ""
    try:
        ep.backward(x, torch.zeros(2, dtype=torch.int64))
    except ValueError as error:
        said = str(error)
    try:
        EquilibriumProp(inner)
    except ValueError as error:
        said += str(error)
    return found, said


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    (first, said), (second, other) = run_ranks(replica)
    assert torch.equal(first, second)
    alone = network()
    torch.testing.assert_close(first, train(alone, alone, slice(None)), rtol=0, atol=1e-12)
    assert "holds NaN" in said
    assert "holds NaN" in other
    assert "process_group must be given when 2 processes run" in said
