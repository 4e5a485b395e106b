"""Two arms over many configurations: every pair as a point, and what predicts their difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.style import BASELINE, INK, METHOD, MUTED, panels
from pullback.lab.result import TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def paired_losses(
    result: TrialResult, arms: tuple[str, str], columns: Sequence[str], *, within: float = 0.2
) -> Figure:
    """Losses of two arms against each other, coloured by Q, and the log ratio against the gap of the first one.

    Args:
        result: whose runs have logged an array ``shapes`` [configurations, columns].
        arms: the two arms.
        columns: names of its columns; of these are used ``loss`` (its logarithm), ``q`` and ``gap``.
        within: relative difference that the band shows.
    """
    rows = [
        {c.seed: c.arrays["shapes"] for c in result.cells if c.arm == arm and "shapes" in c.arrays}
        for arm in arms
    ]
    seeds = sorted(rows[0].keys() & rows[1].keys())
    figure, (left, right) = panels(2, height=3.3)
    left.set(xlabel=f"loss, {arms[0]}", ylabel=f"loss, {arms[1]}", xscale="log", yscale="log")
    right.set(xlabel=f"truncation gap, {arms[0]}", ylabel=f"log({arms[1]} / {arms[0]})")
    if not seeds:
        return figure
    one, other = (np.concatenate([found[seed] for seed in seeds]) for found in rows)
    q, loss, gap = (list(columns).index(name) for name in ("q", "loss", "gap"))
    x, y = np.exp(one[:, loss]), np.exp(other[:, loss])
    ends = np.array([min(x.min(), y.min()) * 0.9, max(x.max(), y.max()) * 1.1])
    left.fill_between(ends, ends * (1 - within), ends * (1 + within), color=MUTED, alpha=0.15, linewidth=0)
    left.plot(ends, ends, color=BASELINE, linewidth=0.8)
    shade = np.log10(one[:, q])
    dots = left.scatter(x, y, c=shade, cmap="viridis", s=22, edgecolors=INK, linewidths=0.3)
    figure.colorbar(dots, ax=left, label="log10 Q", shrink=0.8)
    right.axhline(0.0, color=BASELINE, linewidth=0.8)
    right.plot(one[:, gap], np.log(y / x), "o", markersize=4, color=METHOD, alpha=0.7)
    right.set_title(f"rank correlation {_ranks(one[:, gap], np.log(y / x))}")
    return figure


def _ranks(x: np.ndarray, y: np.ndarray) -> str:
    """Spearman's, or a dash where there is none."""
    from scipy.stats import spearmanr

    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return "-"
    return f"{float(spearmanr(x, y).statistic):.2f}"
