"""Two processes: the probe measures on one rank, without the other, and training goes on as if it had not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.methods.elu import BiasShiftProbe, init_gain_
from pullback.testing import run_ranks


def model():
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ELU(), nn.Linear(16, 3)).double()
    init_gain_(net, nn.ELU())
    return net


def batch(rank):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def train(rank, probing):
    wrapped = nn.parallel.DistributedDataParallel(model())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    x, y = batch(rank)
    told = []
    for _ in range(3):
        if probing:
            probe = BiasShiftProbe(wrapped)
            told.append(probe.measure(x, y).to_dict())
            told.append(sorted(probe.unit_natural_gradient(x, y)))
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in wrapped.parameters()]), told


def found_on(rank):
    probed, told = train(rank, rank == 0)  # the other rank does not take part in the measurement
    return [probed, told, train(rank, False)[0]]


@pytest.mark.timeout(240)
def test_one_rank_measures_and_training_is_unchanged():
    (first, told, plain), (second, nothing, _) = run_ranks(found_on)
    assert torch.equal(first, second)
    assert torch.equal(first, plain)
    assert nothing == []
    assert told[0] == BiasShiftProbe(model()).measure(*batch(0)).to_dict()
    assert told[1] == ["0.bias", "0.weight", "3.bias", "3.weight"]
