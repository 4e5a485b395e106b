"""Prototypes shown as images, and a table of solve rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.helpers import image_grid
from pullback.lab.figures.style import panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pullback.lab.result import TrialResult


def image_rows(rows: Mapping[str, np.ndarray | None]) -> Figure:
    """Rows of images, each with its name at the left; rows without images are left out.

    Args:
        rows: arrays [columns, height, width] by name; floats are scaled to each image's own range.

    Raises:
        ValueError: if no row has images, or rows differ in their number.
    """
    shown = {name: np.asarray(each, dtype=np.float64) for name, each in rows.items() if each is not None}
    if not shown:
        raise ValueError("rows must hold images, got none. Log them in a run before drawing.")
    if len({len(each) for each in shown.values()}) > 1:
        raise ValueError(f"rows must have equal lengths, got {[len(each) for each in shown.values()]}.")
    images = [_stretched(image) for row in shown.values() for image in row]
    return image_grid(images, columns=len(next(iter(shown.values()))), row_titles=tuple(shown))


def _stretched(image: np.ndarray) -> np.ndarray:
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else np.zeros_like(image)


def rate_table(rates: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str = "") -> Figure:
    """A heat map of fractions with the numbers written in.

    Args:
        rates: [rows, columns], in [0, 1]; NaN leaves a field empty.
        rows: names at the left.
        columns: names below.
        label: of the columns' axis.
    """
    figure, (ax,) = panels(1, height=0.32 * len(rows) + 0.9)
    with style():
        ax.imshow(rates, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        for (i, j), rate in np.ndenumerate(rates):
            if np.isfinite(rate):
                ax.text(
                    j,
                    i,
                    f"{rate:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if rate > 0.6 else "black",
                )
        ax.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel=label)
        ax.set_xticklabels(columns)
        ax.set_yticklabels(rows)
        ax.spines[:].set_visible(False)
    return figure


def rate_tables(result: TrialResult, name: str, columns: Sequence[str], label: str = "") -> Figure:
    """`rate_table` with a row for each arm: the mean over seeds of its arrays ``name``, whatever their shape."""
    found = {
        arm.name: [cell.arrays[name] for cell in result.cells if cell.arm == arm.name and name in cell.arrays]
        for arm in result.arms
    }
    rows = {arm: np.mean(arrays, 0).ravel() for arm, arrays in found.items() if arrays}
    return rate_table(np.array(list(rows.values())), list(rows), columns, label)
