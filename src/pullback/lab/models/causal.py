"""A small causal transformer with a cache, for studies that sample."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn

Cache: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of each layer, [n, heads, positions, width of a head]."""


class _Block(nn.Module):
    """Attention and a perceptron, each normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.keyvalue = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None, last: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output at the ``last`` positions of x [n, t, width], and the cache with x added."""
        n, t, width = x.shape
        y = self.norm(x)
        key, value = self.keyvalue(y).view(n, t, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        x, y = x[:, t - last :], y[:, t - last :]
        query = self.query(y).view(n, last, self.heads, -1).transpose(1, 2)
        scores = query @ key.transpose(2, 3) / math.sqrt(width / self.heads)
        if last > 1:
            ahead = torch.ones(last, key.shape[2], dtype=torch.bool, device=x.device)
            scores = scores.masked_fill(ahead.triu(key.shape[2] - last + 1), -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(n, last, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x)), (key, value)


class CausalTransformer(nn.Module):
    """Next-symbol logits of short sequences; initialised by its own generator.

    Args:
        symbols: size of the vocabulary.
        positions: longest sequence.
        width: of the residual stream.
        heads: of attention.
        layers: number of blocks.
        generator: source of the initial weights.
    """

    def __init__(
        self, symbols: int, positions: int, width: int, heads: int, layers: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.symbol, self.position = nn.Embedding(symbols, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    p.normal_(
                        0.0,
                        1.0 / math.sqrt(width if "position" in name or "symbol" in name else p.shape[1]),
                        generator=generator,
                    )
                elif "bias" in name:
                    p.zero_()

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Logits [n, last, symbols] at the last positions of tokens [n, t] (None: at all)."""
        return self.extend(tokens, None, last)[0]

    def extend(
        self, tokens: Tensor, cache: Cache | None = None, last: int | None = 1
    ) -> tuple[Tensor, Cache]:
        """Logits at the last positions of tokens [n, t] that follow what the cache holds, and the longer cache."""
        t = tokens.shape[1]
        start = 0 if cache is None else cache[0][0].shape[2]
        x = self.symbol(tokens) + self.position.weight[start : start + t]
        kept = []
        for depth, block in enumerate(self.blocks):
            final = depth == len(self.blocks) - 1
            x, pair = block(x, None if cache is None else cache[depth], (last or t) if final else t)
            kept.append(pair)
        return self.head(self.norm(x)), tuple(kept)
