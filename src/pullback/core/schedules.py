"""Schedules: plain callables that map training progress in [0, 1] to a coefficient.

Every schedule is a small frozen dataclass, so that it prints, compares, pickles and hashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from pullback.core.checks import finite, fraction, non_negative, positive

Schedule: TypeAlias = Callable[[float], float]
"""A function of the progress p in [0, 1]."""


@dataclass(frozen=True)
class Constant:
    """The same value at every progress; see `constant`."""

    value: float

    def __call__(self, progress: float) -> float:
        """Value at ``progress`` in [0, 1]."""
        fraction("progress", progress)
        return self.value


@dataclass(frozen=True)
class Dann:
    """Saturating rise from ``low`` to ``high``; see `dann`."""

    gamma: float
    low: float
    high: float

    def __call__(self, progress: float) -> float:
        """Value at ``progress`` in [0, 1]."""
        # 2 / (1 + exp(-x)) - 1 = tanh(x / 2): exactly zero at zero, and no overflow for any gamma.
        rise = math.tanh(0.5 * self.gamma * fraction("progress", progress))
        return self.low + (self.high - self.low) * rise


@dataclass(frozen=True)
class InverseDecay:
    """Power-law decay from ``start``; see `inverse_decay`."""

    start: float
    alpha: float
    beta: float

    def __call__(self, progress: float) -> float:
        """Value at ``progress`` in [0, 1]."""
        return self.start / (1.0 + self.alpha * fraction("progress", progress)) ** self.beta


def constant(value: float) -> Constant:
    """The schedule that is ``value`` at every progress.

    Raises:
        ValueError: if ``value`` is not finite.
    """
    return Constant(finite("value", value))


def dann(gamma: float = 10.0, low: float = 0.0, high: float = 1.0) -> Dann:
    r"""The rise of the domain-adversarial coefficient, :math:`low + (high - low)(2 / (1 + e^{-\gamma p}) - 1)`.

    With the defaults this is the schedule of Ganin et al. (2016), section 5.2.2: 0 at p = 0, 0.462 at p = 0.1,
    0.9999 at p = 1. It never quite reaches ``high``.

    Args:
        gamma: steepness, >= 0; 0 stays at ``low``.
        low: value at p = 0.
        high: limit for large ``gamma``.

    Returns:
        The schedule.

    Raises:
        ValueError: if ``gamma`` is negative or any argument is not finite.
    """
    return Dann(non_negative("gamma", gamma), finite("low", low), finite("high", high))


def inverse_decay(start: float = 0.01, alpha: float = 10.0, beta: float = 0.75) -> InverseDecay:
    r"""The learning rate of Ganin et al. (2016), section 5.2.2: :math:`\mu_0 / (1 + \alpha p)^\beta`.

    As a factor for ``torch.optim.lr_scheduler.LambdaLR`` use ``start=1``.

    Args:
        start: value at p = 0, > 0.
        alpha: how early the decay begins, >= 0.
        beta: exponent, >= 0.

    Returns:
        The schedule.

    Raises:
        ValueError: if an argument is out of its range or not finite.
    """
    return InverseDecay(positive("start", start), non_negative("alpha", alpha), non_negative("beta", beta))
