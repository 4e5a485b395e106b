"""GCond's resolution beside TorchJD's PCGrad, and whole training steps beside a plain weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio
from torch import nn
from torchjd.aggregation import PCGrad

from pullback.methods.gcond import ConflictResolver, GradientConductor, TaskAccumulator

ENTRIES = 1_000_000
BATCH, K = 64, 8
WEIGHTS = {"first": 0.85, "second": 0.15}


def jacobian(tasks: int) -> torch.Tensor:
    """Rows of which half are in conflict with the other half."""
    g = torch.Generator().manual_seed(tasks)
    base = torch.randn(ENTRIES, generator=g)
    signs = torch.tensor([(-1.0) ** i for i in range(tasks)])
    return torch.randn(tasks, ENTRIES, generator=g) + 0.8 * signs[:, None] * base


def calls(
    aggregator: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, count: int
) -> Callable[[], None]:
    """Several calls, so that one measurement is not shorter than a few milliseconds."""

    def run() -> None:
        for _ in range(count):
            aggregator(rows)

    return run


def network() -> nn.Sequential:
    """The perceptron of the study."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(392, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 196))


def losses(out: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"first": (out - x[:, :196]).abs().mean(), "second": (out + x[:, 196:]).square().mean()}


def plain(data: torch.Tensor) -> Callable[[], None]:
    """The weighted sum: one forward and one backward pass per micro-batch, gradients added up in ``.grad``."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), foreach=True)

    def step() -> None:
        for x in data:
            found = losses(net(x), x)
            (sum(WEIGHTS[name] * loss for name, loss in found.items()) / K).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def conducted(data: torch.Tensor, mode: str, *, shared: bool = False) -> Callable[[], None]:
    """The same with a conductor; ``shared`` differentiates both losses after one forward pass."""
    net = network()
    conductor = GradientConductor(net, WEIGHTS, accumulate=K, mode=mode)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.0, 0.95), foreach=True)

    def step() -> None:
        if shared:
            for x in data:
                conductor.backward(losses(net(x), x))
        else:
            for task, x in conductor.schedule(data):
                with conductor.accumulate(task):
                    losses(net(x), x)[task].backward()
        conductor.step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def accumulation() -> Row:
    """What one block costs beside autograd's own addition to ``.grad``."""
    net = nn.Linear(1000, 1000)
    tasks, x = TaskAccumulator(net, ("a",)), torch.randn(8, 1000)

    def ours() -> None:
        for _ in range(K):
            with tasks.accumulate("a"):
                net(x).sum().backward()
        tasks.reset()

    def autograd() -> None:
        for _ in range(K):
            net(x).sum().backward()
        net.zero_grad()

    return Row(
        "accumulate(task), 8 micro-batches, 1e6 entries", "backward() into .grad", ratio(ours, autograd)
    )


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    rows = []
    for tasks in (2, 4, 8):
        matrix, count = jacobian(tasks), 16 // tasks
        pair = calls(ConflictResolver(), matrix, count), calls(PCGrad(), matrix, count)
        rows.append(
            Row(f"ConflictResolver, [{tasks}, 1e6]", "torchjd PCGrad", ratio(*pair, repeats=31), bound=1.0)
        )
    data = torch.randn(K, BATCH, 392, generator=torch.Generator().manual_seed(0))
    stochastic, whole = conducted(data, "stochastic"), plain(data)
    rows += [
        Row(
            "stochastic step, 2 tasks, 8 x 64",
            "weighted sum",
            ratio(stochastic, whole, repeats=31),
            bound=1.1,
        ),
        Row(
            "stochastic step, 2 tasks, 8 x 64",
            "sequential",
            ratio(stochastic, conducted(data, "sequential"), repeats=31),
            bound=0.65,
            note="sequential as published: a forward pass per task",
        ),
        Row(
            "stochastic step, 2 tasks, 8 x 64",
            "sequential, shared forward",
            ratio(stochastic, conducted(data, "sequential", shared=True), repeats=31),
        ),
        accumulation(),
    ]
    return rows
