"""A drawing for metrics that are log10 of an error: by what factor does each arm lower it?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pullback.lab.figures.style import INK, PAPER, arm_colours, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pullback.lab.result import TrialResult


def error_factors(result: TrialResult, paper: Mapping[str, float], *, metric: str | None = None) -> Figure:
    """The baseline's error over each arm's, seed by seed, on a logarithmic axis; above 1 the arm is better.

    Args:
        result: a trial with a metric that is log10 of an error.
        paper: printed factor by arm, drawn as a cross.
        metric: that metric; None: the primary one.

    Returns:
        The figure: every seed a point, the geometric mean a bar with its value.
    """
    base = result.scores(next(arm.name for arm in result.arms if arm.role == "baseline"), metric)
    colours = {name: c for name, c in arm_colours(result.arms).items() if result.scores(name, metric)}
    figure, (ax,) = panels(height=0.55 + 0.38 * len(colours))
    with style():
        for row, (name, colour) in enumerate(colours.items()):
            scores = result.scores(name, metric)
            gains = [10.0 ** (base[seed] - scores[seed]) for seed in scores if seed in base]
            mean = 10.0 ** (sum(map(math.log10, gains)) / max(1, len(gains)))
            ax.scatter(gains, [row] * len(gains), s=12, color=colour, alpha=0.6, linewidths=0)
            ax.plot([mean, mean], [row - 0.3, row + 0.3], color=colour)
            ax.annotate(f"{mean:.3g}", (mean, row - 0.3), ha="center", va="bottom", fontsize=8, color=INK)
            if name in paper:
                ax.scatter([paper[name]], [row], marker="x", s=26, color=PAPER, linewidths=1.2)
        ax.set_yticks(range(len(colours)), list(colours))
        ax.invert_yaxis()
        ax.set(xscale="log", xlabel="factor by which the error is lower")
        ax.axvline(1.0, color=INK, linewidth=0.7)
    return figure
