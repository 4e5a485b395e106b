"""Projection of 200 tensors against one norm and one product over them, and what an attachment adds to a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio, seconds
from torch import nn

from pullback.core.attachment import attach
from pullback.core.frobenius import FrobeniusProjector
from pullback.methods.nap import Project, insert_norms

ENTRIES = 2_000_000
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


def step_ratio(every: int | None) -> float:
    """Least time of an attached step over that of a plain one: noise only adds."""
    calls = {"with": step(every, attached=True), "without": step(every, attached=False)}
    taken = seconds(calls, repeats=60)
    fifth = {name: statistics.quantiles(values, n=20)[0] for name, values in taken.items()}
    return fifth["with"] / fifth["without"]


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    params = parameters()
    projector = FrobeniusProjector(params)
    base = floor(params)
    rows = FrobeniusProjector(params, per="row")
    half = parameters(torch.bfloat16)
    what = "projection of 200 tensors of 10,000"
    return [
        Row(what, "one norm and one product", ratio(projector.project_, base, repeats=41), 1.3),
        Row(what, "a loop that reads every norm", ratio(projector.project_, per_tensor(params), repeats=41)),
        Row(
            what,
            "torch weight_norm, one forward",
            ratio(projector.project_, weight_norms(params), repeats=21),
        ),
        Row(
            "projection of their 20,000 rows",
            "one norm and one product",
            ratio(rows.project_, base, repeats=21),
        ),
        Row(
            "projection of 200 tensors in bfloat16",
            "the same in float32",
            ratio(FrobeniusProjector(half).project_, projector.project_, repeats=21),
        ),
        Row("a step with Project(every=None)", "a step without", step_ratio(None), 1.02),
        Row("a step with Project(every=1)", "a step without", step_ratio(1)),
    ]
