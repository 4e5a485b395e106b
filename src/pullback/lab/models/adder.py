"""A small decoder with separate query, key, value and output projections that reads English and learns to add."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.streams import generator
from pullback.lab.data import python_topics
from pullback.lab.data.additions import FORMATS, Addition, additions
from pullback.lab.models.characters import CharacterModel, next_symbol_loss, windows
from pullback.lab.models.responses import Response, padded

CONTEXT = 256


class Block(nn.Module):
    """Causal attention and a perceptron, each normalised before; ``q``, ``k``, ``v``, ``o`` are layers of their own.

    Args:
        width: of the residual stream.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, t, width] to the same."""
        y = self.norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass(frozen=True)
class School:
    """How the decoder is made and trained.

    Args:
        steps: of training.
        layers: number of blocks.
        width: of the residual stream.
        heads: of attention.
        rows: additions of each format in a batch.
        texts: windows of English in a batch.
        window: characters of each.
        lr: largest learning rate of AdamW; it rises for 40 steps and falls to zero in the last two fifths.
        held: problems that are not trained on.
    """

    steps: int = 450
    layers: int = 6
    width: int = 64
    heads: int = 4
    rows: int = 12
    texts: int = 4
    window: int = 96
    lr: float = 4e-3
    held: int = 100


@dataclass(frozen=True)
class Schooled:
    """The trained decoder of a seed, in evaluation mode, and the problems that it has not seen."""

    model: CharacterModel
    held: list[Addition]


def answer_of(problem: Addition, form: str) -> Response:
    """Prompt and right response of one format as characters."""
    encode = python_topics().encode
    return Response.of(encode(problem.prompt(form)).tolist(), encode(problem.response(form)).tolist())


def decoder(school: School, seed: int) -> CharacterModel:
    """The decoder before training."""
    return CharacterModel(
        len(python_topics().vocabulary),
        CONTEXT,
        [Block(school.width, school.heads) for _ in range(school.layers)],
        school.width,
        first=nn.Identity(),
        last=nn.LayerNorm(school.width),
        seed=seed,
        std=None,
    )


@lru_cache(maxsize=16)
def schooled(school: School, seed: int) -> Schooled:
    """A pure function of its arguments, kept so that a process trains the decoder of a seed once for all arms."""
    text = python_topics().train
    model = decoder(school, seed)
    pool, held = additions(school.held, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=school.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 40, (1 - step / school.steps) / 0.4)
    )
    for step in range(school.steps):
        optimizer.zero_grad()
        for place, form in enumerate(FORMATS):
            draw = torch.randint(len(pool), (school.rows,), generator=generator("school", seed, step, place))
            _additions_loss(model, [answer_of(pool[chosen], form) for chosen in draw.tolist()]).backward()
        next_symbol_loss(model, *windows(text, school.texts, school.window, seed, step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
    return Schooled(model.eval().requires_grad_(False), held)


def _additions_loss(model: nn.Module, answers: list[Response]) -> Tensor:
    """Mean over all scored characters."""
    tokens, scored = padded(answers)
    return F.cross_entropy(model(tokens[:, :-1])[scored[:, 1:]], tokens[scored])


@torch.no_grad()
def accuracy(model: nn.Module, problems: list[Addition], form: str) -> float:
    """Share of problems to which the model, taking the likeliest character each time, writes the right response.

    It writes it exactly if each of its characters is the likeliest one after those before it, which one pass tells.
    """
    tokens, scored = padded([answer_of(problem, form) for problem in problems])
    right = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
    return float((right | ~scored[:, 1:]).all(1).float().mean())
