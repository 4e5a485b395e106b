"""Drawing of training paths over a two-task landscape, in the plane of parameters and in that of the two losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.style import GRID, INK, MUTED, arm_colours, panels, style
from pullback.lab.models import landscapes
from pullback.lab.result import TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLANE = {1: (-12.0, 12.0, -14.0, 11.0), 2: (-12.0, 12.0, -15.0, 11.0)}


def trajectories(result: TrialResult, toy: landscapes.Toy, arms: Sequence[str]) -> Figure:
    """The paths that the arms logged as ``path`` [points, 2, starts].

    Args:
        result: a result whose cells hold those arrays; an arm without one is left empty.
        toy: the landscape.
        arms: which arms, one column each.

    Returns:
        A figure: above, paths over contours of the sum of both losses; below, the two losses along them.
    """
    figure, axes = panels(2 * len(arms), columns=len(arms), height=5.2)
    colours = arm_colours(result.arms)
    with style():
        for column, arm in enumerate(arms):
            above, below = axes[column], axes[column + len(arms)]
            path = result.array(arm, "path")
            _contours(above, toy)
            above.set_title(arm)
            if path is not None:
                _paths(above, below, path.astype(np.float64), toy, colours[arm])
            above.set(xlabel="first parameter")
            below.set(xlabel="loss 1")
            if column == 0:
                above.set(ylabel="second parameter")
                below.set(ylabel="loss 2")
    _same_limits(axes[len(arms) :])
    return figure


def _same_limits(axes: Sequence[Axes]) -> None:
    left, right = zip(*(ax.get_xlim() for ax in axes), strict=True)
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        ax.set(xlim=(min(left), max(right)), ylim=(min(low), max(high)))


def _contours(ax: Axes, toy: landscapes.Toy) -> None:
    left, right, low, high = _PLANE[toy]
    a, b = np.linspace(left, right, 61), np.linspace(low, high, 65)
    points = np.stack([each.ravel() for each in np.meshgrid(a, b)])
    total = landscapes.evaluate(points, toy).losses.sum(0).reshape(len(b), len(a))
    levels = np.quantile(total, np.linspace(0.03, 0.97, 9))
    ax.contour(a, b, total, levels=levels, colors=GRID, linewidths=0.7, linestyles="solid")
    ax.set(xlim=(left, right), ylim=(low, high))


def _paths(above: Axes, below: Axes, path: np.ndarray, toy: landscapes.Toy, colour: str) -> None:
    for start in range(path.shape[2]):
        line = path[:, :, start]
        losses = landscapes.evaluate(line.T, toy).losses
        above.plot(line[:, 0], line[:, 1], color=colour, linewidth=1.1)
        above.plot(*line[0], "o", color=MUTED, markersize=3)
        above.plot(*line[-1], "s", color=INK, markersize=3)
        below.plot(*losses, color=colour, linewidth=0.9, alpha=0.8)
        below.plot(*losses[:, -1], "s", color=INK, markersize=3)
