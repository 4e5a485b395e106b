"""A step through reversible MBConv stages against plain autograd, one checkpoint per block, and MemCNN; bytes kept."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pullback.core.saved_bytes import saved_bytes
from pullback.methods.rev_mbconv_unet import MBConv, ReversibleStage, ReversibleUNet, soft_dice

BLOCKS, CHANNELS, SIDE, BATCH = 4, 32, 16, 2


def stage(blocks: int = BLOCKS, channels: int = CHANNELS) -> ReversibleStage:
    """A stage of three-dimensional bottlenecks, e = 2."""
    torch.manual_seed(0)
    parts = [MBConv(channels // 2) for _ in range(2 * blocks)]
    return ReversibleStage(list(zip(parts[::2], parts[1::2], strict=True)))


def image(channels: int = CHANNELS, side: int = SIDE) -> Tensor:
    """One input, which needs a gradient as it does inside a network."""
    return torch.randn(BATCH, channels, side, side, side, requires_grad=True)


def stepping(call: Callable[[Tensor], Tensor], params: list[nn.Parameter], x: Tensor) -> Callable[[], None]:
    """Forwards and backwards."""

    def step() -> None:
        for p in params:
            p.grad = None
        x.grad = None
        call(x).square().mean().backward()

    return step


class Checkpointed(nn.Module):
    """The same blocks, one non-reentrant checkpoint for each."""

    def __init__(self, inner: ReversibleStage) -> None:
        super().__init__()
        functions = list(inner.functions())
        pairs = zip(functions[::2], functions[1::2], strict=True)
        self.blocks = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        pair = tuple(x.chunk(2, 1))
        for block in self.blocks:
            pair = checkpoint(self.one, block, *pair, use_reentrant=False)
        return torch.cat(pair, 1)

    @staticmethod
    def one(block: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        first = first + block[0](second)
        return first, second + block[1](first)


def memcnn_stage(inner: ReversibleStage) -> nn.Module:
    """The same blocks as MemCNN's additive couplings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import memcnn

    functions = list(inner.functions())
    couplings = [
        memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g), keep_input=False)
        for f, g in zip(functions[::2], functions[1::2], strict=True)
    ]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.couplings = nn.ModuleList(couplings)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0  # a wrapper frees what it is given
            for coupling in self.couplings:
                x = coupling(x)
            return x

    return Stack()


def stage_seconds(repeats: int = 41) -> dict[str, list[float]]:
    """Processor time of a step of every way to run the same stage."""
    base, x = stage(), image()
    plain, rebuilt = copy.deepcopy(base), copy.deepcopy(base)
    plain.reversible = False
    ways: dict[str, nn.Module] = {
        "plain": plain,
        "reversible": rebuilt,
        "checkpoint": Checkpointed(copy.deepcopy(base)),
    }
    with contextlib.suppress(ImportError):
        ways["memcnn"] = memcnn_stage(copy.deepcopy(base))
    steps = {name: stepping(way, list(way.parameters()), x) for name, way in ways.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside MemCNN
        return seconds(steps, repeats=repeats, clock=time.process_time)


def of(taken: dict[str, list[float]], what: str, against: str) -> float:
    """Ratio of the least processor times (fifth percentiles): whatever else runs only adds to them."""
    low = {name: statistics.quantiles(taken[name], n=20)[0] for name in (what, against)}
    return low[what] / low[against]


def network_seconds(repeats: int = 25) -> dict[str, list[float]]:
    """Processor time of a training step of a whole network with and without reversal."""
    torch.manual_seed(0)
    net = ReversibleUNet(1, 2, widths=(16, 32, 64), blocks=(2, 2, 2))
    plain = copy.deepcopy(net).set_reversible(False)
    x = torch.randn(1, 1, 24, 24, 24)
    y = torch.cat([x > 0, x > 1], 1)

    def step(network: ReversibleUNet) -> Callable[[], None]:
        def call() -> None:
            network.zero_grad()
            soft_dice(network(x), y).backward()

        return call

    return seconds({"reversible": step(net), "plain": step(plain)}, repeats=repeats, clock=time.process_time)


def slope(*, reversible: bool) -> float:
    """Bytes that one more block keeps."""
    kept = []
    for blocks in (2, 10):
        each, x = stage(blocks, 8), image(8, 8)
        each.reversible = reversible
        kept.append(saved_bytes(lambda each=each, x=x: each(x), each, x))
    return (kept[1] - kept[0]) / 8


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    taken, whole = stage_seconds(), network_seconds()
    what = f"a step of {BLOCKS} reversible MBConv blocks, 3-D"
    rows = [
        Row(what, "plain autograd", of(taken, "reversible", "plain"), 1.45),
        Row(what, "one checkpoint per block", of(taken, "reversible", "checkpoint"), 1.05),
    ]
    if "memcnn" in taken:
        rows.append(Row(what, "MemCNN", of(taken, "reversible", "memcnn"), 0.8))
    else:
        rows.append(Row(what, "MemCNN", bound=0.8, skipped="memcnn is not installed"))
    rows += [
        Row(
            "bytes of one more block, reversible",
            "plain",
            slope(reversible=True) / slope(reversible=False),
            0.01,
        ),
        Row(
            "a training step of the whole network",
            "the plain network",
            of(whole, "reversible", "plain"),
            1.45,
        ),
    ]
    return rows
