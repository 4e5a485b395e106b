"""Toys for generative models: a ring of Gaussians, small digits, a perceptron with times and labels, distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.gaussian_mixture import GaussianMixture
from pullback.core.streams import generator
from pullback.lab.data import digits8x8

CLASSES = 10
NONE = CLASSES
"""The label that means no label."""


def ring(modes: int = 8, radius: float = 1.5, std: float = 0.15) -> GaussianMixture:
    """Equal Gaussians on a circle in the plane."""
    angles = torch.arange(modes) * (2 * math.pi / modes)
    return GaussianMixture(radius * torch.stack([angles.cos(), angles.sin()], 1), std)


class Perceptron(nn.Module):
    """Three hidden SiLU layers on the state, Fourier features of one or more times, and a label's embedding.

    Args:
        size: entries of a state.
        width: hidden units.
        times: how many times the network is called with.
        labels: whether it takes labels 0 to 9 and `NONE`.
        seed: of its initial weights, torch's own distribution.
    """

    def __init__(
        self, size: int, width: int = 128, *, times: int = 1, labels: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        waves = torch.tensor([1.0, 2.0, 4.0]) * (math.pi / 2)
        self.waves: Tensor
        self.register_buffer("waves", waves, persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator("perceptron", seed).initial_seed() % 2**63)
            self.first = nn.Linear(size + times * (1 + 2 * len(waves)), width)
            self.second, self.third = nn.Linear(width, width), nn.Linear(width, width)
            self.last = nn.Linear(width, size)
            self.embedding = nn.Embedding(CLASSES + 1, width) if labels else None

    def forward(self, x: Tensor, *times: Tensor, y: Tensor | None = None) -> Tensor:
        """Outputs [batch, size] for states [batch, size], times [batch] and labels [batch]."""
        parts = [x]
        for time in times:
            phase = time.unsqueeze(1) * self.waves
            parts += [time.unsqueeze(1), phase.sin(), phase.cos()]
        hidden = self.first(torch.cat(parts, 1))
        if self.embedding is not None and y is not None:
            hidden = hidden + self.embedding(y)
        hidden = nn.functional.silu(self.second(nn.functional.silu(hidden)))
        return self.last(nn.functional.silu(self.third(hidden)))


def energy_distance(first: Tensor, second: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| between two samples [n, D] and [m, D], never negative."""
    within = torch.cdist(first, first).mean() + torch.cdist(second, second).mean()
    return max(float(2 * torch.cdist(first, second).mean() - within), 0.0)


def closeness(samples: Tensor, real: Tensor) -> float:
    """-log10 of the energy distance between two samples."""
    return -math.log10(max(energy_distance(samples, real), 1e-6))


def train(
    model: Any,
    data: Callable[[torch.Generator, int], tuple[Tensor, dict[str, Tensor]]],
    steps: int,
    lr: float,
    draws: torch.Generator,
    *,
    batch: int = 256,
    **options: Any,
) -> None:
    """Adam on ``model.loss`` with a rate that falls linearly to zero.

    Args:
        model: has parameters and ``loss(x0, generator=..., **cond, **options)``.
        data: ``data(draws, batch)`` gives examples and conditions.
        steps: number of steps.
        lr: first rate.
        draws: where data, times and noise come from.
        batch: examples of a step.
        **options: of the loss.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x0, cond = data(draws, batch)
        optimizer.zero_grad()
        model.loss(x0, generator=draws, **cond, **options).backward()
        optimizer.step()


def ring_batch(draws: torch.Generator, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Fresh points of the ring."""
    return ring().sample(batch, generator=draws), {}


def digit_batch(draws: torch.Generator, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Digits of training and their labels."""
    digits = small_digits()[0]
    rows = torch.randint(len(digits.y), (batch,), generator=draws)
    return digits.x[rows], {"y": digits.y[rows]}


@dataclass(frozen=True)
class SmallDigits:
    """Digits of 8 x 8 pixels as rows [n, 64] in [-1, 1] with labels [n]."""

    x: Tensor
    y: Tensor


@cache
def small_digits() -> tuple[SmallDigits, SmallDigits, SmallDigits]:
    """1,000 digits for training, 297 for selection, 500 for the test; read once per process."""
    digits = digits8x8()
    x = digits.images.flatten(1).float() / 8 - 1
    parts = [slice(0, 1000), slice(1000, 1297), slice(1297, 1797)]
    train, validation, test = (SmallDigits(x[part], digits.labels[part]) for part in parts)
    return train, validation, test


@cache
def digit_judge() -> Any:
    """A support vector machine that has seen the test digits and none of training."""
    from sklearn.svm import SVC

    part = small_digits()[2]
    return SVC(C=10.0, gamma=0.02).fit(part.x.numpy(), part.y.numpy())


def judged(samples: Tensor, labels: Tensor) -> float:
    """Share of samples [n, 64] that the judge takes for the digits they were asked to be."""
    return float((torch.as_tensor(digit_judge().predict(samples.numpy())) == labels).float().mean())


def diversity(samples: Tensor, labels: Tensor) -> float:
    """Mean distance between two samples of one label, averaged over labels."""
    found = []
    for label in labels.unique():
        rows = samples[labels == label]
        found.append(torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1)))
    return float(torch.stack(found).mean())
