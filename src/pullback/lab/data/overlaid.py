"""Two digits on one canvas: three tasks (name the first, name the second, draw the first) over one input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.lab.data.images import mnist

SIDE, OFFSET = 14, 4
CANVAS = SIDE + OFFSET

Part: TypeAlias = Literal["train", "validation", "test"]
_ROWS = {"train": (0, 7000), "validation": (7000, 8000), "test": (8000, 10000)}


@dataclass(frozen=True)
class Pairs:
    """Overlaid pairs of digits.

    Args:
        x: canvases [n, 324] in [0, 1], row by row.
        first: digit of the upper left image [n].
        second: digit of the lower right image [n].
        image: the upper left image alone [n, 196] in [0, 1].
    """

    x: Tensor
    first: Tensor
    second: Tensor
    image: Tensor


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Images [10000, 14, 14] in [0, 1], pooled from MNIST, and labels."""
    digits = mnist()
    images = F.avg_pool2d(digits.images.unsqueeze(1).float() / 255.0, 2)
    return images.squeeze(1).contiguous(), digits.labels


def overlaid_pairs(part: Part, n: int, generator: torch.Generator) -> Pairs:
    """Draw pairs of digits of one part, each laid over the other four pixels down and right (pixelwise maximum).

    Args:
        part: of which 7,000, 1,000 or 2,000 digits; no digit is in two parts.
        n: number of pairs.
        generator: chooses the digits, both independently and with replacement.

    Returns:
        The pairs.

    Raises:
        ValueError: if there is no such part or ``n`` is negative.
    """
    if part not in _ROWS or n < 0:
        raise ValueError(f"part must be one of {', '.join(_ROWS)} and n >= 0, got {part!r} and {n}.")
    images, labels = _digits()
    start, stop = _ROWS[part]
    one, other = torch.randint(start, stop, (2, n), generator=generator)
    canvas = torch.zeros(n, CANVAS, CANVAS)
    canvas[:, :SIDE, :SIDE] = images[one]
    corner = canvas[:, OFFSET:, OFFSET:]
    torch.maximum(corner, images[other], out=corner)
    return Pairs(canvas.flatten(1), labels[one], labels[other], images[one].flatten(1))
