"""Twenty monitored training steps against twenty plain ones, and the parts that a measurement is made of."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from benchmarks.harness import Row, ratio
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
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.GELU())]
    return TwoHeads(nn.Sequential(*layers), 512), torch.randn(256, 512)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return TwoHeads(nn.Sequential(*layers, nn.Flatten()), 64 * 16), torch.randn(32, 3, 32, 32)


def loop(build: Callable[[], tuple[nn.Module, Tensor]], form: str | None) -> Callable[[], None]:
    """Twenty steps of AdamW; ``form`` says how the monitor is used, ``None`` is the plain loop."""
    torch.manual_seed(0)
    model, batch = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = ConflictMonitor(model, TASKS, every=STEPS)

    def plain() -> None:
        for _ in range(STEPS):
            losses = model(batch)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def called() -> None:
        for _ in range(STEPS):
            losses = model(batch)
            monitor(losses)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def around() -> None:
        for _ in range(STEPS):
            losses = model(batch)
            total = sum(losses.values())
            with monitor.around(losses, total):
                total.backward()
            optimizer.step()
            optimizer.zero_grad()

    return {None: plain, "called": called, "around": around}[form]


def gram_rows() -> list[Row]:
    """The comparison itself, against one pass over the same gradients."""
    sizes = [(1024, 1024), (1024,)] * 4
    params = [torch.zeros(size) for size in sizes]
    gradients = [[torch.randn(size) for size in sizes] for _ in range(4)]
    where, names = [0] * len(sizes), [str(i) for i in range(len(sizes))]

    def pairs() -> list[Tensor]:
        return [(a.double() * b.double()).sum() for one in gradients for other in gradients
                for a, b in zip(one, other, strict=True)]  # fmt: skip

    call = lambda: gram(gradients, params, where, 1, names=names)  # noqa: E731
    return [
        Row(
            "Gram matrix of 4 tasks, 4.2 M entries",
            "a product per pair and tensor",
            ratio(call, pairs, repeats=9),
        )
    ]


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    rows = []
    for what, build in (("perceptron", perceptron), ("convolutions", convolutions)):
        plain = loop(build, None)
        for form, bound in (("around", 1.05), ("called", None)):
            note = (
                "1 extra backward pass in 20 steps"
                if form == "around"
                else "2 extra backward passes in 20 steps"
            )
            found = ratio(loop(build, form), plain, repeats=15)
            rows.append(Row(f"20 steps, {what}, 2 tasks, {form}", "20 plain steps", found, bound, note))
    return [*rows, *gram_rows()]
