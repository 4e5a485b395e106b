"""A drawing for studies that vary how many micro-batches an update has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pullback.lab.figures.style import BASELINE, METHOD, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pullback.lab.result import TrialResult


def against_accumulation(
    result: TrialResult, metrics: Mapping[str, str], *, kinds: tuple[str, str], steps: Sequence[int]
) -> Figure:
    """Metrics against the number of micro-batches per update; every seed a point, means joined.

    Args:
        result: a trial whose arms are called ``<kind>-<number>``.
        metrics: label of every metric that gets a panel.
        kinds: the baseline's and the method's kind of arm.
        steps: the numbers, each a power of 2.

    Returns:
        The figure.
    """
    figure, axes = panels(len(metrics), columns=len(metrics), height=2.9)
    with style():
        for ax, (metric, label) in zip(axes, metrics.items(), strict=True):
            for kind, colour in zip(kinds, (BASELINE, METHOD), strict=True):
                scores = {k: list(result.scores(f"{kind}-{k}", metric).values()) for k in steps}
                for k, values in scores.items():
                    ax.scatter([k] * len(values), values, s=9, color=colour, alpha=0.5, linewidths=0)
                means = [sum(values) / max(1, len(values)) for values in scores.values()]
                ax.plot(list(steps), means, color=colour, label=kind)
            ax.set_xscale("log", base=2)
            ax.set(xlabel="micro-batches per update", ylabel=label)
            ax.set_xticks(list(steps), [str(k) for k in steps])
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure
