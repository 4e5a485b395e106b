"""The history of a conflict monitor as a figure: cosines over the steps, conflict rates, norm ratios."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pullback.core.conflict_report import ALL, ConflictReport, summarise
from pullback.lab.figures.builtin import short
from pullback.lab.figures.style import CLASSES, INK, MUTED, WIDE, panels, style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
"""Line styles; the next one is taken when the colours begin anew."""


def conflict_history(
    reports: Sequence[ConflictReport],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    width: float = WIDE,
) -> Figure | None:
    """Draw what a `ConflictMonitor` measured, one row per pair of tasks.

    At the left the cosine of the two gradients against the step, one line per group of layers, with the zero line below
    which they conflict; in the middle the share of measurements in conflict with its count, which is also the key
    to the colours; at the right the ratio of the two norms. A group in which one of the tasks never had a gradient
    is left out; a measurement in which a gradient was zero leaves a gap.

    Args:
        reports: ``monitor.reports()``.
        pairs: which pairs of tasks, in the order in which the tasks were named; ``None`` draws all.
        width: inches; below the width of a page the three parts stand below each other.

    Returns:
        The figure, or ``None`` when no two gradients were ever compared.

    Raises:
        ValueError: if a pair is not one of the reports', or reports of different monitors are mixed.
    """
    rows = summarise(reports).rows
    known = list(combinations(reports[0].tasks, 2)) if reports else []
    for pair in pairs or ():
        if pair not in known:
            raise ValueError(
                f"pairs must be among {known}, got {pair!r}. Keep the order of the monitor's tasks."
            )
    compared = {row.tasks for row in rows if row.measured}
    wanted = [pair for pair in pairs or known if pair in compared]
    if not wanted:
        return None
    across = 3 if width >= WIDE else 1
    heights = [_height(sum(1 for row in rows if row.tasks == pair and row.measured)) for pair in wanted]
    figure, axes = panels(
        3 * len(wanted), columns=across, width=width, height=sum(heights) * (1 if across == 3 else 3)
    )
    for number, pair in enumerate(wanted):
        with style():
            _pair(axes[3 * number : 3 * number + 3], reports, pair)
    return figure


def _height(groups: int) -> float:
    """Inches of one row of axes: every bar needs its line of text."""
    return max(2.4, 0.9 + 0.2 * groups)


def _pair(axes: Sequence[Axes], reports: Sequence[ConflictReport], pair: tuple[str, str]) -> None:
    """Fill the three axes of one pair."""
    curves, bars, ratios = axes
    first, second = (reports[0].tasks.index(task) for task in pair)
    steps = np.asarray([report.step for report in reports])
    cosine = torch.stack([report.cosine[:, first, second] for report in reports]).cpu().double().numpy()
    ratio = torch.stack([report.norm_ratio[:, first, second] for report in reports]).cpu().double().numpy()
    rows = [row for row in summarise(reports).rows if row.tasks == pair]
    shown = [g for g, row in enumerate(rows) if row.measured]
    curves.axhline(0, color=MUTED, linewidth=0.9, label="_zero")
    ratios.axhline(1, color=MUTED, linewidth=0.9, label="_one")
    for position, g in enumerate(shown):
        name, row = reports[0].groups[g], rows[g]
        look = _look(name, position)
        marker = "." if row.measured == 1 else ""
        curves.plot(steps, cosine[:, g], label=name, marker=marker, **look)
        ratios.plot(steps, ratio[:, g], label=name, marker=marker, **look)
        bars.barh(position, row.rate, height=0.62, color=look["color"], label=name)
        bars.plot(
            [0], [position], marker="s", markersize=5, color=look["color"], clip_on=False
        )  # key where rate is 0
        bars.text(row.rate + 0.02, position, f"{row.conflicts}/{row.measured}", va="center", fontsize=8)
    title = f"{short(pair[0], 14)} and {short(pair[1], 14)}"
    curves.set(title=title, xlabel="step", ylabel="cosine of gradients", ylim=(-1.05, 1.05))
    curves.yaxis.set_major_locator(MaxNLocator(5))
    bars.set_yticks(range(len(shown)), [short(reports[0].groups[g], 16) for g in shown])
    bars.set(xlim=(0, 1.22), ylim=(len(shown) - 0.4, -0.6), xlabel="steps in conflict")
    bars.set_xticks([0, 0.5, 1])
    bars.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    bars.tick_params(axis="y", length=0)
    bars.spines["left"].set_visible(False)
    ratios.set(xlabel="step", ylabel=f"norm of {short(pair[0], 10)} / {short(pair[1], 10)}")
    _log_if_wide(ratios, ratio[:, shown])
    for ax in (curves, ratios):
        ax.grid(axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _look(group: str, position: int) -> dict[str, Any]:
    """Colour and line of a group: ink for all together, else one of the series."""
    if group == ALL:
        return {"color": INK, "linewidth": 2.1}
    dash = _DASHES[position // len(CLASSES) % len(_DASHES)]
    return {"color": CLASSES[position % len(CLASSES)], "linewidth": 1.2, "linestyle": dash}


def _log_if_wide(ax: Axes, ratio: np.ndarray) -> None:
    """A logarithmic axis, on which a and 1/a lie at equal distances, unless all ratios are close to 1."""
    finite = ratio[np.isfinite(ratio)]
    if finite.size and (finite.max() > 2 or finite.min() < 0.5):
        ax.set_yscale("log")
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
