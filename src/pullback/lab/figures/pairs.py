"""Two arms over many configurations: every pair as a point, and what predicts their difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.style import BASELINE, INK, METHOD, MUTED, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def paired_losses(
    baseline: np.ndarray, method: np.ndarray, ratio: np.ndarray, gap: np.ndarray, *, within: float = 0.2
) -> Figure:
    """Losses of both arms against each other, coloured by ``ratio``, and their log ratio against ``gap``.

    Args:
        baseline: losses [n], positive.
        method: losses [n] of the same configurations and seeds.
        ratio: the determination ratio Q of each [n], positive.
        gap: what may predict the difference [n].
        within: relative difference that the band shows.
    """
    figure, (left, right) = panels(2, height=3.3)
    left.set(xlabel="loss, sequential", ylabel="loss, parallel", xscale="log", yscale="log")
    right.set(xlabel="truncation gap of the sequential network", ylabel="log(parallel / sequential)")
    if not len(baseline):
        return figure
    ends = np.array([min(baseline.min(), method.min()) * 0.9, max(baseline.max(), method.max()) * 1.1])
    left.fill_between(ends, ends * (1 - within), ends * (1 + within), color=MUTED, alpha=0.15, linewidth=0)
    left.plot(ends, ends, color=BASELINE, linewidth=0.8)
    dots = left.scatter(
        baseline, method, c=np.log10(ratio), cmap="viridis", s=22, edgecolors=INK, linewidths=0.3
    )
    figure.colorbar(dots, ax=left, label="log10 Q", shrink=0.8)
    difference = np.log(method / baseline)
    right.axhline(0.0, color=BASELINE, linewidth=0.8)
    right.plot(gap, difference, "o", markersize=4, color=METHOD, alpha=0.7)
    if len(gap) > 2 and np.ptp(gap) > 0 and np.ptp(difference) > 0:
        from scipy.stats import spearmanr

        right.set_title(f"rank correlation {float(spearmanr(gap, difference).statistic):.2f}")
    return figure
