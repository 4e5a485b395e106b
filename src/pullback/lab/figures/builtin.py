"""The built-in figures of a report: every seed of every arm, curves, comparisons, tuning, and all rooms at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pullback.lab.figures.style import (
    BASELINE,
    GRID,
    INK,
    METHOD,
    MUTED,
    PAPER,
    WIDE,
    arm_colours,
    arm_markers,
    style,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from pullback.lab.result import ArmResult, Comparison, TrialResult

_NAME = 22
_MARK_AREA = 26.0

LINEAR = 5.0
"""Standardised effects up to here are drawn on a linear scale, larger ones on a logarithmic one."""


def short(name: str, limit: int = _NAME) -> str:
    """``name`` on one line and at most ``limit`` characters, for tick labels."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _placed(
    heights: Sequence[float],
    *,
    width: float,
    left: float,
    columns: int = 1,
    foot: float = 0.5,
    head: float = 0.12,
) -> tuple[Figure, list[Axes]]:
    """Axes at fixed places, in inches: far faster than measuring every text, and enough for one-line labels.

    ``heights`` are those of the plotting areas, row by row; ``left``, ``foot`` and ``head`` the room around each.
    """
    across = width / columns
    total = sum(heights[::columns]) + (foot + head) * len(heights[::columns])
    with style():
        figure, axes, top = Figure(figsize=(width, total)), [], total
        for index, height in enumerate(heights):
            if index % columns == 0:
                top -= head + height + (foot if index else 0.0)
            x = across * (index % columns) + left
            box = (x / width, top / total, (across - left - 0.14) / width, height / total)
            axes.append(figure.add_axes(box))
    return figure, axes


def _beside(labels: Sequence[str], size: float = 8.5) -> float:
    """Inches that row labels of this length need at the left."""
    return 0.12 + 0.0085 * size * max(len(line) for label in labels for line in label.split("\n"))


def metric_of(result: TrialResult, name: str | None = None) -> Mapping[str, Any]:
    """The declared metric called ``name`` (None: the primary one), as a mapping with name, better and unit."""
    primary = result.declaration["primary"]
    return (
        primary
        if name in (None, primary["name"])
        else result.declaration["metrics"].get(name, {"name": name})
    )


def _percent(ax: Axes, unit: str, *, along: str = "y") -> None:
    if unit == "fraction":
        axis = ax.yaxis if along == "y" else ax.xaxis
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _label(metric: Mapping[str, Any]) -> str:
    unit = metric.get("unit", "")
    name = short(str(metric.get("name", "")).replace("_", " "), 40)
    return f"{name} ({short(unit)})" if unit and unit != "fraction" else name


def paired_seeds(result: TrialResult, metric: str | None = None, *, width: float = WIDE) -> Figure:
    """Every seed of every arm as a point, the same seed joined by a faint line, the mean as a bar.

    Runs that failed stand at the worst score as crosses; numbers that the paper printed are marks of their own.

    Args:
        result: the trial.
        metric: which metric; None takes the primary one.
        width: inches.

    Returns:
        The figure.
    """
    what = metric_of(result, metric)
    scores = {arm.name: result.scores(arm.name, metric) for arm in result.arms}
    shown = [arm for arm in result.arms if scores[arm.name]]
    names = [arm.name for arm in shown]
    colours, marks = arm_colours(result.arms), arm_markers(result.arms)
    failed = {(c.arm, c.seed) for c in result.cells if c.status != "done"}
    labels = [short(name, _NAME if width >= WIDE else 13) for name in names]
    figure, (ax,) = _placed([0.42 * len(names)], width=width, left=_beside(labels), head=0.3)
    with style():
        seeds = sorted({seed for name in names for seed in scores[name]})
        off = dict(zip(seeds, np.linspace(-0.16, 0.16, len(seeds)) if len(seeds) > 1 else [0.0], strict=True))
        for seed in seeds:
            line = [(scores[n][seed], row + off[seed]) for row, n in enumerate(names) if seed in scores[n]]
            ax.plot(*zip(*line, strict=True), color=MUTED, linewidth=0.6, alpha=0.3, zorder=1)
        for row, name in enumerate(names):
            good = [(v, row + off[seed]) for seed, v in scores[name].items() if (name, seed) not in failed]
            bad = [(v, row + off[seed]) for seed, v in scores[name].items() if (name, seed) in failed]
            mean = float(np.mean(list(scores[name].values())))
            ax.plot([mean, mean], [row - 0.28, row + 0.28], color=colours[name], linewidth=3, zorder=2)
            ax.scatter(*np.reshape(good, (-1, 2)).T, s=_MARK_AREA, color=colours[name], marker=marks[name],
                       alpha=0.8, linewidths=0, zorder=3)  # fmt: skip
            ax.scatter(*np.reshape(bad, (-1, 2)).T, s=_MARK_AREA, color=colours[name], marker="x", zorder=3)
        if metric in (None, result.declaration["primary"]["name"]):
            _paper_marks(ax, result, shown)
        ax.set_yticks(range(len(names)), labels)
        ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=_label(what))
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        ax.xaxis.set_major_locator(MaxNLocator(6 if width >= WIDE else 4))
        _percent(ax, str(what.get("unit", "")), along="x")
    return figure


