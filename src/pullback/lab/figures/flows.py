"""Figures of generative models: order of solvers, bent trajectories, samples in the plane, guidance, small images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pullback.lab.figures.helpers import image_grid
from pullback.lab.figures.style import MUTED, arm_colours, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pullback.lab.result import TrialResult


def mean_array(result: TrialResult, arm: str, name: str) -> np.ndarray | None:
    """The mean over seeds of an array that every run logged, or None."""
    found = [cell.arrays[name] for cell in result.cells if cell.arm == arm and name in cell.arrays]
    return np.mean(found, 0) if found else None


def solver_errors(result: TrialResult, calls: tuple[int, ...], paths: tuple[str, ...]) -> Figure:
    """Digits right, -log10 of the error, against calls of the model; arrays ``errors`` [paths, calls], a panel each."""
    figure, axes = panels(len(paths), columns=len(paths), height=3.6, share=True)
    colours = arm_colours(result.arms)
    for arm in result.arms:
        errors = mean_array(result, arm.name, "errors")
        if errors is None:
            continue
        style = "--" if arm.name.endswith("uniform") else "-"
        for ax, row in zip(axes, -np.log10(np.maximum(errors, 1e-15)), strict=True):
            ax.plot(range(len(calls)), row, style, marker=".", color=colours[arm.name], label=arm.name)
    for ax, path in zip(axes, paths, strict=True):
        ax.set(title=path, xlabel="calls of the model")
        ax.set_xticks(range(len(calls)), [str(count) for count in calls])
    axes[0].set(ylabel="-log10 of the mean error")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def trajectories(result: TrialResult, arm: str) -> Figure:
    """Ways of samples in the plane beside straight lines between their ends; array ``trajectory`` [times, n, 2]."""
    figure, (ax,) = panels(1, height=3.4)
    states = result.array(arm, "trajectory")
    if states is not None:
        colours = arm_colours(result.arms)
        ax.plot(states[[0, -1], :, 0], states[[0, -1], :, 1], ":", color=MUTED, linewidth=0.8)
        ax.plot(states[..., 0], states[..., 1], color=colours[arm], linewidth=1.0)
        ax.plot(states[-1, :, 0], states[-1, :, 1], ".", color=colours[arm])
    ax.set(aspect="equal")
    return figure


def planar_samples(result: TrialResult, name: str = "samples") -> Figure:
    """Samples in the plane, one panel for each arm that logged ``name`` [n, 2]."""
    found = [(arm.name, result.array(arm.name, name)) for arm in result.arms]
    shown = [(arm, points) for arm, points in found if points is not None]
    figure, axes = panels(max(len(shown), 1), columns=3, height=2.4 * max(-(-len(shown) // 3), 1))
    for ax, (arm, points) in zip(axes, shown, strict=False):
        ax.plot(points[:, 0], points[:, 1], ".", markersize=2, color=arm_colours(result.arms)[arm])
        ax.set(title=arm, xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", xticks=[], yticks=[])
    return figure


def trade_off(result: TrialResult, x: str, y: str) -> Figure:
    """One metric against another, every seed a point and every arm a colour with its mean."""
    figure, (ax,) = panels(1, height=3.2)
    colours = arm_colours(result.arms)
    for arm in result.arms:
        across, up = (list(result.scores(arm.name, metric).values()) for metric in (x, y))
        if across:
            ax.plot(across, up, ".", color=colours[arm.name], alpha=0.4)
            ax.plot(np.mean(across), np.mean(up), "o", color=colours[arm.name], label=arm.name)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(fontsize=8)
    return figure


def image_rows(result: TrialResult, name: str = "images") -> Figure:
    """Small images of every arm in one mosaic each; arrays ``name`` [rows, columns, height, width], uint8."""
    mosaics, titles = [], []
    for arm in result.arms:
        images = result.array(arm.name, name)
        if images is not None:
            apart = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=90)  # a grey frame
            rows, columns, height, width = apart.shape
            mosaics.append(apart.transpose(0, 2, 1, 3).reshape(rows * height, columns * width))
            titles.append(arm.name)
    return image_grid(mosaics, titles, columns=2)
