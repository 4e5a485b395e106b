"""Times to a goal: the share of runs that have not met it yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.style import arm_colours, panels, style
from pullback.lab.result import TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def survival(result: TrialResult, name: str, *, pair: tuple[str, str], unit: str = "step") -> Figure:
    """One falling line per arm, and the log-rank test of two arms.

    Args:
        result: a result whose cells hold the array ``name``: times of several runs, -1 for a run that never met the
            goal. Runs of all seeds of an arm are taken together.
        name: of the array.
        pair: the arms to test.
        unit: of the times.

    Returns:
        The figure; times are shown on a logarithmic axis.
    """
    from scipy.stats import CensoredData, logrank

    figure, (axes,) = panels(1, height=3.6)
    colours = arm_colours(result.arms)
    times = {arm.name: _times(result, arm.name, name) for arm in result.arms}
    last = max((float(met[-1]) for met, _ in times.values() if len(met)), default=1.0)
    with style():
        for arm in result.arms:
            met, never = times[arm.name]
            count = max(len(met) + never, 1)
            rows = [1.0, *met, last], [1.0, *(1 - np.arange(1, len(met) + 1) / count), 1 - len(met) / count]
            bold = 2.2 if arm.name in pair else 1.1
            axes.step(*rows, where="post", color=colours[arm.name], linewidth=bold, label=arm.name)
        if all(len(times[arm][0]) for arm in pair if arm in times):
            samples = [CensoredData(times[arm][0], right=np.full(times[arm][1], last)) for arm in pair]
            p = logrank(*samples).pvalue
            axes.set_title(f"log-rank test of {pair[0]} against {pair[1]}, all runs: p = {p:.1e}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:g}"
        )  # the default one writes powers in mathtext
        axes.set(xlabel=unit, ylabel="share not at the goal", ylim=(0, 1.02))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _times(result: TrialResult, arm: str, name: str) -> tuple[np.ndarray, int]:
    """Sorted times of the runs that met the goal, and how many never did."""
    rows = [c.arrays[name] for c in result.cells if c.arm == arm and name in c.arrays]
    every = np.concatenate(rows) if rows else np.empty(0)
    return np.sort(every[every >= 0]).astype(float), int((every < 0).sum())
