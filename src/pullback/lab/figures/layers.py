"""Drawings for measurements of layers: curves over depth by panel, ratios to the baseline, and how well scores tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.style import CLASSES, INK, MUTED, arm_colours, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pullback.lab.result import TrialResult


def layer_panels(
    result: TrialResult, arms: Sequence[str], curves: Sequence[str], *, names: Sequence[str]
) -> Figure:
    """Logged curves against the layer: a panel for each arm, a line for each curve, faint for single seeds.

    Args:
        result: whose runs have logged ``curves`` with the layer as the step.
        arms: one panel each; all have the same logarithmic axis.
        curves: names of positive curves.
        names: what each is called.

    Returns:
        The figure.
    """
    figure, axes = panels(len(arms), columns=len(arms), height=2.9, share=True)
    with style():
        for ax, arm in zip(axes, arms, strict=True):
            for curve, name, colour in zip(curves, names, CLASSES, strict=False):
                runs = list(result.curve(arm, curve).values())
                if not runs:
                    continue
                for steps, values in runs:
                    ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
                mean = np.mean([values for _, values in runs], axis=0)
                ax.plot(runs[0][0], mean, color=colour, label=name, marker="o", markersize=2.5)
            ax.set(title=arm, xlabel="layer", yscale="log")
        axes[0].set(ylabel="nuclear norm of the gradient")
        found = axes[0].get_legend_handles_labels()
        figure.legend(*found, loc="outside upper right", ncols=len(curves))
    return figure


def ratio_bars(result: TrialResult, metrics: Mapping[str, str], label: str) -> Figure:
    """What the arms have over the baseline, as factors: a bar for each metric, every seed a dot.

    Args:
        result: a trial.
        metrics: by name, a metric that is a log10.
        label: of the axis.

    Returns:
        The figure, with a group of bars for each arm but the baseline; the geometric mean is written beside each bar.
    """
    base = next(arm.name for arm in result.arms if arm.role == "baseline")
    arms = [arm.name for arm in result.arms if arm.name != base]
    figure, (ax,) = panels(height=0.9 + 0.72 * len(arms))
    high = 0.8 / len(metrics)
    with style():
        for place, (name, metric) in enumerate(metrics.items()):
            before = result.scores(base, metric)
            for row, arm in enumerate(arms):
                after = result.scores(arm, metric)
                logs = np.array([after[seed] - before[seed] for seed in after if seed in before])
                y = row - 0.4 + high * (place + 0.5)
                mean = 10.0 ** float(np.mean(logs))
                ax.barh(y, mean - 1.0, left=1.0, height=0.9 * high, color=CLASSES[place], alpha=0.75,
                        linewidth=0, label=name if row == 0 else None)  # fmt: skip
                ax.scatter(10.0**logs, [y] * len(logs), s=5, color=INK, linewidths=0, alpha=0.6, zorder=3)
                furthest = max(float(np.max(10.0**logs)), 1.0)
                ax.annotate(f"{mean:.3g}", (furthest, y), xytext=(4, 0), textcoords="offset points",
                            va="center", fontsize=7.5, color=MUTED)  # fmt: skip
        ax.set_yticks(range(len(arms)), arms)
        ax.invert_yaxis()
        ax.set(xscale="log", xlabel=label)
        ax.margins(x=0.08)
        ax.axvline(1.0, color=INK, linewidth=0.7)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(metrics))
    return figure


def auc_rows(result: TrialResult, *, chance: float = 0.5) -> Figure:
    """The metric ``auc`` of every arm: each seed a dot with its own interval, the mean a bar with its value.

    Args:
        result: a trial whose runs return ``auc`` and may return ``auc_low`` and ``auc_high``.
        chance: where a line is drawn.

    Returns:
        The figure.
    """
    colours = arm_colours(result.arms)
    figure, (ax,) = panels(height=0.7 + 0.5 * len(colours))
    with style():
        for row, (arm, colour) in enumerate(colours.items()):
            scores, low, high = (result.scores(arm, name) for name in ("auc", "auc_low", "auc_high"))
            for place, (seed, value) in enumerate(scores.items()):
                y = row - 0.25 + 0.5 * (place + 0.5) / len(scores)
                ax.plot([low[seed], high[seed]], [y, y], color=colour, linewidth=0.9, alpha=0.5)
                ax.scatter([value], [y], s=9, color=colour, linewidths=0)
            if scores:
                mean = sum(scores.values()) / len(scores)
                ax.plot([mean, mean], [row - 0.33, row + 0.33], color=colour)
                ax.annotate(
                    f"{mean:.2f}", (mean, row - 0.33), ha="center", va="bottom", fontsize=8, color=INK
                )
        ax.set_yticks(range(len(colours)), list(colours))
        ax.invert_yaxis()
        ax.set(xlabel="AUC: how often an irrelevant response has the larger score")
        ax.axvline(chance, color=MUTED, linewidth=0.7)
    return figure
