"""The arithmetic of gradient similarity surgery: norms, their similarity, and the two sums over tasks.

Everything large happens in blocks that stay in a CPU's cache: momentum is moved on and the sum is formed while the
block's gradients are at hand, so that a step reads every gradient twice (norms, then the sum) and copies none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import sqrt

import torch
from torch import Tensor

CPU_BLOCK = 1 << 17
"""Entries of one task's gradient that are worked on at a time on a CPU; measured, not critical."""

DEVICE_BLOCK = 1 << 24
"""Entries of all tasks together that are worked on at a time elsewhere: bounds the scratch memory."""

FEW_TASKS = 4
"""Up to so many tasks a long gradient is cheaper to treat row by row than as a matrix."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of momentum and sums: float64 for float64 gradients, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- norms and similarity --------------------------------------------------------------------------------------


def row_norms(matrix: Tensor) -> list[float]:
    """Euclidean norms of the rows of ``matrix`` [tasks, parameters], read by the host in one transfer.

    A norm whose squares left the range of the dtype is computed again on a scaled row, so that entries from 1e-30 to
    1e30 are fine in float32 too. Below the smallest normal number a gradient counts as zero.

    Returns:
        One float per row; not finite only where an entry is not (or the norm exceeds float64).
    """
    dtype = state_dtype(matrix.dtype)
    info = torch.finfo(dtype)
    norms: list[float] = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype).tolist()
    low = info.tiny**0.5 / info.eps  # smaller entries lose digits when they are squared
    for k, size in enumerate(norms):
        if not low <= size < float("inf"):
            norms[k] = _scaled_norm(matrix[k].to(dtype))
        if norms[k] < info.tiny:
            norms[k] = 0.0
    return norms


def _scaled_norm(row: Tensor) -> float:
    """Norm of one row by way of its largest entry."""
    largest = float(row.abs().max())
    if not 0.0 < largest < float("inf"):  # zero, NaN or Inf
        return largest
    return largest * float(torch.linalg.vector_norm(row / largest))


def pairwise_dissimilarity(norms: Tensor) -> Tensor:
    """``1 - psi`` for every pair of gradients, from their norms.

    Written with the ratio r = min / max as ``(1 - r)^2 / (1 + r^2)``: nothing cancels when two norms nearly agree,
    nothing overflows, and a common scale drops out.

    Args:
        norms: [..., tasks], >= 0.

    Returns:
        [..., tasks, tasks] in [0, 1]; 0 where two norms agree (also where both are 0), 1 where just one is 0.
    """
    one, other = norms.unsqueeze(-1), norms.unsqueeze(-2)
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    ratio = torch.where(high > 0, low / torch.where(high > 0, high, 1.0), 1.0)
    return (1.0 - ratio).square() / (1.0 + ratio.square())


def pair_dissimilarities(norms: Sequence[float]) -> list[float]:
    """The same for numbers that the host has read already: one value per pair i < j."""
    found = []
    for one, other in combinations(norms, 2):
        high = max(one, other)
        ratio = min(one, other) / high if high > 0.0 else 1.0
        found.append((1.0 - ratio) ** 2 / (1.0 + ratio * ratio))
    return found


def in_range(largest: float, reach: float, info: torch.finfo) -> tuple[float, float]:
    """Factors for gradients and momentum: 1, or what brings both near 1 where their product would leave the dtype.

    Args:
        largest: largest norm of a gradient.
        reach: bound on the norms of the momentum.
        info: of the dtype.

    Returns:
        ``(g_scale, m_scale)`` for `modulated_`.
    """
    room = sqrt(info.max) / 1e3  # the norm of the result squares it once more
    if largest == 0.0 or 1.0 / room < largest * reach < room:
        return 1.0, 1.0
    return 1.0 / max(largest, 4.0 * info.tiny), 1.0 / max(reach, 4.0 * info.tiny)


# --- the two sums ----------------------------------------------------------------------------------------------


def equalised_(matrix: Tensor, momentum: Tensor, beta1: float, weights: Sequence[float]) -> Tensor:
    """Move the momentum on and sum the rows with weights.

    Args:
        matrix: gradients [tasks, parameters].
        momentum: [tasks, parameters], updated in place: ``beta1 m + (1 - beta1) g``.
        beta1: its decay.
        weights: one factor per task.

    Returns:
        ``sum_k weights[k] g_k`` [parameters], in the dtype of the momentum.
    """
    out = torch.empty(matrix.shape[1], dtype=momentum.dtype, device=momentum.device)
    row = torch.tensor(weights, dtype=out.dtype, device=out.device)
    for part, g, m in _blocks(matrix, momentum, out):
        m.lerp_(g, 1.0 - beta1)
        torch.mv(g.T, row, out=part)  # autocast leaves calls with out= alone
    return out


def modulated_(
    matrix: Tensor, momentum: Tensor, beta1: float, g_scale: float = 1.0, m_scale: float = 1.0
) -> Tensor:
    """Move the momentum on and sum the rows, each multiplied by the size of its own momentum.

    Args:
        matrix: gradients [tasks, parameters].
        momentum: [tasks, parameters], updated in place: ``beta1 m + (1 - beta1) g``.
        beta1: its decay.
        g_scale: factor of the sum, applied once it is complete.
        m_scale: factor of ``|m|``, applied before anything is multiplied with it.

    Returns:
        ``g_scale sum_k g_k * (m_scale |m_k|)`` [parameters], in the dtype of the momentum.
    """
    out = torch.empty(matrix.shape[1], dtype=momentum.dtype, device=momentum.device)
    if _by_rows(matrix):
        scratch = torch.empty(CPU_BLOCK, dtype=out.dtype)
        for part, grads, means in _row_blocks(matrix, momentum, out):
            size = scratch[: len(part)]
            for k, (g, m) in enumerate(zip(grads, means, strict=True)):
                torch.abs(m.lerp_(g, 1.0 - beta1), out=size)
                if m_scale != 1.0:
                    size.mul_(m_scale)
                if k == 0:
                    torch.mul(g, size, out=part)
                else:
                    part.addcmul_(g, size)
    else:
        for part, g, m in _blocks(matrix, momentum, out):
            sizes = m.lerp_(g, 1.0 - beta1).abs()
            if m_scale != 1.0:
                sizes.mul_(m_scale)
            torch.sum(sizes.mul_(g), 0, out=part)
    return out if g_scale == 1.0 else out.mul_(g_scale)


def _by_rows(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and len(matrix) <= FEW_TASKS and matrix.shape[1] > CPU_BLOCK // 2


def _row_blocks(
    matrix: Tensor, momentum: Tensor, out: Tensor
) -> Iterator[tuple[Tensor, list[Tensor], tuple[Tensor, ...]]]:
    """Blocks of the result, and the same block of every task's gradient and momentum."""
    grads = zip(*(row.split(CPU_BLOCK) for row in matrix), strict=True)
    means = zip(*(row.split(CPU_BLOCK) for row in momentum), strict=True)
    for part, some, others in zip(out.split(CPU_BLOCK), grads, means, strict=True):
        yield part, [g.to(out.dtype) for g in some], others


def _blocks(matrix: Tensor, momentum: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of the result, of the gradients [tasks, block] and of the momentum."""
    total = FEW_TASKS * CPU_BLOCK if matrix.device.type == "cpu" else DEVICE_BLOCK
    size = max(1, total // len(matrix))
    for part, g, m in zip(out.split(size), matrix.split(size, 1), momentum.split(size, 1), strict=True):
        yield part, g.to(out.dtype), m
