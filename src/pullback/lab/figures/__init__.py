"""Figures of reports, and helpers for studies that draw their own.

A study's `Drawing` is a function of the `TrialResult` that returns a matplotlib figure::

    def draw(result):
        figure, axes = panels(2)
        for ax, arm in zip(axes, ("sgd", "dann"), strict=True):
            scatter_2d(result.array(arm, "features"), result.array(arm, "domain"),
                       names=("source", "target"), title=arm, ax=ax)
        return figure

It is called inside `style()`, never needs a display and must not use pyplot.
"""

from pullback.lab.figures.conflict import conflict_history
from pullback.lab.figures.helpers import decision_regions, image_grid, scatter_2d
from pullback.lab.figures.reconstructions import audit_pictures
from pullback.lab.figures.style import (
    BASELINE,
    CEILING,
    CLASSES,
    INK,
    METHOD,
    MUTED,
    NARROW,
    SERIES,
    WIDE,
    arm_colours,
    panels,
    style,
)

__all__ = [
    "BASELINE",
    "CEILING",
    "CLASSES",
    "INK",
    "METHOD",
    "MUTED",
    "NARROW",
    "SERIES",
    "WIDE",
    "arm_colours",
    "audit_pictures",
    "conflict_history",
    "decision_regions",
    "image_grid",
    "panels",
    "scatter_2d",
    "style",
]
