"""A small causal character model around any blocks, its data and its scores, for studies of architecture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.streams import generator
from pullback.lab.data import python_topics


@dataclass(frozen=True)
class Characters:
    """Parts of a text as ids, and the number of symbols."""

    train: Tensor
    validation: Tensor
    test: Tensor
    symbols: int


@cache
def characters() -> Characters:
    """The topics of Python's documentation; read once per process."""
    topics = python_topics()
    return Characters(topics.train, topics.validation, topics.test, len(topics.vocabulary))


class CharacterModel(nn.Module):
    """Embedding of symbols and positions, blocks, a final norm and a head.

    Weights with two axes are drawn by streams of their own, one for each position among the parameters of
    that kind, so that models which differ in their norms alone start equal.

    Args:
        symbols: size of the vocabulary.
        context: longest sequence.
        blocks: maps [batch, context, width] to the same.
        width: of the residual stream.
        first: applied to the embedding (a norm, or an identity).
        last: applied before the head.
        seed: of the initial weights.
        std: of embeddings and weights; those of linear layers are divided by sqrt(fan in) instead when it
            is None.
    """

    def __init__(
        self,
        symbols: int,
        context: int,
        blocks: Iterable[nn.Module],
        width: int,
        *,
        first: nn.Module,
        last: nn.Module,
        seed: int,
        std: float | None = 0.02,
    ) -> None:
        super().__init__()
        self.symbol, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.first, self.blocks, self.last = first, nn.ModuleList(blocks), last
        self.head = nn.Linear(width, symbols, bias=False)
        matrices = [p for p in self.parameters() if p.dim() == 2]
        with torch.no_grad():
            for index, p in enumerate(matrices):
                spread = 1 / math.sqrt(p.shape[1]) if std is None else std
                p.normal_(0.0, spread, generator=generator("characters", seed, index))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, t, symbols] of the next symbol of tokens [batch, t]."""
        x = self.first(self.symbol(tokens) + self.position.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def windows(text: Tensor, batch: int, context: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of random windows, tokens and their successors, each [batch, context]; the same for every arm."""
    starts = torch.randint(len(text) - context, (batch,), generator=generator("windows", seed, step))
    rows = text[starts[:, None] + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


def next_symbol_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def text_loss(model: nn.Module, text: Tensor, context: int, *, chunk: int = 64) -> float:
    """Mean loss over a text cut into windows that do not overlap; its end may be left out."""
    count = (len(text) - 1) // context
    inputs, targets = (text[i : i + count * context].view(count, context) for i in (0, 1))
    losses = [
        float(next_symbol_loss(model, x, y)) * len(x)
        for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True)
    ]
    return sum(losses) / count
