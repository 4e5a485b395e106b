"""Completion of half-hidden digits: images, masks, a small autoencoder and two losses that disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from pullback.core.span import inner_products
from pullback.core.streams import generator
from pullback.lab.data.images import mnist

SIDE = 14
"""Pixels along an image: MNIST, 2x2 pooled."""
PATCH = 2
HIDDEN = 37
"""Hidden patches of 49: three quarters."""
WINDOW = 7
"""Pixels along a window of the structural similarity."""


@dataclass(frozen=True)
class Images:
    """Flat images.

    Args:
        x: ``[n, 196]`` in [0, 1].
        mean: mean of the training pixels.
        std: their standard deviation.
    """

    x: Tensor
    mean: float
    std: float

    def take(self, rows: Tensor | slice) -> Images:
        """Some of the images."""
        return Images(self.x[rows], self.mean, self.std)


@dataclass(frozen=True)
class Batch:
    """Images and their masks ``[n, 196]`` (ones at hidden pixels)."""

    images: Images
    mask: Tensor

    def halves(self) -> list[Batch]:
        """The first and the second half."""
        middle = len(self.mask) // 2
        cuts = (slice(0, middle), slice(middle, None))
        return [Batch(self.images.take(cut), self.mask[cut]) for cut in cuts]

    def losses(self, net: nn.Module) -> dict[str, Tensor]:
        """Both losses of the batch; see `completion_losses`."""
        return completion_losses(net, self.images, self.mask)


@cache
def digit_parts() -> tuple[Images, Images, Images]:
    """7,000 digits for training, 1,000 for selection, 2,000 for the test; read once per process."""
    pooled = nn.functional.avg_pool2d(mnist().images.float()[:, None] / 255, 2)
    x = pooled.reshape(len(pooled), SIDE * SIDE)
    whole = Images(x, float(x[:7000].mean()), float(x[:7000].std()))
    return whole.take(slice(0, 7000)), whole.take(slice(7000, 8000)), whole.take(slice(8000, 10000))


@cache
def _patch_of_pixel() -> Tensor:
    rows = torch.arange(SIDE) // PATCH
    return (rows[:, None] * (SIDE // PATCH) + rows).flatten()


@cache
def _windows() -> Tensor:
    """Means over all windows as a matrix ``[196, 64]``."""
    eye = torch.eye(SIDE * SIDE).reshape(-1, 1, SIDE, SIDE)
    return nn.functional.avg_pool2d(eye, WINDOW, stride=1).reshape(SIDE * SIDE, -1)


def masks(count: int, stream: torch.Generator) -> Tensor:
    """Ones at hidden pixels.

    Args:
        count: number of images.
        stream: where the choice of patches comes from.

    Returns:
        ``[count, 196]``; 37 of the 49 patches of each image are hidden.
    """
    ranks = torch.rand(count, (SIDE // PATCH) ** 2, generator=stream).argsort(1).argsort(1)
    return (ranks < HIDDEN).float()[:, _patch_of_pixel()]


def autoencoder(*, norm: bool = False) -> nn.Sequential:
    """Perceptron 392-256-256-196 with GELU, optionally batch norm; initialised from the global generator."""
    layers: list[nn.Module] = []
    for inputs in (2 * SIDE * SIDE, 256):
        layers += [nn.Linear(inputs, 256), *([nn.BatchNorm1d(256)] if norm else []), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(256, SIDE * SIDE))


def completion_losses(net: nn.Module, images: Images, mask: Tensor) -> dict[str, Tensor]:
    """Both losses of a batch.

    Args:
        net: maps visible z-scored pixels and the mask ``[n, 392]`` to z-scored pixels ``[n, 196]``.
        images: the batch.
        mask: ones at hidden pixels ``[n, 196]``.

    Returns:
        ``l1``: mean absolute error of hidden z-scored pixels; ``ssim``: one minus the structural similarity of the
        completed image in [0, 1] with the true one.
    """
    z = (images.x - images.mean) / images.std
    out = net(torch.cat([z * (1 - mask), mask], 1))
    completed = torch.lerp(images.x, out * images.std + images.mean, mask)
    return {"l1": ((out - z).abs() * mask).sum() / mask.sum(), "ssim": 1.0 - ssim(completed, images.x)}


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity over all uniform 7x7 windows (Wang et al. 2004, eq. 13; data range 1).

    Args:
        a: images ``[n, 196]``.
        b: as many others.

    Returns:
        0-dim mean over windows and images.
    """
    c1, c2 = 0.01**2, 0.03**2
    ma, mb, aa, bb, ab = (torch.cat([a, b, a * a, b * b, a * b]) @ _windows()).split(len(a))
    product, squares = ma * mb, ma * ma + mb * mb
    similar = (2 * product + c1) * (2 * (ab - product) + c2)
    return (similar / ((squares + c1) * (aa + bb - squares + c2))).mean()


# --- training ------------------------------------------------------------------------------------------------------


def warm_cosine(progress: float) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1]: 10 % of linear warm-up, then a cosine down to 0."""
    return min(progress / 0.1, 0.5 * (1.0 + math.cos(math.pi * max(0.0, progress - 0.1) / 0.9)))


def epoch_rows(images: int, updates: int, size: int, seed: int) -> Tensor:
    """Rows of the images of every update, epoch after epoch ``[updates, size]``; in the same order for every size."""
    epochs = -(-updates * size // images)
    order = [
        torch.randperm(images, generator=generator("masked-order", seed, epoch)) for epoch in range(epochs)
    ]
    return torch.cat(order)[: updates * size].view(updates, size)


@torch.no_grad()
def quality(net: nn.Module, part: Images, seed: int) -> dict[str, float]:
    """Both losses on a part, with masks fixed by the seed; batch norm by its running statistics."""
    training = net.training
    mask = masks(len(part.x), generator("masked-test-masks", seed))
    found = completion_losses(net.eval(), part, mask)
    net.train(training)
    return {name: float(value) for name, value in found.items()}


def cosine_of_losses(net: nn.Module, batch: Batch) -> float:
    """Cosine of the gradients of the two losses on a batch."""
    rows = []
    for name, loss in batch.losses(net).items():
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=name == "l1")
        rows.append(torch.cat([g.flatten() for g in grads]))
    return inner_products([torch.stack(rows)])[1][0][1]
