"""How well gradients are estimated: errors against the size of the difference, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.style import MUTED, arm_colours, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pullback.lab.result import TrialResult


def fidelity(result: TrialResult, *, slopes: Sequence[int]) -> Figure:
    """Three panels: error in float64 and in float32 against the size of the nudge, and peak bytes against steps.

    Args:
        result: cells with the arrays ``double`` and ``single`` [n, (size, error)] and ``bytes`` [(steps, bytes), n];
            an arm may lack any of them.
        slopes: orders to which dotted guides are drawn.

    Returns:
        The figure; lines are geometric means over seeds.
    """
    figure, axes = panels(3, columns=3, height=3.2)
    colours = arm_colours(result.arms)
    with style():
        for arm in result.arms:
            for ax, name in zip(axes, ("double", "single", "bytes"), strict=True):
                tables = [c.arrays[name] for c in result.cells if c.arm == arm.name and name in c.arrays]
                if tables:
                    table = np.exp(np.mean(np.log(tables), axis=0))
                    line = table if name == "bytes" else table.T
                    ax.plot(*line, marker="o", markersize=2.5, color=colours[arm.name], label=arm.name)
        size = np.array([1e-3, 0.1])
        for slope in slopes:
            axes[0].plot(size, 0.3 * (size / 0.3) ** slope, color=MUTED, linewidth=0.6, linestyle=":")
        for ax, title in zip(axes, ("float64", "float32", "peak bytes"), strict=True):
            ax.set(
                xscale="log", yscale="log", title=title, xlabel="steps" if title == "peak bytes" else "beta"
            )
        axes[0].set(ylabel="relative error", ylim=(1e-13, 2))
        figure.legend(*axes[2].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure
