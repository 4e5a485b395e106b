"""The pictures of a trial, drawn from its result alone, and the drawings of its study where that is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pullback.lab.declare import Curves, Drawing, Figure, PairedSeeds
from pullback.lab.figures import NARROW, WIDE, style
from pullback.lab.figures.builtin import curves, forest, overview, paired_seeds, tuning_scatter
from pullback.lab.figures.svg import to_svg
from pullback.lab.report.model import main_comparison, unit_of
from pullback.lab.report.text import clean, clean_block, number

if TYPE_CHECKING:
    from pullback.lab.result import Comparison, TrialResult


@dataclass(frozen=True)
class Picture:
    """A figure as inline SVG: for wide pages, for phones where there is a narrow version, or why there is none."""

    wide: str = ""
    narrow: str = ""
    caption: str = ""
    alt: str = ""
    error: str = ""


def declared_figures(result: TrialResult) -> list[Figure]:
    """Figures that the declaration asks for, with a study's own drawings taken from its room.

    A trial that cannot be found any more still has the built-in ones, which its result names.

    Args:
        result: the trial.

    Returns:
        Figures in their declared order; at least the paired seeds.
    """
    told = [_told(entry) for entry in result.declaration.get("figures") or ()]
    found = [figure for figure in told if figure is not None] or [PairedSeeds()]
    drawings = _drawings(result) if any(isinstance(f, Drawing) for f in found) else {}
    return [replace(f, draw=drawings.get(f.name, f.draw)) if isinstance(f, Drawing) else f for f in found]


def _told(entry: Mapping[str, Any]) -> Figure | None:
    kind, caption = entry.get("type"), str(entry.get("caption", ""))
    if kind == "PairedSeeds":
        return PairedSeeds(metric=entry.get("metric"), caption=caption)
    if kind == "Curves":
        arms = tuple(entry.get("arms") or ())
        return Curves(y=str(entry.get("y")), x=str(entry.get("x", "step")), arms=arms, caption=caption)
    return Drawing(name=str(entry.get("name")), draw=_absent, caption=caption) if kind == "Drawing" else None


def _absent(_result: TrialResult) -> None:
    raise LookupError("this figure is drawn by the trial's own file, which was not given")


def _drawings(result: TrialResult) -> dict[str, Callable[[Any], Any]]:
    if result.room is None:
        return {}
    engine = importlib.import_module("pullback.lab.engine")
    try:
        study = engine.load_study(result.room, result.name)
    except RuntimeError:  # the room or the study is gone: its evidence stays readable
        return {}
    return {figure.name: figure.draw for figure in study.figures if isinstance(figure, Drawing)}


def draw_all(result: TrialResult, figures: Sequence[Figure], prefix: str) -> list[Picture]:
    """Draw figures for a page.

    Args:
        result: the trial.
        figures: what to draw.
        prefix: starts the identifiers of every drawing, unique in the page.

    Returns:
        The pictures, without those for which nothing was logged.
    """
    drawn = [_draw(result, figure, f"{prefix}-f{index}") for index, figure in enumerate(figures)]
    return [picture for picture in drawn if picture is not None]


def _draw(result: TrialResult, figure: Figure, prefix: str) -> Picture | None:
    if isinstance(figure, PairedSeeds):
        caption = figure.caption or (
            "Every point is one run; a faint line joins the runs of one seed, a bar is the mean of an arm."
        )
        return both(
            lambda w: paired_seeds(result, figure.metric, width=w), prefix, _seeds_alt(result), caption
        )
    if isinstance(figure, Curves):
        name = clean(figure.y).replace("_", " ")
        alt = f"Curves of {name} against {clean(figure.x)} for every arm."
        caption = (
            figure.caption
            or f"{name[:1].upper()}{name[1:]}: faint lines are single seeds, bold lines their means."
        )
        return both(
            lambda w: curves(result, figure.y, x=figure.x, arms=figure.arms, width=w), prefix, alt, caption
        )
    caption = clean_block(figure.caption, 600)
    try:
        with style():
            drawing = figure.draw(result)
        svg = to_svg(drawing, prefix=prefix, label=clean(figure.caption or figure.name, 300))
    except (
        Exception
    ) as error:  # a study's own drawing may fail in any way; the page says so instead of vanishing
        why = clean(f"{type(error).__name__}: {error}", 300)
        return Picture(caption=caption, error=f"The figure {clean(figure.name)} could not be drawn. {why}")
    return Picture(wide=Markup(svg), caption=caption, alt=clean(figure.caption or figure.name, 300))


def both(draw: Callable[[float], Any], prefix: str, alt: str, caption: str = "") -> Picture | None:
    """A built-in figure in its wide and its narrow version.

    Args:
        draw: gives the figure for a width in inches, or None when there is nothing to draw.
        prefix: starts the identifiers.
        alt: alternative text.
        caption: text below.

    Returns:
        The picture, or None.
    """
    wide, narrow = draw(WIDE), draw(NARROW)
    if wide is None or narrow is None:
        return None
    # Every name in the SVG is escaped by its writer and only drawing elements are kept: safe as markup.
    return Picture(
        wide=Markup(to_svg(wide, prefix=f"{prefix}w", label=alt)),
        narrow=Markup(to_svg(narrow, prefix=f"{prefix}n", label=alt)),
        caption=clean_block(caption, 600),
        alt=alt,
    )


def _seeds_alt(result: TrialResult) -> str:
    unit, parts = unit_of(result), []
    for arm in result.arms:
        values = list(result.scores(arm.name).values())
        if values:
            mean = sum(values) / len(values)
            parts.append(f"{clean(arm.name)} {number(mean, unit)} on average over {len(values)} seeds")
    return "Points per seed: " + "; ".join(parts) + "."


def forest_picture(result: TrialResult, prefix: str) -> Picture | None:
    """All comparisons with intervals, if there are at least two.

    Args:
        result: the trial.
        prefix: starts the identifiers.

    Returns:
        The picture, or None.
    """
    if len(result.comparisons) < 2:
        return None
    alt = f"Differences with 95 per cent intervals of {len(result.comparisons)} comparisons, as in the table below."
    caption = "Paired differences with 95 % intervals. Dashed marks are margins fixed beforehand."
    return both(lambda w: forest(result, width=w), f"{prefix}-forest", alt, caption)


def tuning_picture(result: TrialResult, prefix: str) -> Picture | None:
    """Score against each tuned hyperparameter, if anything was tuned.

    Args:
        result: the trial.
        prefix: starts the identifiers.

    Returns:
        The picture, or None.
    """
    alt = "Score on the tuning seeds against each hyperparameter of each arm; the chosen point is ringed."
    return both(lambda w: tuning_scatter(result, width=w), f"{prefix}-tune", alt, alt)


def overview_picture(results: Sequence[tuple[str, TrialResult]]) -> Picture | None:
    """The main comparisons of all rooms, if there are at least two.

    Args:
        results: name and main trial of each room.

    Returns:
        The picture, or None.
    """
    rows: list[tuple[str, Comparison]] = [(n, c) for n, r in results if (c := main_comparison(r)) is not None]
    if len(rows) < 2:
        return None
    alt = (
        "Standardised effect with interval of every method, right is better; the table below has the numbers."
    )
    caption = (
        "Main comparison of every method, in standard deviations of its paired difference, with "
        "95\N{NO-BREAK SPACE}% intervals."
    )
    return both(lambda w: overview(rows, width=w), "all", alt, caption)
