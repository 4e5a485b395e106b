"""TrAct as the paper writes it: loops over samples and patches, float64, an inverse that is really formed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAD: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def gradient(outer: Tensor, x: Tensor, lam: float) -> Tensor:
    """The change of W [m, n] for G = dL/dz [b, m] and X [b, n]: sum_i g_i x_i^T (X^T X / b + lam I)^-1 (eq. 9)."""
    b, n = x.shape
    covariance = lam * torch.eye(n, dtype=torch.float64)
    plain = torch.zeros(outer.shape[1], n, dtype=torch.float64)
    for i in range(b):
        covariance += torch.outer(x[i], x[i]) / b
        plain += torch.outer(outer[i], x[i])
    return plain @ torch.linalg.inv(covariance)


def woodbury(outer: Tensor, x: Tensor, lam: float) -> Tensor:
    """The same as the paper writes it for b < n: G^T [I - K (K / lam + I)^-1 / lam] X / lam, K = X X^T / b."""
    b = len(x)
    k = x @ x.T / b
    eye = torch.eye(b, dtype=torch.float64)
    return outer.T @ (eye - k @ torch.linalg.inv(k / lam + eye) / lam) @ x / lam


def objective(change: Tensor, outer: Tensor, x: Tensor, lam: float, eta: float) -> Tensor:
    """|| z* - X (W + dW)^T ||^2 + lam b ||dW||^2 with z* = X W^T - eta b G; W drops out (eq. 5)."""
    b = len(x)
    return (-eta * b * outer - x @ change.T).square().sum() + lam * b * change.square().sum()


def patches(x: Tensor, kernel, stride, dilation, pads, mode: str) -> Tensor:
    """All patches [N * positions, C * prod(kernel)] of ``x`` [N, C, *spatial], one by one."""
    padded = np.pad(x.detach().numpy(), [(0, 0), (0, 0), *pads], mode=PAD[mode])
    positions = [
        range(0, size - d * (k - 1), s)
        for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    rows = []
    for sample in padded:
        for corner in itertools.product(*positions):
            window = tuple(
                slice(c, c + d * (k - 1) + 1, d) for c, k, d in zip(corner, kernel, dilation, strict=True)
            )
            rows.append(sample[(slice(None), *window)].reshape(-1))
    return torch.from_numpy(np.array(rows))


def convolution(outer: Tensor, x: Tensor, lam: float, *, groups: int, **geometry) -> Tensor:
    """The kernel's change for G = dL/dz [N, m, *out]: every group by itself, stacked as the kernel is."""
    n, m = outer.shape[:2]
    found = []
    for g in range(groups):
        channels = x.shape[1] // groups
        rows = patches(x[:, g * channels : (g + 1) * channels], **geometry)
        part = outer[:, g * m // groups : (g + 1) * m // groups]
        flat = part.reshape(n, m // groups, -1).transpose(1, 2).reshape(-1, m // groups)
        found.append(gradient(flat, rows, lam))
    return torch.cat(found)
