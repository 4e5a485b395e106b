"""One look for every figure: a palette for colour-blind readers too, one font size, no chart junk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from pullback.lab.result import ArmResult

INK: Final = "#1b2430"
"""Text and the marks of the reader's attention."""
MUTED: Final = "#5d6875"
"""Secondary text and axes."""
GRID: Final = "#dfe4ea"
"""Grid lines and faint fills."""
PAPER: Final = "#b0196b"
"""Numbers that the paper printed, never ours."""
METHOD: Final = "#1d5fb4"
BASELINE: Final = "#68727f"
CEILING: Final = "#1a7f64"
SERIES: Final[tuple[str, ...]] = ("#c2570c", "#7b5ea7", "#a17a00", "#2b8ca3", "#9c4a4a", "#4d7f2a")
"""Rivals and other arms, in order of appearance."""
CLASSES: Final[tuple[str, ...]] = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9",
    "#d55e00", "#8c6d31", "#6a51a3", "#7f7f7f", "#b5b000",
)  # fmt: skip
"""Classes and domains in scatter plots (after Okabe and Ito, extended to ten)."""
MARKERS: Final[tuple[str, ...]] = ("s", "D", "^", "v", "P", "X")

UNIT: Final = 1.36
"""CSS pixels per point at which figures are shown: 9 pt text reads as 12 px."""
WIDE: Final = 7.3
"""Inches: fills the text column of a desktop page."""
NARROW: Final = 3.6
"""Inches: fills the screen of a phone."""

_RC: Final[Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # names of arms come from users: a dollar sign is no formula
    "text.usetex": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "image.interpolation": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "pullback",
    "svg.image_inline": True,
    "path.simplify": True,
}


def style() -> AbstractContextManager[None]:
    """The look of all figures as a context; artists made inside it have the house's colours and sizes.

    Returns:
        A context manager that restores matplotlib's settings at its end.
    """
    return mpl.rc_context(_RC)


def panels(
    count: int = 1,
    *,
    columns: int | None = None,
    width: float = WIDE,
    height: float | None = None,
    share: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` equal axes, without pyplot and without a display.

    Args:
        count: number of axes, at least 1.
        columns: axes per row; None puts up to three in a row.
        width: inches of the whole figure.
        height: inches of the whole figure; None gives each row 2.6 inches.
        share: whether all axes share their limits.

    Returns:
        The figure and its axes, row by row.

    Raises:
        ValueError: if ``count`` or ``columns`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}. Ask for at least one panel.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}. Leave it out to choose it automatically.")
    across = min(columns or 3, count)
    rows = -(-count // across)
    with style():
        figure = Figure(figsize=(width, height or 2.6 * rows), layout="constrained")
        grid = figure.subplots(rows, across, squeeze=False, sharex=share, sharey=share)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def arm_colours(arms: Sequence[ArmResult]) -> dict[str, str]:
    """One colour per arm, by its role: the method in the accent, the baseline in grey, rivals in the series.

    Args:
        arms: the arms of a result, in the order in which they are shown.

    Returns:
        Colour as ``#rrggbb`` by arm name.
    """
    fixed = {"method": METHOD, "baseline": BASELINE, "ceiling": CEILING}
    rest = [arm.name for arm in arms if arm.role not in fixed]
    series = {name: SERIES[i % len(SERIES)] for i, name in enumerate(rest)}
    return {arm.name: fixed.get(arm.role) or series[arm.name] for arm in arms}


def arm_markers(arms: Sequence[ArmResult]) -> dict[str, str]:
    """One marker per arm, so that arms differ without colour as well.

    Args:
        arms: the arms of a result, in the order in which they are shown.

    Returns:
        matplotlib marker by arm name.
    """
    fixed = {"method": "o", "baseline": "o", "ceiling": "*"}
    rest = [arm.name for arm in arms if arm.role not in fixed]
    series = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(rest)}
    return {arm.name: fixed.get(arm.role) or series[arm.name] for arm in arms}
