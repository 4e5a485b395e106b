"""Reversible couplings beside plain autograd, checkpoints and MemCNN; the tiny RevCol with and without rebuilding."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pullback.methods.revcol import CouplingStep, ReversibleSequence, memory_report, revcol, saved_bytes

WIDTH, BLOCKS = 16, 8


def branch() -> nn.Module:
    """An inverted bottleneck of expansion 2 with group norms."""
    inner = 2 * WIDTH
    return nn.Sequential(
        nn.Conv2d(WIDTH, inner, 1, bias=False),
        nn.GroupNorm(4, inner),
        nn.SiLU(),
        nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
        nn.GroupNorm(4, inner),
        nn.SiLU(),
        nn.Conv2d(inner, WIDTH, 1, bias=False),
        nn.GroupNorm(4, WIDTH),
    )


def stage(blocks: int = BLOCKS) -> ReversibleSequence:
    """RevNet blocks on two halves."""
    torch.manual_seed(0)
    return ReversibleSequence([CouplingStep(n % 2, [1 - n % 2], branch()) for n in range(2 * blocks)])


def halves(batch: int = 16, side: int = 32) -> tuple[Tensor, Tensor]:
    """The state."""
    return torch.randn(batch, WIDTH, side, side), torch.randn(batch, WIDTH, side, side)


class Checkpointed(nn.Module):
    """The same blocks, each in a checkpoint."""

    def __init__(self, sequence: ReversibleSequence) -> None:
        super().__init__()
        self.steps = copy.deepcopy(sequence.steps)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        for f, g in zip(self.steps[::2], self.steps[1::2], strict=True):  # ty: ignore[invalid-argument-type]

            def block(a: Tensor, b: Tensor, f: Any = f.fn, g: Any = g.fn) -> tuple[Tensor, Tensor]:
                a = a + f(b)
                return a, b + g(a)

            state = checkpoint(block, *state, use_reentrant=False)
        return state


def training(net: nn.Module, state: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """Forward and backward of one batch."""

    def step() -> None:
        net.zero_grad()
        first, second = net(state)
        (first.square().mean() + second.square().mean()).backward()

    return step


def compare(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median of the first one's processor time over that of each, pair by pair."""
    taken = seconds(candidates, repeats=repeats, clock=time.process_time)
    ours, *others = candidates
    return {
        other: statistics.median(a / b for a, b in zip(taken[ours], taken[other], strict=True))
        for other in others
    }


def memcnn_stage(sequence: ReversibleSequence) -> Callable[[], object] | None:
    """MemCNN's wrapped additive couplings with the same functions, or None if it is not installed."""
    try:
        import memcnn
    except ImportError:
        return None
    steps = copy.deepcopy(sequence.steps)
    blocks = [
        memcnn.InvertibleModuleWrapper(
            memcnn.AdditiveCoupling(Fm=f.fn, Gm=g.fn), keep_input=False, keep_input_inverse=False
        )
        for f, g in zip(steps[::2], steps[1::2], strict=True)  # ty: ignore[invalid-argument-type]
    ]
    net, x = nn.Sequential(*blocks), torch.cat(halves(), 1)

    def step() -> None:
        net.zero_grad()
        # the wrapper frees its input: a fresh one, that requires a gradient, or nothing is differentiated
        net(x.clone().requires_grad_() * 1.0).square().mean().backward()

    return step


def stage_rows() -> list[Row]:
    """Bytes and time of a stage of inverted bottlenecks."""
    state = halves()

    def kept(blocks: int, reversible: bool) -> int:
        sequence = stage(blocks)
        sequence.reversible = reversible
        return saved_bytes(lambda: sequence(state), sequence, *state)

    slope, plain_slope = (kept(8, each) - kept(2, each) for each in (True, False))
    sequence = stage()
    plain = copy.deepcopy(sequence)
    plain.reversible = False
    candidates = {
        "reversible": training(sequence, state),
        "plain autograd": training(plain, state),
        "torch checkpoint": training(Checkpointed(sequence), state),
    }
    peer = memcnn_stage(sequence)
    if peer is not None:
        candidates["MemCNN"] = peer
    bounds = {"plain autograd": 1.45, "torch checkpoint": 1.05, "MemCNN": 0.8}
    what = f"step of {BLOCKS} reversible blocks"
    rows = [Row("growth of saved bytes with depth", "plain autograd", slope / plain_slope, bound=0.01)]
    rows += [Row(what, name, ratio, bound=bounds[name]) for name, ratio in compare(candidates, 9).items()]
    if peer is None:
        rows.append(Row(what, "MemCNN", skipped="memcnn is not installed: pip install memcnn"))
    return rows


def network_rows(columns: int) -> list[Row]:
    """The tiny network with more columns, a feature set kept every fourth, beside itself without rebuilding."""
    torch.manual_seed(0)
    net = revcol("tiny", columns=columns, drop_path=0.0, num_classes=100, layer_scale=0.5)
    images, targets = torch.rand(2, 3, 64, 64), torch.arange(2)
    report = memory_report(net, images)

    def step(reversible: bool) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            net.set_reversible(reversible)
            loss = net.loss(net(images), images, targets)
            return list(torch.autograd.grad(loss, list(net.parameters())))

        return run

    pairs = zip(step(True)(), step(False)(), strict=True)
    norms = [((a - b).double().norm(), b.double().norm()) for a, b in pairs]
    error = float(torch.stack([a for a, _ in norms]).norm() / torch.stack([b for _, b in norms]).norm())
    what, against = f"RevCol tiny, {columns} columns", "plain autograd"
    ratio = compare({"ours": step(True), "plain": step(False)}, 3)["plain"]
    mib = [f"{each / 2**20:.1f}" for each in (report.reversible, report.plain, report.checkpoint)]
    size = f"{mib[0]} of {mib[1]} MiB, checkpoint {mib[2]}"
    return [
        Row(f"{what}: saved bytes", against, report.reversible / report.plain, note=size),
        Row(f"{what}: time of a step", against, ratio),
        Row(
            f"{what}: error of the gradient", "1e-4 of its norm", error / 1e-4, bound=1.0, note=f"{error:.1e}"
        ),
    ]


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    return [*stage_rows(), *(row for columns in (4, 8, 16) for row in network_rows(columns))]
