"""Two processes: gradients meet before similarity is measured, so ranks agree with each other and with one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pullback.methods.sam_gs import SAMGS, multitask_backward
from pullback.testing import run_ranks

STEPS = 12


class Tasks(nn.Module):
    """A trunk and two heads; the second task weighs the ranks differently."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(7, 1), nn.Linear(7, 1)])
        self.double()

    def forward(self, x, weight):
        z = self.trunk(x)
        return (self.heads[0](z) - 1).square().mean(), 3 * (weight * self.heads[1](z).square()).mean()


def data():
    x = torch.randn(STEPS, 8, 5, generator=torch.Generator().manual_seed(1)).double()
    weight = torch.tensor([1.0, 2.0] * 4, dtype=torch.float64).unsqueeze(1)
    return x, weight


def train(model, inner, part, micro, process_group="auto"):
    x, weight = data()
    aggregator = SAMGS(gamma=0.75)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    branches = []
    for step in range(STEPS):
        optimizer.zero_grad()
        pieces = list(zip(x[step][part].chunk(micro), weight[part].chunk(micro), strict=True))
        for i, (inputs, some) in enumerate(pieces):
            losses = [loss / micro for loss in model(inputs, some)]
            report = multitask_backward(
                losses,
                shared=inner.trunk,
                aggregator=aggregator,
                aggregate=i == micro - 1,
                process_group=process_group,
            )
        branches.append(report.branch)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in inner.parameters()]), aggregator, branches


def found_on(rank):
    found = {}
    for micro in (1, 2):
        inner = Tasks()
        wrapped = nn.parallel.DistributedDataParallel(inner)
        with wrapped.no_sync():
            params, aggregator, branches = train(wrapped, inner, slice(rank, None, 2), micro)
        found[micro] = [params, aggregator.state_dict(), branches]
    inner = Tasks()
    found["unreduced"] = train(inner, inner, slice(rank, None, 2), 1, None)[0]
    return found


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    ranks = run_ranks(found_on)
    alone = Tasks()
    wanted, aggregator, branches = train(alone, alone, slice(None), 1)
    assert set(branches) == {"equalise", "momentum"}
    for micro in (1, 2):
        first, second = (found[micro] for found in ranks)
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(value, second[1][key]) for key, value in first[1].items())
        assert first[2] == second[2] == branches
        torch.testing.assert_close(first[0], wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(first[1]["dissimilarity"], aggregator.state_dict()["dissimilarity"])
    local = [found["unreduced"] for found in ranks]
    assert not torch.equal(local[0], local[1])  # process_group=None reduces nothing
