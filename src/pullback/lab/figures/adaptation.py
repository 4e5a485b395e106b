"""Drawings of adaptation between two domains, from the arrays that a study keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pullback.lab.figures.helpers import decision_regions, image_grid, scatter_2d
from pullback.lab.figures.style import CLASSES, MUTED, panels
from pullback.lab.result import TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def digits(result: TrialResult) -> Figure:
    """Source digits, target digits of training, and test digits on photographs that training never shows."""
    names = ("source_digits", "target_digits", "test_digits")
    rows = [array for name in names if (array := result.array("source", name)) is not None]
    titles = ("source", "target", "test")
    return image_grid([image for row in rows for image in row], columns=10, row_titles=titles)


def features(result: TrialResult) -> Figure:
    """Features of both domains before and after adaptation."""
    figure, axes = panels(2, height=3.3)
    for ax, arm in zip(axes, ("source", "dann"), strict=True):
        points, domain = result.array(arm, "projection"), result.array(arm, "domain")
        if points is not None and domain is not None:
            scatter_2d(points, domain, names=("source", "target, unseen photographs"), title=arm, ax=ax)
    return figure


def moons(result: TrialResult) -> Figure:
    """Predicted regions with the line at which each hidden unit changes sign (paper fig. 2)."""
    figure, axes = panels(2, height=3.6)
    for ax, arm in zip(axes, ("plain", "dann"), strict=True):
        kept = [result.array(arm, name) for name in ("regions", "points", "kinds", "units")]
        regions, points, kinds, units = kept
        if regions is None or points is None or kinds is None or units is None:
            continue
        decision_regions(
            regions,
            points,
            kinds,
            bounds=(-2.0, 2.0, -2.0, 2.0),
            names=("source class 0", "source class 1", "target, no labels"),
            title=arm,
            ax=ax,
            colours=(*CLASSES[:2], MUTED),
        )
        for a, b, c in units:
            if abs(b) > 1e-9:
                ax.plot((-2, 2), ((2 * a - c) / b, (-2 * a - c) / b), color=MUTED, linewidth=0.6, alpha=0.7)
    return figure
