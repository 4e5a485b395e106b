"""Heads that are compared with one another, a small network of digits to put them on, and what trains and scores it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.streams import generator
from pullback.lab.data import mnist


def digit_trunk(width: int = 36) -> nn.Sequential:
    """Features [n, width], of both signs, of digits [n, 1, 14, 14]: two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(144, width),
    )


class Bilinear(nn.Module):
    """Scores ``(x bank') . (p_j bank')`` of rank ``features``: a product of similarities without any gate.

    The map is linear in x and has as many parameters as a layer that compares on shared features.

    Args:
        inputs: width of x.
        outputs: number of classes.
        features: rank.
        prototypes: a weight [outputs, inputs] to tie; None draws one.
    """

    def __init__(
        self, inputs: int, outputs: int, features: int, prototypes: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.bank = nn.Parameter(torch.empty(features, inputs).uniform_(-bound, bound))
        own = torch.empty(outputs, inputs).uniform_(-bound, bound)
        self.prototypes = nn.Parameter(own) if prototypes is None else prototypes

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., outputs] of x [..., inputs]."""
        return F.linear(F.linear(x, self.bank), F.linear(self.prototypes, self.bank))


def perceptron_head(inputs: int, outputs: int, parameters: int) -> nn.Sequential:
    """One hidden layer, as wide as the given number of parameters allows (rounded)."""
    hidden = max(1, round((parameters - outputs) / (inputs + outputs + 1)))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class LinearRows(nn.Module):
    """A linear layer whose rows a module gives, for example images seen through the trunk.

    Args:
        rows: a module with ``rows() -> Tensor`` [outputs, inputs].
    """

    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.prototypes: Any = rows

    def forward(self, x: Tensor) -> Tensor:
        """Scores [n, rows]."""
        return F.linear(x, self.prototypes.rows())


class Refined(nn.Module):
    """A hidden layer beside the identity in front of a tied linear head: the parameters of a bank spent otherwise."""

    def __init__(self, width: int, hidden: int, weight: nn.Parameter) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., vocabulary]."""
        return F.linear(x + self.back(F.gelu(self.wide(x))), self.weight)


# --- data, training, scores --------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """10,000 digits [n, 1, 14, 14] with mean 0 and variance 1, and their labels; read once per process."""
    found = mnist()
    x = F.avg_pool2d(found.images.float().unsqueeze(1), 2)
    return (x - x.mean()) / x.std(), found.labels


def small_digits(low: int, high: int, train: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Digits low to high - 1 with labels from 0: of the first 6,000 at most ``train``, the next 1,000, the rest."""
    x, y = digits()
    keep = (y >= low) & (y < high)
    cuts = [(a, b) for a, b in ((0, 6000), (6000, 7000), (7000, 10000))]
    first, second, third = ((x[a:b][keep[a:b]], y[a:b][keep[a:b]] - low) for a, b in cuts)
    return (first[0][:train], first[1][:train]), second, third


def fit(net: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int, lr: float, seed: int) -> None:
    """Adam on cross-entropy; the order of the data depends on the seed alone."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    per_epoch = max(1, len(y) // batch)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(y), generator=generator("order", seed, step // per_epoch))
        rows = order[step % per_epoch * batch :][:batch]
        loss = F.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Fraction whose class has the highest score."""
    return float((net(part[0]).argmax(1) == part[1]).double().mean())


def contexts(text: Tensor, length: int) -> Tensor:
    """The text as rows of ``length + 1`` words that overlap by one."""
    return text[: (len(text) - 1) // length * length + 1].unfold(0, length + 1, length)


@torch.no_grad()
def held_out(model: nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy in nats a word; its exponential is the perplexity."""
    losses = [
        F.cross_entropy(model(r[:, :-1]).flatten(0, 1), r[:, 1:].flatten(), reduction="sum")
        for r in rows.split(32)
    ]
    return float(torch.stack(losses).sum() / (rows.shape[0] * (rows.shape[1] - 1)))


def fit_words(
    model: nn.Module,
    text: Tensor,
    context: int,
    size: tuple[int, int],
    lr: float,
    seed: int,
    note: Callable[[str, float, int], None],
) -> None:
    """Adam with a linear decay on next-word cross-entropy.

    Args:
        model: maps ids [n, context] to logits [n, context, vocabulary].
        text: ids [words].
        context: words of an example.
        size: steps, and examples of a step; which ones depends on the seed alone.
        lr: first learning rate.
        seed: of the examples.
        note: called with ``"loss"``, its value and the step, every 50 steps.
    """
    steps, batch = size
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    starts = torch.randint(len(text) - context - 1, (steps, batch), generator=generator("words", seed))
    offsets = torch.arange(context + 1)
    for step in range(steps):
        rows = text[starts[step].unsqueeze(1) + offsets]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            note("loss", float(loss.detach()), step + 1)
