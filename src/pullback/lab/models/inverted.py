"""Images to be reconstructed from their gradients, what trivial attackers have instead, and scores of a reconstruction.

The last 1,000 digits are victims, the first 9,000 what an attacker may know. Images are standardised; scores are taken
in the range from 0 to 1.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pullback.core.image_quality import psnr, ssim
from pullback.core.streams import generator
from pullback.lab.data import mnist

MEAN, STD = 0.1307, 0.3081
LOW, HIGH = (0.0 - MEAN) / STD, (1.0 - MEAN) / STD
"""Black and white of standardised images."""
VICTIMS = 1000
EXACT = 60.0
"""dB from which on a reconstruction is exact: a picture rounded to its 256 grey values lies at 59."""


@cache
def _images() -> tuple[Tensor, Tensor]:
    found = mnist()
    return (found.images.float().unsqueeze(1) / 255 - MEAN) / STD, found.labels


def reference() -> tuple[Tensor, Tensor]:
    """Images [9000, 1, 28, 28] that no victim owns, and their labels."""
    x, y = _images()
    return x[:-VICTIMS], y[:-VICTIMS]


def held_images() -> tuple[Tensor, Tensor]:
    """Images [1000, 1, 28, 28] of all victims, and their labels."""
    x, y = _images()
    return x[-VICTIMS:], y[-VICTIMS:]


def private_batch(seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """The victim's images [batch, 1, 28, 28] and labels; labels of a batch are distinct.

    Raises:
        ValueError: if the batch has no or more than ten images.
    """
    if not 1 <= batch <= 10:
        raise ValueError(f"batch must lie in 1..10, got {batch}. There are ten labels.")
    x, y = held_images()
    rows, seen = list[int](), set[int]()
    for row in torch.randperm(len(y), generator=generator("private-images", seed)).tolist():
        if int(y[row]) not in seen:
            rows.append(row)
            seen.add(int(y[row]))
        if len(rows) == batch:
            break
    return x[rows], y[rows]


# --- attackers that need no gradient -------------------------------------------------------------------------


def constant_images(x: Tensor) -> Tensor:
    """For each image the grey [n, 1, 28, 28] with the least squared error: no constant image can score more."""
    return x.mean((1, 2, 3), keepdim=True).expand_as(x)


def nearest_images(x: Tensor) -> Tensor:
    """For each image the nearest of the reference: no attacker who hands out reference images can score more."""
    known = reference()[0]
    return known[torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)]


def on_black(direction: Tensor) -> Tensor:
    """The standardised image that is a multiple of ``direction``: most pixels of a digit are black.

    Args:
        direction: any shape; up to length and sign, as the first layer of a perceptron shows its input.
    """
    background = direction.median()
    if not float(background):
        return torch.full_like(direction, LOW, dtype=torch.float32)
    return (direction * (LOW / background)).clamp(LOW, HIGH).float()


# --- scores --------------------------------------------------------------------------------------------------


def decibels(guess: Tensor, x: Tensor) -> float:
    """Mean peak signal-to-noise ratio, at most `EXACT`, of images that lie in one order."""
    return float(psnr(guess, x, data_range=1 / STD).clamp_max(EXACT).mean())


def structure(guess: Tensor, x: Tensor) -> float:
    """Mean structural similarity."""
    return float(ssim(guess, x, data_range=1 / STD).mean())


def identified(guess: Tensor, x: Tensor, labels: Tensor) -> float:
    """Share of reconstructions that are nearer to their original than to any other victim's image of the same digit.

    There are about a hundred of each digit; whoever guesses is right once in a hundred.
    """
    everyone, digits = held_images()
    right = 0
    for one, own, label in zip(guess, x, labels, strict=True):
        others = everyone[digits == label]
        right += int(
            (others - one).square().flatten(1).sum(1).min() >= (own - one).square().sum() * (1 - 1e-6)
        )
    return right / len(x)


def to_bytes(x: Tensor) -> Tensor:
    """Grey values uint8 [n, 28, 28] of standardised images."""
    return ((x[:, 0] * STD + MEAN).clamp(0, 1) * 255).round().to(torch.uint8)
