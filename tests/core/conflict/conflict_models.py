"""What the tests of the conflict monitor share: a two-head model, plain losses, and a literal reference."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

TASKS = ("depth", "seg")


class CountBackward(torch.autograd.Function):
    """Identity that counts its backward calls, and draws a number in each as a careless layer might."""

    calls = 0
    error = None

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if CountBackward.error is not None:
            raise CountBackward.error
        CountBackward.calls += 1
        torch.rand(1)
        return grad


class TwoHeads(nn.Module):
    """Trunk with batch norm and dropout, and a head per task."""

    def __init__(self, dtype=torch.float32, tasks=TASKS):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 5)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in tasks})
        self.counted = True
        self.to(dtype)

    def forward(self, x):
        z = self.trunk(x)
        z = CountBackward.apply(z) if self.counted else z
        return {task: head(z) for task, head in self.heads.items()}


def build(dtype=torch.float32, tasks=TASKS, seed=0):
    torch.manual_seed(seed)
    return TwoHeads(dtype, tasks)


def losses_of(model, seed=0):
    """Losses in conflict: heads pull to different signs of what they see."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out = model(x)
    return {
        task: (rows - (-1.0) ** n).square().mean() * (n + 1) for n, (task, rows) in enumerate(out.items())
    }


def reference(model, seed, weights, groups):
    """Inner products by one ordinary backward pass per task on a copy, and loops over entries."""
    gradients = {}
    for task, weight in weights.items():
        twin = copy.deepcopy(model)
        torch.manual_seed(seed)
        (weight * losses_of(twin, seed)[task]).backward()
        gradients[task] = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).double().flatten().tolist()
            for name, p in twin.named_parameters()
        }
    found = {}
    for group in groups:
        rows = {
            task: [x for name, g in grads.items() if name.startswith(group + ".") for x in g]
            for task, grads in gradients.items()
        }
        found[group] = {
            (a, b): math.fsum(x * y for x, y in zip(rows[a], rows[b], strict=True))
            for a in rows
            for b in rows
        }
    return found


def gram_of(dots, tasks):
    return torch.tensor([[dots[a, b] for b in tasks] for a in tasks], dtype=torch.float64)
