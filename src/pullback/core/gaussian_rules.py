"""Rules of the built-in Gaussian paths: alpha, sigma and derivatives at a time, and the time of a noise level.

Each is written once for numbers and for tensors: ``m`` is the module `math` or `torch`, whose functions have one name.
A level is log(alpha / sigma).
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pullback.core.forward_mode import directional

Four: TypeAlias = tuple[Any, Any, Any, Any]
"""alpha, sigma and their derivatives by time."""


def cosine(t: Any, m: Any) -> Four:
    """Alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    angle, speed = t * (math.pi / 2), math.pi / 2
    alpha, sigma = m.cos(angle), m.sin(angle)
    return alpha, sigma, -speed * sigma, speed * alpha


def cosine_time(level: Any, m: Any) -> Any:
    """Time of a level."""
    return m.atan(m.exp(-level)) * (2 / math.pi)


def linear(t: Any, _m: Any) -> Four:
    """Alpha = 1 - t, sigma = t."""
    one = t * 0.0 + 1.0
    return 1.0 - t, t, -one, one


def linear_time(level: Any, _m: Any) -> Any:
    """Time of a level."""
    if isinstance(level, Tensor):
        return torch.sigmoid(-level)
    return 1.0 / (1.0 + math.exp(min(level, 700.0)))


def vp(b0: float, b1: float, t: Any, m: Any) -> Four:
    """alpha^2 = exp(-b0 t - (b1 - b0) t^2 / 2), sigma^2 = 1 - alpha^2."""
    rate, total = b0 + (b1 - b0) * t, b0 * t + (b1 - b0) * t * t / 2
    alpha, square = m.exp(-total / 2), -m.expm1(-total)  # no cancellation near t = 0
    sigma = m.sqrt(square)
    # At t = 0 sigma grows as a square root of time: its derivative is infinite there, and finite everywhere else.
    slope = 0.5 * rate * alpha * alpha / sigma if isinstance(t, Tensor) or sigma > 0 else math.inf
    return alpha, sigma, -0.5 * rate * alpha, slope


def vp_time(b0: float, b1: float, level: Any, m: Any) -> Any:
    """Time of a level: the positive root of a quadratic."""
    if isinstance(level, Tensor):
        total: Any = -torch.nn.functional.logsigmoid(level * 2.0)
    else:
        total = math.log1p(math.exp(-2.0 * level)) if level > -300 else -2.0 * level
    return 2.0 * total / (b0 + m.sqrt(b0 * b0 + 2.0 * (b1 - b0) * total))


def ve(t: Any, _m: Any) -> Four:
    """Alpha = 1, sigma = t."""
    zero = t * 0.0
    return zero + 1.0, t, zero, zero + 1.0


def ve_time(level: Any, m: Any) -> Any:
    """Time of a level."""
    return m.exp(-level)


def own(alpha: Any, sigma: Any, t: Any, _m: Any) -> Four:
    """A user's schedule, differentiated by forward mode; numbers pass through float64 on the host."""
    point = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    found = [directional(each, (point,), (torch.ones_like(point),)) for each in (alpha, sigma)]
    four = (found[0][0], found[1][0], found[0][1], found[1][1])
    return four if isinstance(t, Tensor) else tuple(map(float, four))  # ty: ignore[invalid-explicit-return]
