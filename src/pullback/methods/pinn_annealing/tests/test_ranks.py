"""Two processes: ranks hold the same weights, and those of one process on the whole batch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pullback.methods.pinn_annealing import GradientAnnealing, weight_matrices
from pullback.methods.pinn_annealing.tests.cases import network
from pullback.testing import run_ranks

STEPS = 6
DATA = torch.randn(STEPS, 16, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def losses_of(net, x):
    out = net(x)
    return {"residual": (4 * out[:, 0] - x[:, 0]).square().mean(), "data": (out[:, 1] - 0.3).square().mean()}


def train(net, inner, part, way, **settings):
    balance = GradientAnnealing("data", params=weight_matrices(inner), update_every=2, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = DATA[step][part]
        if way == "accumulated":
            half = len(x) // 2
            with net.no_sync() if hasattr(net, "no_sync") else contextlib.nullcontext():
                balance.backward({k: v / 2 for k, v in losses_of(net, x[:half]).items()}, last=False)
            balance.backward({k: v / 2 for k, v in losses_of(net, x[half:]).items()})
        elif way == "backward":
            balance.backward(losses_of(net, x))
        else:
            balance(losses_of(net, x)).backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in inner.parameters()])
    return {
        "params": weights,
        "lam": balance.lam.clone(),
        "peak": balance.peak.clone(),
        "spread": balance.spread.clone(),
    }


def one_bad_rank(rank, inner):
    """A loss that is NaN, and one that is a constant, on one rank alone."""
    balance = GradientAnnealing("data", params=weight_matrices(inner), update_every=1)
    losses = losses_of(inner, DATA[0])
    balance({**losses, "data": losses["data"] * (float("nan") if rank else 1.0)})
    constant = torch.zeros((), dtype=torch.float64)
    balance({**losses, "data": constant if rank else losses["data"]})
    return {"lam": balance.lam.clone(), "skipped": balance.skipped.clone()}


def local(rank, inner):
    """Statistics of this rank alone."""
    balance = GradientAnnealing("data", params=weight_matrices(inner), process_group=False)
    balance(losses_of(inner, DATA[rank]))
    return {"lam": balance.lam.clone()}


WAYS = ("forward", "backward", "accumulated")


def found_on(rank):
    found = {}
    for way in WAYS:
        inner = network()
        wrapped = DistributedDataParallel(inner)
        found[way] = train(wrapped, inner, slice(8 * rank, 8 * rank + 8), way)
    found["bad"], found["local"] = one_bad_rank(rank, network()), local(rank, network())
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(found_on)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_agree_with_each_other_and_with_one_process(ranks, way):
    first, second = (rank[way] for rank in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    inner = network()
    alone = train(inner, inner, slice(None), "backward")
    assert all(torch.allclose(first[key], alone[key], rtol=1e-9) for key in ("lam", "peak", "spread"))
    assert torch.allclose(first["params"], alone["params"], atol=1e-12)
    assert alone["lam"][1] != 1.0


def test_trouble_on_one_rank_keeps_the_weights_of_all(ranks):
    for rank in ranks:
        assert rank["bad"]["lam"].tolist() == [1.0, 1.0]
        assert rank["bad"]["skipped"].item() == 2


def test_ranks_may_keep_to_themselves(ranks):
    first, second = (rank["local"]["lam"] for rank in ranks)
    assert first[1] != second[1]