def _paper_marks(ax: Axes, result: TrialResult, arms: Sequence[ArmResult]) -> None:
    paper = result.declaration.get("paper") or {}
    found = False
    for row, arm in enumerate(arms):
        value = paper.get(arm.role) if arm.role in ("baseline", "method", "ceiling") else None
        if isinstance(value, int | float) and math.isfinite(value):
            ax.scatter([value], [row + 0.38], marker="^", s=34, facecolors="none", edgecolors=PAPER,
                       linewidths=1.2, zorder=4, label=None if found else "printed in the paper")  # fmt: skip
            found = True
    if found:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, handletextpad=0.2)


def curves(
    result: TrialResult, y: str, *, x: str = "step", arms: Sequence[str] = (), width: float = WIDE
) -> Figure | None:
    """A logged value against the step: faint per seed, bold in the mean, one colour per arm.

    Args:
        result: the trial.
        y: name under which the run logged the value.
        x: what the steps count.
        arms: which arms; none given means all.
        width: inches.

    Returns:
        The figure, or None when no run logged ``y``.
    """
    wanted = [arm.name for arm in result.arms if (not arms or arm.name in arms) and result.curve(arm.name, y)]
    if not wanted:
        return None
    colours = arm_colours(result.arms)
    columns = min(len(wanted), 4 if width >= WIDE else 2)
    figure, (ax,) = _placed(
        [min(2.4, 0.6 * width)], width=width, left=0.72, head=0.1 + 0.2 * -(-len(wanted) // columns)
    )
    with style():
        for name in wanted:
            lines = [
                (np.asarray(s), np.asarray(v, dtype=float)) for s, v in result.curve(name, y).values() if s
            ]
            for steps, values in lines:
                ax.plot(steps, values, color=colours[name], linewidth=0.7, alpha=0.22)
            grid, mean = _mean_curve(lines)
            ax.plot(grid, mean, color=colours[name], linewidth=2.1, label=short(name))
        ax.set(xlabel=short(x), ylabel=_label({**result.declaration["metrics"].get(y, {}), "name": y}))
        ax.grid(axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(6 if width >= WIDE else 4, integer=True))
        _percent(ax, result.declaration["metrics"].get(y, {}).get("unit", ""))
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.1, handlelength=1.4)
    return figure


