"""How close reconstructed images are: PSNR, SSIM, and which reconstruction belongs to which original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pullback.core.checks import floating, integer, positive

_K1, _K2 = 0.01, 0.03


def psnr(images: Tensor, truth: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of every image: 10 log10(data_range² / mean squared error), in dB.

    Args:
        images: [B, ...].
        truth: of the same shape.
        data_range: largest minus smallest possible value. Undo a normalisation first, or give its range.

    Returns:
        [B], float64; infinite where an image is exact.

    Raises:
        TypeError, ValueError: if shapes differ or ``data_range`` is not positive.
    """
    peak = positive("data_range", data_range)
    error = _apart(images, truth).square().flatten(1).mean(1)
    return 20 * math.log10(peak) - 10 * error.log10()


def ssim(
    images: Tensor, truth: Tensor, *, data_range: float = 1.0, sigma: float = 1.5, window: int = 11
) -> Tensor:
    """Structural similarity of every image (Wang et al. 2004), with a Gaussian window and population variances.

    Equal to ``skimage.metrics.structural_similarity(..., gaussian_weights=True, sigma=sigma,
    use_sample_covariance=False)`` per channel, averaged over channels. Windows reach over no edge.

    Args:
        images: [B, C, H, W].
        truth: of the same shape.
        data_range: largest minus smallest possible value.
        sigma: of the window, in pixels.
        window: its width, odd; on smaller images the largest odd width that fits is used instead.

    Returns:
        [B], float64, at most 1.

    Raises:
        TypeError, ValueError: if shapes differ, are not those of images, or a number makes no sense.
    """
    floating("images", images, ndim=4, fix="SSIM is defined on images [B, C, H, W].")
    _apart(images, truth)
    peak, sigma = positive("data_range", data_range), positive("sigma", sigma)
    width = min(
        integer("window", window, minimum=1), *((side - 1) // 2 * 2 + 1 for side in images.shape[-2:])
    )
    if width % 2 == 0:
        raise ValueError(f"window must be odd, got {window}. Use {window + 1}.")
    places = torch.arange(width, dtype=torch.float64, device=images.device) - width // 2
    taps = (-0.5 * (places / sigma).square()).exp()
    taps = taps / taps.sum()

    def smooth(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)[:, None]
        rows = functional.conv2d(functional.conv2d(rows, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        return rows.view(*x.shape[:2], *rows.shape[-2:])

    x, y = images.detach().double(), truth.detach().double()
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x.square(), smooth(y * y) - mean_y.square()
    both = smooth(x * y) - mean_x * mean_y
    one, two = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    top = (2 * mean_x * mean_y + one) * (2 * both + two)
    return (top / ((mean_x.square() + mean_y.square() + one) * (var_x + var_y + two))).flatten(1).mean(1)


def match(images: Tensor, truth: Tensor) -> Tensor:
    """Which reconstruction belongs to which original: the assignment with the smallest sum of squared errors.

    A gradient does not know the order of its batch.

    Args:
        images: [B, ...], reconstructions.
        truth: [B, ...], originals.

    Returns:
        ``order`` [B] of integers: ``images[order]`` lies as ``truth`` does.

    Raises:
        TypeError, ValueError: if shapes differ.
    """
    _apart(images, truth)
    x, y = images.detach().double().flatten(1), truth.detach().double().flatten(1)
    costs = torch.stack([(x - row).square().mean(1) for row in y])  # [originals, reconstructions]
    worst = (
        2 * len(costs) * float(torch.nan_to_num(costs, 0.0, 0.0).max()) + 1
    )  # more than any sum of the others
    costs = torch.nan_to_num(costs, nan=worst, posinf=worst)
    return torch.tensor(assignment(costs.tolist()), device=images.device)


def assignment(costs: Sequence[Sequence[float]]) -> list[int]:
    """Columns that rows are assigned to, one each, at the smallest total cost: exact, O(n³).

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987), for the small n of a batch.

    Args:
        costs: n rows of n finite numbers.

    Returns:
        For every row its column.

    Raises:
        ValueError: if the costs are not square or a number is not finite.
    """
    n = len(costs)
    if any(len(row) != n for row in costs) or not all(math.isfinite(c) for row in costs for c in row):
        raise ValueError(
            f"costs must be square and finite, got {n} rows of {sorted({len(row) for row in costs})}."
        )
    row_of: list[int] = [-1] * n
    rows, columns = [0.0] * n, [0.0] * n  # potentials
    for start in range(n):
        _augment(costs, start, row_of, rows, columns)
    found = [0] * n
    for column, row in enumerate(row_of):
        found[row] = column
    return found


def _augment(
    costs: Sequence[Sequence[float]], start: int, row_of: list[int], rows: list[float], columns: list[float]
) -> None:
    """Give row ``start`` a column, moving others along the shortest alternating path."""
    n = len(costs)
    length, came = [math.inf] * n, [-1] * n
    done: list[int] = []
    open_columns = set(range(n))
    row, reached, last = start, 0.0, -1
    while True:
        for column in open_columns:
            through = reached + costs[row][column] - rows[row] - columns[column]
            if through < length[column]:
                length[column], came[column] = through, row
        last = min(open_columns, key=lambda column: (length[column], column))
        reached = length[last]
        open_columns.discard(last)
        if row_of[last] < 0:
            break
        done.append(last)
        row = row_of[last]
    rows[start] += reached
    for column in done:
        rows[row_of[column]] += reached - length[column]
        columns[column] -= reached - length[column]
    while last >= 0:
        row = came[last]
        row_of[last] = row
        if row == start:
            return
        last = _column_before(row_of, row, last)


def _column_before(row_of: Sequence[int], row: int, taken: int) -> int:
    """The column that ``row`` had before it took another one."""
    return next(column for column, owner in enumerate(row_of) if owner == row and column != taken)


def _apart(images: Any, truth: Any) -> Tensor:
    floating("images", images)
    floating("truth", truth)
    if images.shape != truth.shape or images.dim() < 2:
        raise ValueError(
            f"images and truth must have one shape [batch, ...], got {tuple(images.shape)} and {tuple(truth.shape)}. "
            "A single image is a batch of 1."
        )
    return images.detach().double() - truth.detach().to(images.device).double()
