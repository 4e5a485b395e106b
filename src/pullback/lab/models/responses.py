"""Prompts with responses as tokens: which tokens the loss is over, batches of them, and controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.core.streams import generator


@dataclass(frozen=True)
class Response:
    """A prompt and what follows it.

    Args:
        tokens: int64 [t], the prompt and then the response.
        scored: bool [t], the tokens whose prediction counts; never the first.
    """

    tokens: Tensor
    scored: Tensor

    @classmethod
    def of(cls, prompt: Sequence[int], response: Sequence[int]) -> Response:
        """A response that is scored in full. Both are tokenised apart, so that no token spans their border.

        Raises:
            ValueError: if one of them is empty.
        """
        if not len(prompt) or not len(response):
            raise ValueError(
                f"prompt and response must hold tokens, got {len(prompt)} and {len(response)}. Give both a text."
            )
        tokens = torch.tensor([*prompt, *response], dtype=torch.int64)
        return cls(tokens, torch.arange(len(tokens)) >= len(prompt))

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    def thinned(self, count: int, stream: torch.Generator) -> Response:
        """The same tokens, with at most ``count`` of the scored ones, drawn at random."""
        places = self.scored.nonzero().flatten()
        chosen = places[torch.randperm(len(places), generator=stream)[:count]]
        return Response(self.tokens, torch.zeros_like(self.scored).index_fill(0, chosen, True))

    def over(self, text: Tensor, stream: torch.Generator) -> Response:
        """A random piece of a text [n] in the place of all tokens; the same places are scored."""
        start = int(torch.randint(len(text) - len(self.tokens) + 1, (1,), generator=stream))
        return Response(text[start : start + len(self.tokens)], self.scored)


def padded(responses: Sequence[Response]) -> tuple[Tensor, Tensor]:
    """Tokens and scored places [n, longest]; what is added at the ends is token 0 and is not scored."""
    tokens, scored = (
        torch.nn.utils.rnn.pad_sequence([getattr(r, name) for r in responses], batch_first=True)
        for name in ("tokens", "scored")
    )
    return tokens, scored


def derangement(
    count: int, seed: int, alike: Callable[[int, int], bool] = lambda one, other: one == other
) -> list[int]:
    """A random order in which nothing keeps its place or gets something alike.

    Args:
        count: how many.
        seed: of the order.
        alike: whether two may not be exchanged.

    Raises:
        ValueError: if none was found in 1,000 attempts.
    """
    for attempt in range(1000):
        order = torch.randperm(count, generator=generator("derangement", seed, attempt)).tolist()
        # Those that clash change places with random others, which is far quicker than a wholly new order.
        for round_ in range(50):
            clashes = [i for i, other in enumerate(order) if i == other or alike(i, other)]
            if not clashes:
                return order
            partners = torch.randint(
                count, (len(clashes),), generator=generator("exchange", seed, attempt, round_)
            )
            for i, j in zip(clashes, partners.tolist(), strict=True):
                order[i], order[j] = order[j], order[i]
    raise ValueError(f"count must allow an order without fixed points, got {count}. Give more that differ.")
