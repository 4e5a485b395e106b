"""The paper's equations entry by entry, in double precision and without cleverness: the oracle."""

from __future__ import annotations

from collections.abc import Sequence


def variance(t: int, eta: float, gamma: float) -> float:
    """sigma_t^2 = eta / (1 + t)^gamma, t = 0, 1, ... (section 3)."""
    return eta / (1 + t) ** gamma


def std(t: int, eta: float, gamma: float) -> float:
    """sigma_t."""
    return variance(t, eta, gamma) ** 0.5


def noisy(gradient: Sequence[float], draws: Sequence[float], t: int, eta: float, gamma: float) -> list[float]:
    """g_t <- g_t + N(0, sigma_t^2), given the standard normal draws."""
    return [g + std(t, eta, gamma) * z for g, z in zip(gradient, draws, strict=True)]


def clipped(gradient: Sequence[float], limit: float) -> list[float]:
    """Scale the gradient to norm ``limit`` when it is longer."""
    norm = sum(g * g for g in gradient) ** 0.5
    return [g * min(1.0, limit / norm) for g in gradient] if norm > 0 else list(gradient)


def walk_variance(lr: float, eta: float, gamma: float, steps: int) -> float:
    """Variance of a weight after ``steps`` steps of plain SGD on noise alone."""
    total = 0.0
    for t in range(steps):
        total += lr**2 * variance(t, eta, gamma)
    return total
