"""Small classifiers of 28 x 28 digits with dropout, whose gradients are attacked; untrained, as in the papers.

Every dropout is a module of its own, attention is written out: an attack that puts masks in the place of dropout must
be able to reach each of them. Weights are drawn by the seed alone, so that victims which differ only in their dropout
rate share them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from pullback.core.streams import stream_seed

ARCHITECTURES = ("mlp", "vit", "cnn", "resnet")


def victim(architecture: str, p: float, seed: int, *, width: int = 0) -> nn.Module:
    """A fresh classifier [n, 1, 28, 28] -> [n, 10].

    Args:
        architecture: one of `ARCHITECTURES`.
        p: rate of every dropout layer.
        seed: decides the weights.
        width: units of a layer, channels or width of a token; 0 takes the architecture's own.

    Raises:
        ValueError: if there is no such architecture.
    """
    builders = {"mlp": (mlp, 256), "vit": (ViT, 64), "cnn": (cnn, 12), "resnet": (ResNet, 12)}
    if architecture not in builders:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {architecture!r}. Choose one.")
    build, own = builders[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("victim", seed))
        return build(p, width or own)


class AlwaysDropout(nn.Module):
    """Dropout that draws new masks in every mode, as in an attacker's network that was left in training mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of x."""
        return nn.functional.dropout(x, self.p, training=True)


def always_drop_(net: nn.Module) -> int:
    """Exchange every dropout layer for one that never stops drawing; gives their number."""
    found = [(parent, name) for parent in net.modules() for name, child in parent.named_children()
             if isinstance(child, nn.Dropout)]  # fmt: skip
    for parent, name in found:
        setattr(parent, name, AlwaysDropout(getattr(parent, name).p))
    return len(found)


def mlp(p: float, width: int = 256, layers: int = 3) -> nn.Sequential:
    """Hidden layers without biases, each followed by GELU and dropout.

    Every row of the first layer's gradient at a batch of one is a multiple of the input: this victim leaks at once,
    whatever is dropped behind it.
    """
    sizes = [784, *[width] * layers]
    hidden = [
        nn.Sequential(nn.Linear(a, b, bias=False), nn.GELU(), nn.Dropout(p)) for a, b in pairwise(sizes)
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10, bias=False))


def cnn(p: float, width: int = 12) -> nn.Sequential:
    """Three convolutions, each followed by GELU and dropout, and a linear layer: a LeNet as attacks use it."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Dropout(p),
        nn.Conv2d(width, width, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Dropout(p),
        nn.Conv2d(width, width, 5, padding=2),
        nn.GELU(),
        nn.Dropout(p),
        nn.Flatten(),
        nn.Linear(49 * width, 10),
    )


class Attention(nn.Module):
    """Self-attention with dropout on the probabilities and on the output; no bias on queries, keys and values."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.drop_probabilities, self.drop_output = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """Mixed tokens [n, t, width] of x [n, t, width]."""
        n, t, width = x.shape
        query, key, value = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(2, 3) * (1.0 / math.sqrt(width / self.heads))
        probabilities = self.drop_probabilities(scores.softmax(-1))
        return self.drop_output(self.out((probabilities @ value).transpose(1, 2).reshape(n, t, width)))


class EncoderBlock(nn.Module):
    """Attention and a perceptron, each normalised before and added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int, p: float) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, p)
        self.perceptron = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(p), nn.Linear(hidden, width), nn.Dropout(p)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, t, width]."""
        x = x + self.attention(self.norm(x))
        return x + self.perceptron(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer that reads its class token; dropout at the five places of the paper.

    Args:
        p: dropout rate.
        width: of a token.
        patch: side of a patch in pixels; 28 is a multiple of it.
        blocks: how many.
        heads: of attention.
    """

    def __init__(self, p: float, width: int = 64, patch: int = 7, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patch = patch
        tokens = (28 // patch) ** 2 + 1
        self.embed = nn.Linear(patch * patch, width)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, tokens, width))
        self.drop_embedding = nn.Dropout(p)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, 2 * width, p) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        n, side = x.shape[0], x.shape[-1] // self.patch
        patches = x.view(n, side, self.patch, side, self.patch).transpose(2, 3).reshape(n, side * side, -1)
        tokens = torch.cat([self.cls.expand(n, -1, -1), self.embed(patches)], 1) + self.position
        return self.head(self.norm(self.blocks(self.drop_embedding(tokens)))[:, 0])


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a shortcut, and dropout after the activation that follows the sum."""

    def __init__(self, inputs: int, outputs: int, p: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the sides of x [n, inputs, h, w]."""
        y = nn.functional.gelu(self.norm(self.conv(x)))
        return self.drop(nn.functional.gelu(self.norm2(self.conv2(y)) + self.shortcut(x)))


class ResNet(nn.Module):
    """A convolution, two residual blocks, and a linear layer on all places; batch normalisation, dropout after each."""

    def __init__(self, p: float, width: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 5, stride=2, padding=2, bias=False)
        self.norm, self.drop = nn.BatchNorm2d(width), nn.Dropout(p)
        self.blocks = nn.Sequential(
            ResidualBlock(width, 2 * width, p), ResidualBlock(2 * width, 2 * width, p)
        )
        self.head = nn.Linear(16 * 2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        y = self.drop(nn.functional.gelu(self.norm(self.conv(x))))
        return self.head(self.blocks(y).flatten(1))
