"""Projection of features to the plane, for pictures."""

from __future__ import annotations

import numpy as np


def principal_plane(features: np.ndarray) -> np.ndarray:
    """Coordinates of the first two principal components, in float64.

    An axis has no direction of its own: each is turned so that its largest entry is positive.

    Args:
        features: [n, d] with n, d >= 2.

    Returns:
        Float64 array [n, 2].

    Raises:
        ValueError: if there are fewer than two rows or columns.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or min(x.shape) < 2:
        raise ValueError(f"features must be of shape (n >= 2, d >= 2), got {x.shape}. Flatten each example.")
    centred = x - x.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), axis=1))
    return centred @ axes.T
