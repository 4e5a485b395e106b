"""What attacks on gradients gave back: images by arm, and what privacy costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback.lab.figures.helpers import image_grid
from pullback.lab.figures.style import INK, WIDE, arm_colours, arm_markers, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pullback.lab.result import TrialResult


def reconstructions(
    result: TrialResult,
    rows: Mapping[str, tuple[str, str]],
    *,
    metric: str | None = None,
    limit: int = 8,
) -> Figure:
    """One row of images for each arm, one column for each seed, and the score of every image above it.

    Args:
        result: whose runs have logged images [n, height, width], uint8; the first of each run is shown.
        rows: name at the left -> (arm, name of its array); rows of arms that did not run are left out.
        metric: whose value stands above the images of an arm; None takes the primary one. Arrays called ``original``
            have none.
        limit: seeds at most.

    Raises:
        ValueError: if no run has logged such an image.
    """
    shown = {
        row: {c.seed: c.arrays[array][0] for c in result.cells if c.arm == arm and array in c.arrays}
        for row, (arm, array) in rows.items()
    }
    shown = {row: found for row, found in shown.items() if found}
    seeds = sorted(set.intersection(*(set(found) for found in shown.values())))[:limit] if shown else []
    if not seeds:
        raise ValueError(
            f"rows must name arms whose runs logged images, got {dict(rows)}. Log them in a run."
        )
    titles = list[str]()
    for row in shown:
        arm, array = rows[row]
        scores = {} if array == "original" else result.scores(arm, metric)
        titles += [f"{scores[s]:.0f}" if math.isfinite(scores.get(s, math.nan)) else "" for s in seeds]
    width = min(WIDE, 0.5 + 0.95 * len(seeds))
    images = [found[seed] for found in shown.values() for seed in seeds]
    return image_grid(images, titles, columns=len(seeds), row_titles=tuple(shown), width=width)


def audit_pictures(report: Any, *, limit: int = 8) -> Figure:
    """The pictures of a privacy audit: the originals, what the attack found, and what needs no gradient.

    Args:
        report: of `pullback.audit`, of images [batch, channels, height, width]. Grey values run from the smallest
            to the largest entry of the originals; channels other than 3 are averaged.
        limit: images at most.

    Returns:
        A row for the originals and one for each score, with the PSNR in dB above every image.

    Raises:
        ValueError: if the inputs are no images.
    """
    truth = report.truth
    if truth.dim() != 4:
        raise ValueError(
            f"report must be of images [batch, channels, height, width], got inputs of shape {tuple(truth.shape)}. "
            "Print it instead."
        )
    low, high = float(truth.min()), float(truth.max())
    rows = {"original": truth, **{score.name: score.images for score in report.scores}}
    images, titles = list[np.ndarray](), [""] * min(limit, len(truth))
    for tensor in rows.values():
        unit = ((tensor[:limit].detach().cpu().double() - low) / ((high - low) or 1.0)).clamp(0, 1).numpy()
        images += [each.transpose(1, 2, 0) if len(each) == 3 else each.mean(0) for each in unit]
    for score in report.scores:
        titles += [f"{value:.0f}" for value in score.psnr[:limit].tolist()]
    columns = min(limit, len(truth))
    width = min(WIDE, 1.6 + 0.95 * columns)
    return image_grid(images, titles, columns=columns, row_titles=tuple(rows), width=width)


def trade_off(result: TrialResult, name: str, *, xlabel: str, ylabel: str) -> Figure:
    """A line for every arm through the means of its settings, and every seed as a faint point.

    Args:
        result: whose runs have logged the array ``name``: [settings, 3], setting (0 is none), cost and exposure.
        name: of the array.
        xlabel: of the cost.
        ylabel: of the exposure.
    """
    figure, (ax,) = panels(1, height=3.8)
    colours, marks = arm_colours(result.arms), arm_markers(result.arms)
    with style():
        for arm in result.arms:
            runs = [c.arrays[name] for c in result.cells if c.arm == arm.name and name in c.arrays]
            if not runs:
                continue
            stack = np.stack(runs).astype(float)
            colour, mean = colours[arm.name], stack.mean(0)
            ax.plot(stack[..., 1].ravel(), stack[..., 2].ravel(), ".", color=colour, alpha=0.25, markersize=4)
            ax.plot(mean[:, 1], mean[:, 2], marker=marks[arm.name], color=colour, label=arm.name)
            for setting, x, y in mean[mean[:, 0] != 0]:  # all lines begin at no defence
                text = f"{setting:.3g}"
                ax.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colour)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.tick_params(colors=INK)
        ax.grid()
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
