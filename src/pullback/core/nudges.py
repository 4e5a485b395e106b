"""Rules that differentiate by a small size: where to evaluate, and with which weights.

For f with f(0) known, sum_p w_p (f(b_p) - f(0)) is f'(0) up to O(b), O(b^2), or O(b^N) for N points on a circle in the
complex plane, where f must be holomorphic.
"""

from __future__ import annotations

import cmath
import math


def nudges(
    estimator: str, beta: float, n_points: int = 2, sign: int = 1
) -> tuple[list[complex], list[complex]]:
    """Nudges b_p and weights w_p of sum_p w_p (dE/dtheta(s_p) - dE/dtheta(s_0)), whose real part estimates dJ/dtheta.

    Points on the circle come in conjugate pairs with conjugate states, so that half of them do
    (arXiv:2209.00530).
    """
    if estimator == "centered" or (estimator == "holomorphic" and n_points == 2):
        return [beta, -beta], [1.0 / (2.0 * beta), -1.0 / (2.0 * beta)]
    if estimator != "holomorphic":
        one = {"positive": beta, "negative": -beta, "random_sign": sign * beta}[estimator]
        return [one], [1.0 / one]
    points = [beta * cmath.exp(2j * math.pi * k / n_points) for k in range(n_points // 2 + 1)]
    shares = [1.0 if 2 * k % n_points == 0 else 2.0 for k in range(len(points))]
    return list(points), [share / (n_points * point) for share, point in zip(shares, points, strict=True)]
