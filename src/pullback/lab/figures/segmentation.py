"""Drawings of segmentations: a slice with what is in it and what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import to_rgb

from pullback.lab.figures.helpers import image_grid
from pullback.lab.figures.style import CLASSES, arm_colours, panels
from pullback.lab.result import TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overlay(image: np.ndarray, labels: np.ndarray, *, strength: float = 0.55) -> np.ndarray:
    """A grey image with every label above 0 painted in the colour of its class.

    Args:
        image: uint8 [height, width].
        labels: integers [height, width]; 0 stays grey.
        strength: share of the colour in [0, 1].

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: if the shapes differ.
    """
    if image.ndim != 2 or image.shape != labels.shape:
        raise ValueError(
            f"labels must be [height, width] as the image is, got {list(labels.shape)} for {list(image.shape)}. "
            "Cut the same slice from both."
        )
    painted = np.repeat(image[..., None].astype(np.float64), 3, axis=-1)
    for label in range(1, int(labels.max(initial=0)) + 1):
        colour = 255.0 * np.array(to_rgb(CLASSES[(label - 1) % len(CLASSES)]))
        here = labels == label
        painted[here] = (1.0 - strength) * painted[here] + strength * colour
    return painted.round().astype(np.uint8)


def segmentations(image: np.ndarray, labelled: Mapping[str, np.ndarray]) -> Figure:
    """Slices, one in a row: bare, then under each labelling.

    Args:
        image: uint8 [slices, height, width].
        labelled: integers of the same shape by title, in the order in which they are shown.

    Returns:
        The figure.

    Raises:
        ValueError: if the shapes differ.
    """
    shown = [
        picture
        for index, bare in enumerate(image)
        for picture in (bare, *(overlay(bare, labels[index]) for labels in labelled.values()))
    ]
    return image_grid(shown, ("input", *labelled), columns=1 + len(labelled))


def predictions(result: TrialResult, arms: Sequence[str]) -> Figure:
    """Slices with the truth and the prediction of some arms, from the arrays ``input``, ``truth``, ``predicted``.

    Args:
        result: the trial.
        arms: whose predictions are shown, as far as they were kept.

    Returns:
        The figure.

    Raises:
        LookupError: if no arm kept its prediction.
    """
    kept = {arm: array for arm in arms if (array := result.array(arm, "predicted")) is not None}
    first = next(iter(kept), "")
    image, truth = result.array(first, "input"), result.array(first, "truth")
    if image is None or truth is None:
        raise LookupError("no arm kept an input, a truth and a prediction")
    return segmentations(image, {"truth": truth, **kept})


def bytes_by_depth(result: TrialResult) -> Figure:
    """Bytes kept for the backward pass against blocks: lines by formula, points as counted (array ``depths``)."""
    figure, (ax,) = panels(1, height=3.4)
    colours = arm_colours(result.arms)
    for arm in result.arms:
        rows = result.array(arm.name, "depths")
        if rows is None:
            continue
        blocks, formula, counted = rows.T
        ax.plot(
            blocks, formula / 2**20, color=colours[arm.name], label=f"{arm.name}: formula, points counted"
        )
        ax.plot(blocks, counted / 2**20, "o", color=colours[arm.name], markersize=5)
    ax.set(xlabel="blocks of every stage", ylabel="MiB kept for the backward pass", yscale="log")
    ax.legend()
    return figure