def _mean_curve(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds on the union of their steps, without reaching beyond the end of a seed that stopped early."""
    if not lines:
        return np.empty(0), np.empty(0)
    grid = np.unique(np.concatenate([steps for steps, _ in lines]))
    each = [np.interp(grid, steps, values, left=np.nan, right=np.nan) for steps, values in lines]
    stack = np.ma.masked_invalid(np.stack(each))
    return grid, stack.mean(axis=0).filled(np.nan)


def forest(result: TrialResult, *, width: float = WIDE) -> Figure | None:
    """All comparisons of a trial with their intervals, one row each; rows of one metric share an axis.

    Args:
        result: the trial.
        width: inches.

    Returns:
        The figure, or None when nothing was compared.
    """
    groups: dict[str, list[Comparison]] = {}
    for comparison in result.comparisons:
        if math.isfinite(comparison.difference):
            groups.setdefault(comparison.metric, []).append(comparison)
    if not groups:
        return None
    limit = 22 if width >= WIDE else 13
    ticks = {
        name: [f"{short(c.arm, limit)}\nvs {short(c.than, limit)}" for c in g] for name, g in groups.items()
    }
    left = _beside([tick for some in ticks.values() for tick in some], 8)
    figure, axes = _placed([0.4 * len(group) for group in groups.values()], width=width, left=left)
    with style():
        for ax, (name, group) in zip(axes, groups.items(), strict=True):
            what = metric_of(result, name)
            ax.axvline(0, color=MUTED, linewidth=0.9)
            for row, c in enumerate(group):
                _interval(ax, row, c)
            ax.set_yticks(range(len(group)), ticks[name], fontsize=8)
            ax.set_ylim(len(group) - 0.4, -0.6)
            points = " points" if what.get("unit") == "fraction" else ""
            told = f"difference in {_label(what)},{points}" if points else f"difference in {_label(what)}"
            ax.set_xlabel(f"paired {told}; right is better" if width >= WIDE else short(told, 42))
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.grid(axis="x")
            ax.xaxis.set_major_locator(MaxNLocator(6 if width >= WIDE else 4))
            if what.get("unit") == "fraction":
                ax.xaxis.set_major_formatter(
                    FuncFormatter(lambda value, _: f"{100 * value:+g}" if value else "0")
                )
    return figure


def _interval(ax: Axes, row: int, c: Comparison) -> None:
    colour = METHOD if c.role == "claim" else INK if c.role == "also" else BASELINE
    if math.isfinite(c.low) and math.isfinite(c.high):
        ax.plot([c.low, c.high], [row, row], color=colour, linewidth=2, zorder=2)
    ax.scatter([c.difference], [row], s=34, color=colour, zorder=3)
    if c.margin:
        edges = [-c.margin, c.margin] if c.kind == "equivalent" else [c.margin]
        for edge in edges:
            ax.plot([edge, edge], [row - 0.35, row + 0.35], color=INK, linewidth=1, linestyle=(0, (2, 2)))


def tuning_scatter(result: TrialResult, *, width: float = WIDE) -> Figure | None:
    """Score against each tuned hyperparameter, a row per arm, with the chosen point ringed.

    A best value at an edge of its range is said in the title: the arm may not be fully tuned.

    Args:
        result: the trial.
        width: inches.

    Returns:
        The figure, or None when nothing was tuned.
    """
    pairs = [(arm, name) for arm in result.arms for name in _tuned(arm)]
    if not pairs:
        return None
    columns = min(len(pairs), 3 if width >= WIDE else 2)
    colours = arm_colours(result.arms)
    figure, axes = _placed([1.15] * len(pairs), width=width, left=0.55, columns=columns, head=0.26, foot=0.48)
    with style():
        for ax, (arm, name) in zip(axes, pairs, strict=True):
            points = [(p["hp"][name], float(p["score"])) for p in arm.tuning if name in p["hp"]]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x, _ in points)
            xs = [x if numeric else short(str(x), 12) for x, _ in points]
            ax.scatter(xs, [y for _, y in points], s=16, color=colours[arm.name], alpha=0.6, linewidths=0)
            ax.scatter(
                xs[:1], [y for _, y in points[:1]], s=70, facecolors="none", edgecolors=INK, linewidths=1.1
            )
            if numeric and _spread(xs):
                ax.set_xscale("log")
                ax.minorticks_off()
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            elif numeric:
                ax.xaxis.set_major_locator(MaxNLocator(3))
            edge = " (at the edge)" if name in arm.at_edge else ""
            ax.set_title(f"{short(arm.name, 18)}{edge}", fontweight="bold" if edge else "normal")
            ax.set_xlabel(short(name))
            ax.grid(axis="y")
            ax.yaxis.set_major_locator(MaxNLocator(4))
    return figure


def _tuned(arm: ArmResult) -> list[str]:
    """Hyperparameters of which more than one value was tried."""
    names = {name for point in arm.tuning for name in point["hp"]}
    return [n for n in sorted(names) if len({str(p["hp"].get(n)) for p in arm.tuning}) > 1]


def _spread(values: Sequence[Any]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20


def overview(rows: Sequence[tuple[str, Comparison]], *, width: float = WIDE) -> Figure | None:
    """The main comparison of every trial in units of the standard deviation of its paired differences.

    Args:
        rows: a name and its main comparison, in the order shown.
        width: inches.

    Returns:
        The figure, or None when no comparison has a finite standardised effect.
    """
    drawn = [(name, c) for name, c in rows if _standardised(c) is not None]
    if not drawn:
        return None
    labels = [short(name, 24 if width >= WIDE else 14) for name, _ in drawn]
    figure, (ax,) = _placed([0.3 * len(drawn) + 0.1], width=width, left=_beside(labels))
    with style():
        ax.axvline(0, color=MUTED, linewidth=0.9)
        for row, (_, c) in enumerate(drawn):
            scale = _standardised(c) or 1.0
            colour = METHOD if c.word == "supported" else INK if c.word == "refuted" else BASELINE
            ax.axhline(row, color=GRID, linewidth=0.6, zorder=0)
            ax.plot([c.low * scale, c.high * scale], [row, row], color=colour, linewidth=2)
            ax.scatter(
                [c.effect], [row], s=34, color=colour, marker="o" if c.word == "supported" else "D", zorder=3
            )
        if max(abs(c.effect) for _, c in drawn) > LINEAR:  # one clear-cut effect must not flatten all others
            ax.set_xscale("symlog", linthresh=LINEAR, linscale=2.0)
            ax.set_xticks([0, 2, 4, *(10.0**k for k in range(1, 5) if 10.0**k < 2 * ax.get_xlim()[1])])
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.minorticks_off()
        ax.set_yticks(range(len(drawn)), labels)
        ax.set_ylim(len(drawn) - 0.4, -0.6)
        ax.set_xlabel("effect in standard deviations of the paired difference, right is better")
        if width < WIDE:
            ax.set_xlabel("standardised effect, right is better")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    return figure


def _standardised(c: Comparison) -> float | None:
    """Standard deviations per unit of the metric, or None where the effect is not defined."""
    if not all(map(math.isfinite, (c.effect, c.low, c.high, c.difference))) or c.difference == 0:
        return None
    return abs(c.effect / c.difference)
