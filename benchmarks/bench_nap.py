"""Projection of 200 tensors against one norm and one product over them, and what an attachment adds to a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.harness import Row, seconds
from torch import nn

from pullback.core.attachment import attach
from pullback.core.frobenius import FrobeniusProjector
from pullback.methods.nap import Project, insert_norms

ENTRIES = 4_000_000
TENSORS = 200


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """200 square parameters, ``ENTRIES`` entries in all."""
    return [nn.Parameter(torch.randn(100, ENTRIES // TENSORS // 100).to(dtype)) for _ in range(TENSORS)]


def floor(params: list[nn.Parameter]) -> Callable[[], None]:
    """What has to be done at least: one fused norm, one fused multiplication."""
    factors = [torch.ones(()) for _ in params]

    @torch.no_grad()
    def call() -> None:
        torch._foreach_norm(params, 2.0, dtype=torch.float32)
        torch._foreach_mul_(params, factors)

    return call


def per_tensor(params: list[nn.Parameter]) -> Callable[[], None]:
    """The usual loop, with one read of the host per tensor."""
    norms = [p.detach().norm().item() for p in params]

    @torch.no_grad()
    def call() -> None:
        for p, rho in zip(params, norms, strict=True):
            p.mul_(rho / p.norm().item())

    return call


def weight_norms(params: list[nn.Parameter]) -> Callable[[], None]:
    """torch's own parametrization, which computes the scaled weight in every forward pass."""
    layers = []
    for p in params:
        layer = nn.Linear(p.shape[1], p.shape[0], bias=False)
        layer.weight = nn.Parameter(p.detach().clone())
        layers.append(nn.utils.parametrizations.weight_norm(layer, dim=None))

    @torch.no_grad()
    def call() -> None:
        for layer in layers:
            _ = layer.weight

    return call


def step(every: int | None, *, attached: bool) -> Callable[[], None]:
    """A training step of a normalised perceptron."""
    torch.manual_seed(0)
    net = insert_norms(
        nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    if attached:
        attach(optimizer, Project(net, every=every))
    else:
        attach(optimizer)  # the guard against NaN is not ours
    x, y = torch.randn(512, 256), torch.randint(10, (512,))

    def call() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return call


def least(what: Callable[[], object], against: Callable[[], object], *, repeats: int = 41) -> float:
    """Ratio of the least processor times (fifth percentiles): whatever else runs only adds to them."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    low = {name: statistics.quantiles(values, n=20)[0] for name, values in taken.items()}
    return low["what"] / low["against"]


def step_ratio(every: int | None) -> float:
    """A step with a projection attached over one without."""
    return least(step(every, attached=True), step(every, attached=False), repeats=60)


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    params = parameters()
    project = FrobeniusProjector(params).project_
    base = floor(params)
    rows = FrobeniusProjector(params, per="row").project_
    half = FrobeniusProjector(parameters(torch.bfloat16)).project_
    what, floor_ = "projection of 200 tensors of 20,000", "one norm and one product"
    return [
        Row(what, floor_, least(project, base, repeats=101), 1.3),
        Row(what, "a loop that reads every norm", least(project, per_tensor(params))),
        Row(what, "torch weight_norm, one forward", least(project, weight_norms(params), repeats=21)),
        Row("projection of their 20,000 rows", floor_, least(rows, base, repeats=21)),
        Row("projection in bfloat16", "the same in float32", least(half, project, repeats=21)),
        Row("a step with Project(every=None)", "a step without", step_ratio(None), 1.02),
        Row("a step with Project(every=1)", "a step without", step_ratio(1)),
    ]
