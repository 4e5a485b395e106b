"""The paper's equations, slow and literal: one unit, one example, one number at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def elu(x: float, alpha: float) -> float:
    """Equation 15: x for x > 0, alpha (exp(x) - 1) for x <= 0."""
    return x if x > 0 else alpha * math.expm1(x)


def elu_derivative(x: float, alpha: float) -> float:
    """1 for x > 0, f(x) + alpha for x <= 0."""
    return 1.0 if x > 0 else elu(x, alpha) + alpha


def normal_cdf(x: float) -> float:
    """Phi."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def elu_moments(alpha: float, s: float) -> tuple[float, float]:
    """E f and E f^2 of ELU(alpha) for z ~ N(0, s^2)."""
    one, two = math.exp(s * s / 2) * normal_cdf(-s), math.exp(2 * s * s) * normal_cdf(-2 * s)
    mean = s / math.sqrt(2 * math.pi) + alpha * (one - 0.5)
    return mean, s * s / 2 + alpha**2 * (two - 2 * one + 0.5)


def unit_fisher(a: Tensor, delta: Tensor) -> Tensor:
    """Fisher matrix [n + 1, n + 1] of one unit over (w, w0): the mean of delta^2 (a, 1) (a, 1)^T.

    Args:
        a: incoming activations, [rows, n].
        delta: derivative of the log-likelihood by the unit's pre-activation, [rows].
    """
    n = a.shape[1]
    total = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for row, d in zip(a.double(), delta.double(), strict=True):
        extended = torch.cat([row, torch.ones(1, dtype=torch.float64)])
        total += d * d * torch.outer(extended, extended)
    return total / len(a)


def damped(fisher: Tensor, damping: float) -> Tensor:
    """``F + damping mean(diag F) I``."""
    return fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype)


def natural_step(fisher: Tensor, g: Tensor, g0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Theorem 1: dw = A^-1 (g - b dw0), dw0 = s (g0 - b^T A^-1 g), s = 1 / (c - b^T A^-1 b). Returns dw, dw0, s."""
    a, b, c = fisher[:-1, :-1], fisher[:-1, -1], fisher[-1, -1]
    inverse = torch.linalg.inv(a)
    s = 1 / (c - b @ inverse @ b)
    dw0 = s * (g0 - b @ inverse @ g)
    return inverse @ (g - b * dw0), dw0, s


def reweighted(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n] and covariance [n, n] of ``a`` under q, proportional to delta^2."""
    weight = delta.double().square() / delta.double().square().sum()
    mean = sum(w * row for w, row in zip(weight, a.double(), strict=True))
    centred = a.double() - mean
    return torch.as_tensor(mean), sum(
        w * torch.outer(row, row) for w, row in zip(weight, centred, strict=True)
    )


def theorem_two(a: Tensor, delta: Tensor, g: Tensor, g0: Tensor) -> tuple[float, float, float]:
    """The bias shift (E_p - k E_q)^T A^-1 g + k c^-1 g0 of an undamped natural step, with its k and s.

    k = 1 + (E_q - E_p)^T Var_q^-1 E_q and s = (1 + E_q^T Var_q^-1 E_q) / c.
    """
    fisher = unit_fisher(a, delta)
    c = fisher[-1, -1]
    mean_p, (mean_q, var_q) = a.double().mean(0), reweighted(a, delta)
    inverse = torch.linalg.inv(var_q)
    k = 1 + (mean_q - mean_p) @ inverse @ mean_q
    s = (1 + mean_q @ inverse @ mean_q) / c
    shift = (mean_p - k * mean_q) @ torch.linalg.inv(fisher[:-1, :-1]) @ g + k / c * g0
    return float(shift), float(k), float(s)


def shift_fraction(a: Tensor, d: Tensor, d0: Tensor) -> float:
    """(E dz)^2 / E dz^2 of dz = a.d + d0 over the rows."""
    dz = torch.stack([row.double() @ d.double() + d0.double() for row in a])
    return float(dz.mean() ** 2 / dz.square().mean())
