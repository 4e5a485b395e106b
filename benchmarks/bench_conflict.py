"""Twenty monitored training steps against twenty plain ones, and the comparison of gradients by itself."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio, seconds
from torch import Tensor, nn

from pullback import ConflictMonitor
from pullback.core.gram import gram

STEPS = 20
TASKS = ("depth", "seg")


class TwoHeads(nn.Module):
    """A shared trunk and one linear head per task."""

    def __init__(self, trunk: nn.Module, features: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.depth, self.seg = nn.Linear(features, 1), nn.Linear(features, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {"depth": self.depth(z).square().mean(), "seg": self.seg(z).logsumexp(1).mean()}


def perceptron() -> tuple[nn.Module, Tensor]:
    widths = [512] * 5
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.GELU())]
    return TwoHeads(nn.Sequential(*layers), 512), torch.randn(512, 512)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return TwoHeads(nn.Sequential(*layers, nn.Flatten()), 64 * 16), torch.randn(32, 3, 32, 32)


def step(build: Callable[[], tuple[nn.Module, Tensor]], form: str, every: int) -> Callable[[], None]:
    """One step of AdamW; ``form`` says how the monitor is used, ``"plain"`` is without one."""
    torch.manual_seed(0)
    model, batch = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = ConflictMonitor(model, TASKS, every=every)

    def call() -> None:
        losses = model(batch)
        total = losses["depth"] + losses["seg"]
        if form == "around":
            with monitor.around(losses, total):
                total.backward()
        else:
            if form == "called":
                monitor(losses)
            total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def twenty_steps(build: Callable[[], tuple[nn.Module, Tensor]], form: str) -> float:
    """Time of one measured and 19 other monitored steps over that of 20 plain ones.

    The three kinds of steps are timed one by one in turn, in CPU seconds, and the least disturbed tenth of each counts:
    the difference of a few per cent drowns in the noise of loops of twenty steps.
    """
    taken = seconds(
        {
            "due": step(build, form, 1),
            "other": step(build, form, 10**9),  # the call that warms up is the measured one
            "plain": step(build, "plain", 1),
        },
        repeats=60,
        clock=time.process_time,
    )
    due, other, plain = (statistics.quantiles(times, n=10)[0] for times in taken.values())
    return (due + (STEPS - 1) * other) / (STEPS * plain)


def gram_rows() -> list[Row]:
    """The comparison itself, against one pass over the same gradients."""
    sizes = [(1024, 1024), (1024,)] * 4
    params = [torch.zeros(size) for size in sizes]
    gradients = [[torch.randn(size) for size in sizes] for _ in range(4)]
    where, names = [0] * len(sizes), [str(i) for i in range(len(sizes))]

    def pairs() -> list[Tensor]:
        tasks = itertools.combinations_with_replacement(gradients, 2)
        return [a.flatten().dot(b.flatten()) for one, other in tasks for a, b in zip(one, other, strict=True)]

    call = lambda: gram(gradients, params, where, 1, names=names)  # noqa: E731
    return [
        Row(
            "Gram matrix of 4 tasks, 4.2 M entries",
            "torch.dot per pair and tensor, float32",
            ratio(call, pairs, repeats=9),
        )
    ]


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    passes = {"around": "1 extra backward pass in 20 steps", "called": "2 extra backward passes in 20 steps"}
    rows = []
    for what, build, form, bound in (
        ("perceptron", perceptron, "around", 1.05),
        ("convolutions", convolutions, "around", 1.05),
        ("perceptron", perceptron, "called", None),
    ):
        rows.append(
            Row(
                f"20 steps, {what}, 2 tasks, {form}",
                "20 plain steps",
                twenty_steps(build, form),
                bound,
                passes[form],
            )
        )
    return [*rows, *gram_rows()]
