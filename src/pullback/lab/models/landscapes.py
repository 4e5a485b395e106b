"""Two-task landscapes over a plane, as methods for conflicting gradients are drawn on, with gradients by hand.

The first goes back to Liu et al. (2021, CAGrad); both are those of Borsani et al. (2025, arXiv:2506.06130): above the
axis each loss is the logarithm of a distance to a curved valley (steep and of very unequal size), below it a bowl.
All functions take any number of points at once, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Toy: TypeAlias = Literal[1, 2]

STARTS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((-8.0, 5.0), (-3.0, 7.5), (0.0, 10.0), (3.0, 7.5), (8.0, 5.0), (-10.0, -2.5), (10.0, -2.5)),
    2: ((-3.5, 5.5), (3.5, 5.5), (-6.5, 2.5), (6.5, 2.5), (0.0, 10.0), (0.0, -8.0)),
}
"""The starting points of the paper, by toy."""

NEAREST = 5e-6  # below this distance the logarithm is cut off
_SIDE = np.array([[1.0], [-1.0]])  # the two tasks mirror each other


@dataclass(frozen=True)
class Sample:
    """Both losses and their gradients at m points.

    Args:
        losses: [2, m], one row per task.
        gradients: [2, 2, m]: task, coordinate, point.
    """

    losses: np.ndarray
    gradients: np.ndarray


def evaluate(points: np.ndarray, toy: Toy) -> Sample:
    """Losses and gradients of one toy.

    Args:
        points: coordinates (a, b), [2, m].
        toy: 1, or 2 with the bowls of degree six.

    Returns:
        The losses ``f_i c1 + q_i c2`` and their gradients.

    Raises:
        ValueError: if ``toy`` is neither 1 nor 2, or the points are no [2, m].
    """
    if toy not in (1, 2):
        raise ValueError(f"toy must be 1 or 2, got {toy!r}.")
    if points.ndim != 2 or len(points) != 2:
        raise ValueError(f"points must be of shape (2, m), got {points.shape}. Put a and b into rows.")
    a, b = points
    bend, blend = np.tanh(b), np.tanh(0.5 * b)
    upper, lower = np.maximum(blend, 0.0), np.maximum(-blend, 0.0)
    slope = 0.5 * (1.0 - blend * blend)
    distance = _SIDE * (bend - 3.5) - 0.5 * a
    apart = np.abs(distance) > NEAREST
    signal = np.log(np.maximum(np.abs(distance), NEAREST)) + 6.0
    inverse = apart / np.where(apart, distance, 1.0)
    bowl, bowl_a, bowl_b = _bowls(a, b) if toy == 1 else _sextics(a, b)
    losses = signal * upper + bowl * lower
    grad_a = -0.5 * inverse * upper + bowl_a * lower
    grad_b = _SIDE * (1.0 - bend * bend) * inverse * upper + bowl_b * lower
    grad_b += slope * ((b > 0.0) * signal - (b < 0.0) * bowl)
    return Sample(losses, np.stack([grad_a, grad_b], axis=1))


def _bowls(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quadratic bowls around (7, -8) and (-7, -8)."""
    across, along = a - 7.0 * _SIDE, b + 8.0
    value = (across * across + 0.1 * along * along) / 10.0 - 20.0
    return value, across / 5.0, 0.02 * along


def _sextics(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bowls of degree six; their sum has two optima, left and right of a saddle."""
    far, near, high = (a - 5.45 * _SIDE) / 4.0, (a - 5.5 * _SIDE) / 4.0, b / 4.0
    near2, high2 = near * near, high * high
    high4 = high2 * high2
    value = 0.1 * (far**6 + high4 * high2) - (near2 * near2 + high4) - 1.5 * (near2 + high2) + 1.5
    slope_a = (0.6 * far**5 - near * (4.0 * near2 + 3.0)) / 4.0
    slope_b = high * (0.6 * high4 - 4.0 * high2 - 3.0) / 4.0
    return value, slope_a, slope_b
