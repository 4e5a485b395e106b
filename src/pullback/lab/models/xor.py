"""Many single layers that learn XOR at once: weights are stacked over initialisations, sizes and copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.streams import generator

SIZES = (1, 4, 16)  # features of a bank
HIDDEN = (1, 3, 7)  # hidden units of the perceptron with as many parameters
INITS = ("uniform", "normal")

Draw: TypeAlias = Callable[..., Tensor]
Logits: TypeAlias = Callable[[Tensor], Tensor]
"""Logits [members, 4, 2] of inputs [4, 2]."""


def drawn(seed: int, copies: int, *size: int, part: str, fan_in: int = 0) -> Tensor:
    """First weights [inits * sizes * copies, *size]: uniform(0, 1) and normal, or torch's own with ``fan_in``."""
    stream = generator(f"xor-{part}", seed)
    shape = (len(SIZES) * copies, *size)
    halves = torch.rand(shape, generator=stream), torch.randn(shape, generator=stream)
    if fan_in:
        halves = tuple((2 * torch.rand(shape, generator=stream) - 1) / fan_in**0.5 for _ in INITS)
    return torch.cat(halves)


def masked(sizes: tuple[int, ...], members: int) -> Tensor:
    """Ones at the units that a network has [members, largest size]."""
    rows = torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)
    copies = members // (len(INITS) * len(sizes))
    return rows.float().repeat_interleave(copies, 0).repeat(len(INITS), 1)


def bank(draw: Draw) -> Tensor:
    """Features [members, 16, 2]; those that a network lacks are zero: they are in no set, and stay so."""
    full = draw(max(SIZES), 2, part="bank")
    return full * masked(SIZES, len(full)).unsqueeze(2)


def rival(kind: str, draw: Draw) -> tuple[list[Tensor], Logits]:
    """Parameters and logits of a ``linear`` layer, a perceptron ``mlp``, or scores without gates (``bilinear``)."""
    if kind == "linear":
        weight, bias = draw(2, 2, part="weight", fan_in=2), draw(1, 2, part="bias", fan_in=2)
        return [weight, bias], lambda x: x @ weight + bias
    if kind == "bilinear":
        features, prototypes = bank(draw), draw(2, 2, part="prototypes")
        return [features, prototypes], lambda x: (x @ features.mT) @ (prototypes @ features.mT).mT
    wide, shift = draw(2, 7, part="wide", fan_in=2), draw(1, 7, part="shift", fan_in=2)
    back, offset = draw(7, 2, part="back", fan_in=7), draw(1, 2, part="offset", fan_in=7)
    mask = masked(HIDDEN, len(wide)).unsqueeze(1)
    return [wide, shift, back, offset], lambda x: ((x @ wide + shift).relu() * mask) @ back + offset


def train(parameters: Sequence[Tensor], logits: Logits, steps: int, lr: float, copies: int) -> Tensor:
    """Adam on the cross-entropy of the four inputs, every network by itself.

    Returns:
        The share of networks that give all four their class [inits, sizes], in float64.
    """
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=lr, fused=True)
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    sign = torch.tensor([-1.0, 1.0, 1.0, -1.0])  # of the second class over the first

    def margins() -> Tensor:
        scores = logits(x)
        return sign * (scores[..., 1] - scores[..., 0])

    for _ in range(steps):
        loss = F.softplus(-margins()).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (margins() > 0).all(1).double().view(len(INITS), len(SIZES), copies).mean(2)
