"""The plain training of a classifier that studies share: Adam to a plateau on batches that all arms of a seed share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.streams import generator

BATCH = 100


@dataclass(frozen=True)
class Part:
    """Inputs [n, ...] and classes [n]."""

    x: Tensor
    y: Tensor


def _batches(part: Part, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all epochs, the same for all arms and shapes of a seed."""
    for epoch in range(epochs):
        order = torch.randperm(len(part.y), generator=generator("order", seed, epoch))
        for rows in order.split(BATCH):
            yield part.x[rows], part.y[rows]


def _warm_cosine(step: int, steps: int) -> float:
    """Up for the first fifth, then down along a cosine."""
    warm = max(1, steps // 5)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


def fit(
    net: nn.Module, part: Part, lr: float, epochs: int, seed: int, watch: Callable[[int], None] | None = None
) -> None:
    """Adam, warmed up and cooled down to a plateau; ``watch(epoch)`` after every second epoch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    per_epoch = math.ceil(len(part.y) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warm_cosine, steps=epochs * per_epoch))
    for step, (x, y) in enumerate(_batches(part, epochs, seed), start=1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        if watch is not None and step % (2 * per_epoch) == 0:
            watch(step // per_epoch)


@torch.no_grad()
def score(net: nn.Module, part: Part) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    out = torch.cat([net(x) for x in part.x.split(500)])
    return float(F.cross_entropy(out, part.y)), float((out.argmax(1) == part.y).float().mean())
