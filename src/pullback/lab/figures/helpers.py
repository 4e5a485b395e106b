"""Helpers with which a study draws its own figure in a few lines: image grids, scatters, decision regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import ListedColormap

from pullback.lab.figures.style import CLASSES, INK, MUTED, WIDE, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _image(array: object) -> np.ndarray:
    image = np.asarray(array)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (3, 4)):
        raise ValueError(
            f"images must be [height, width] or [height, width, 3], got shape {list(image.shape)}. "
            "Move the channels last."
        )
    return image if image.dtype == np.uint8 else np.clip(image.astype(np.float64), 0.0, 1.0)


def image_grid(
    images: Sequence[object] | np.ndarray,
    titles: Sequence[str] = (),
    *,
    columns: int = 8,
    row_titles: Sequence[str] = (),
    width: float = WIDE,
) -> Figure:
    """Images in rows of ``columns``.

    Args:
        images: arrays [height, width] (grey) or [height, width, 3]; uint8 in [0, 255] or floats in [0, 1].
        titles: text above each image; shorter than ``images`` leaves the rest without.
        columns: images per row.
        row_titles: text at the left of each row.
        width: inches of the whole figure.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no image or one has another shape.
    """
    shown = [_image(image) for image in images]
    if not shown:
        raise ValueError("images must hold at least one image, got none. Log the array before drawing it.")
    across = min(columns, len(shown))
    rows = -(-len(shown) // across)
    ratio = max(image.shape[0] / image.shape[1] for image in shown)
    extra = 0.2 * rows if titles else 0.0
    figure, axes = panels(
        len(shown), columns=across, width=width, height=width / across * ratio * rows + extra
    )
    with style():
        for index, (ax, image) in enumerate(zip(axes, shown, strict=True)):
            white = 255.0 if image.dtype == np.uint8 else 1.0
            ax.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0.0, vmax=white)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if index < len(titles):
                ax.set_title(titles[index], fontsize=8.5, color=MUTED, pad=3)
            if index % across == 0 and index // across < len(row_titles):
                ax.set_ylabel(row_titles[index // across], color=INK)
        figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    return figure


def scatter_2d(
    points: np.ndarray,
    labels: np.ndarray,
    *,
    names: Sequence[str] | Mapping[int, str] | None = None,
    title: str = "",
    ax: Axes | None = None,
    size: float = 9.0,
    legend: bool = True,
    colours: Sequence[str] = CLASSES,
) -> Figure:
    """Points in the plane, one colour per label.

    Args:
        points: coordinates [n, 2].
        labels: integers [n].
        names: what each label means, for the legend.
        title: text above the axes.
        ax: axes to draw into (see `panels`); None makes a new figure.
        size: area of a point in square points.
        legend: whether the names are listed.
        colours: one colour per label, in order of the labels' values.

    Returns:
        The figure of the axes.

    Raises:
        ValueError: if the shapes do not fit.
    """
    xy, group = _points(points, labels)
    if ax is None:
        _, (ax,) = panels(1, width=WIDE * 0.6, height=3.2)
    order = np.random.default_rng(0).permutation(len(xy))  # no label hides another by being drawn last
    values = np.unique(group)
    with style():
        paint = {int(value): colours[i % len(colours)] for i, value in enumerate(values)}
        ax.scatter(*xy[order].T, s=size, c=[paint[int(v)] for v in group[order]], alpha=0.75, linewidths=0)
        _bare(ax, title)
        if legend and names is not None:
            for value in values:
                ax.scatter([], [], s=22, c=paint[int(value)], label=_name(names, int(value)), linewidths=0)
            ax.legend(loc="upper left", bbox_to_anchor=(0, -0.02), ncols=min(5, len(values)), borderaxespad=0,
                      handletextpad=0.2, columnspacing=1.0)  # fmt: skip
    return _root(ax)


def decision_regions(
    predict: Callable[[np.ndarray], np.ndarray] | np.ndarray,
    points: np.ndarray,
    labels: np.ndarray,
    *,
    bounds: tuple[float, float, float, float] | None = None,
    names: Sequence[str] | Mapping[int, str] | None = None,
    title: str = "",
    ax: Axes | None = None,
    resolution: int = 160,
    colours: Sequence[str] = CLASSES,
) -> Figure:
    """The plane coloured by predicted class, with the points on top.

    Args:
        predict: maps coordinates [m, 2] to class indices [m]; or the class indices of a grid [height, width]
            that was computed in the run (first row at the lowest y) and covers ``bounds``.
        points: coordinates [n, 2].
        labels: integers [n].
        bounds: (x low, x high, y low, y high); None takes the points' range with a margin.
        names: what each label means, for the legend.
        title: text above the axes.
        ax: axes to draw into; None makes a new figure.
        resolution: grid cells along each side when ``predict`` is a function.
        colours: one colour per class index.

    Returns:
        The figure of the axes.

    Raises:
        ValueError: if the shapes do not fit.
    """
    xy, group = _points(points, labels)
    if bounds is None:
        low, high = xy.min(axis=0), xy.max(axis=0)
        pad = 0.08 * (high - low) + 1e-9
        bounds = (low[0] - pad[0], high[0] + pad[0], low[1] - pad[1], high[1] + pad[1])
    if callable(predict):
        x, y = np.linspace(*bounds[:2], resolution), np.linspace(*bounds[2:], resolution)
        plane = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        grid = np.asarray(predict(plane)).reshape(resolution, resolution)
    else:
        grid = np.asarray(predict)
    if grid.ndim != 2:
        raise ValueError(f"predict as an array must be [height, width], got shape {list(grid.shape)}.")
    if ax is None:
        _, (ax,) = panels(1, width=WIDE * 0.6, height=3.2)
    classes = max(int(grid.max()), int(group.max())) + 1
    paint = [colours[i % len(colours)] for i in range(classes)]
    with style():
        ax.imshow(
            grid,
            origin="lower",
            extent=bounds,
            cmap=ListedColormap(paint),
            vmin=-0.5,
            vmax=classes - 0.5,
            alpha=0.22,
            aspect="auto",
        )
        for value in np.unique(group):
            label = None if names is None else _name(names, int(value))
            chosen = xy[group == value]
            ax.scatter(*chosen.T, s=13, c=paint[int(value)], linewidths=0.4, edgecolors="white", label=label)
        _bare(ax, title)
        ax.set(xlim=bounds[:2], ylim=bounds[2:])
        if names is not None:
            ax.legend(
                loc="upper left", bbox_to_anchor=(0, -0.02), ncols=4, borderaxespad=0, handletextpad=0.2
            )
    return _root(ax)


def _points(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    xy, group = np.asarray(points, dtype=np.float64), np.asarray(labels).ravel()
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) == 0:
        raise ValueError(
            f"points must be [n, 2] with n >= 1, got shape {list(xy.shape)}. Project to two columns."
        )
    if len(group) != len(xy):
        raise ValueError(f"labels must have one entry per point, got {len(group)} for {len(xy)} points.")
    return xy, group.astype(np.int64)


def _name(names: Sequence[str] | Mapping[int, str], value: int) -> str:
    if isinstance(names, Mapping):
        return names.get(value, str(value))
    return names[value] if 0 <= value < len(names) else str(value)


def _root(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("ax must belong to a figure, got axes that were removed. Use panels().")
    return figure


def _bare(ax: Axes, title: str) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)
