"""Cost of the parallel form: fused against a loop of branches and against the sequence, order 2, and conversion."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn

from pullback.methods.shallow import ResidualStack, shallow_

BRANCHES = 16


def _ratio(what: Callable[[], object], against: Callable[[], object], repeats: int = 25) -> float:
    """In processor time: other processes do not count."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    return statistics.median(a / b for a, b in zip(taken["what"], taken["against"], strict=True))


def _training(stack: ResidualStack, x: Tensor) -> Callable[[], object]:
    wanted = [x, *stack.parameters()]
    return lambda: torch.autograd.grad(stack(x).sum(), wanted)


def _inference(stack: ResidualStack, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            stack(x)

    return call


def _conv(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU())


def _perceptron(d: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


def _normed(d: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(d), _perceptron(d))


SIZES = (
    ("conv 8 x 7 x 7, batch 64", lambda: _conv(8), (64, 8, 7, 7), 1.0),
    ("conv 32 x 14 x 14, batch 16", lambda: _conv(32), (16, 32, 14, 14), None),
    ("perceptron 32-64-32, batch 64", lambda: _perceptron(32), (64, 32), 0.85),
    ("perceptron 128-256-128, batch 256", lambda: _perceptron(128), (256, 128), None),
)


def form_rows(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], bound: float | None
) -> list[Row]:
    """One size: training against the loop and the sequence, inference against the sequence, and order 2."""
    torch.manual_seed(0)
    blocks, x = [build() for _ in range(BRANCHES)], torch.randn(shape, requires_grad=True)
    wide, loop = ResidualStack(blocks, fuse="wide"), ResidualStack(blocks, fuse="loop")
    sequence, second = ResidualStack(blocks, mode="sequential"), ResidualStack(blocks, order=2)
    kept = ResidualStack(blocks, fuse="copy")
    what = f"{name}: fused, forward and backward"
    return [
        Row(what, "loop of branches", _ratio(_training(wide, x), _training(loop, x)), bound=bound),
        Row(what, "sequential form", _ratio(_training(wide, x), _training(sequence, x)), bound=bound),
        Row(
            f"{name}: fused, inference",
            "sequential form",
            _ratio(_inference(wide, x), _inference(sequence, x)),
        ),
        Row(
            f"{name}: weights copied, inference", "gathered", _ratio(_inference(kept, x), _inference(wide, x))
        ),
        Row(
            f"{name}: order 2, forward",
            "order 1",
            _ratio(_inference(second, x), _inference(wide, x)),
            bound=4.0,
        ),
    ]


def vmap_rows() -> list[Row]:
    """Branches that begin with a normalisation."""
    torch.manual_seed(0)
    blocks, x = [_normed(32) for _ in range(BRANCHES)], torch.randn(64, 32, requires_grad=True)
    loop, vmapped, second = (
        ResidualStack(blocks, fuse=fuse, order=order)
        for fuse, order in (("loop", 1), ("vmap", 1), ("loop", 2))
    )
    name = "normed perceptron 32-64-32, batch 64"
    return [
        Row(f"{name}: vmap, forward and backward", "loop", _ratio(_training(vmapped, x), _training(loop, x))),
        Row(
            f"{name}: order 2 in a loop, forward",
            "order 1",
            _ratio(_inference(second, x), _inference(loop, x)),
        ),
    ]


class Block(nn.Module):
    """A residual block of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _conv(32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def conversion_row() -> Row:
    """Finding, verifying and rewiring 16 blocks, beside training steps of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), *[Block() for _ in range(BRANCHES)])
    x = torch.randn(16, 3, 14, 14)

    def step() -> None:
        torch.autograd.grad(model(x).sum(), list(model.parameters()))

    def convert() -> None:
        shallow_(copy.deepcopy(model), Block, probe=x[:2])

    return Row(
        "conversion of 16 blocks, 32 x 14 x 14", "one training step, batch 16", _ratio(convert, step, 5)
    )


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    rows = [row for size in SIZES for row in form_rows(*size)]
    return [*rows, *vmap_rows(), conversion_row()]
