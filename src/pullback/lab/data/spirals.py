"""Two spirals in the plane, a task that no shallow boundary solves cheaply."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spirals(
    count: int, draw: torch.Generator, *, turns: float = 2.0, noise: float = 0.03
) -> tuple[Tensor, Tensor]:
    """Points of two interleaved spirals around the origin, radius 0.2 to 2.

    Args:
        count: number of points.
        draw: generator of all randomness.
        turns: how often each spiral goes round.
        noise: standard deviation of the Gaussian noise on both coordinates.

    Returns:
        Points float32 [count, 2], and classes int64 [count], 0 or 1 with equal probability.
    """
    t, y = torch.rand(count, generator=draw), torch.randint(2, (count,), generator=draw)
    radius, angle = 0.2 + 1.8 * t, math.pi * (2 * turns * t + y)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return x + noise * torch.randn(count, 2, generator=draw), y
