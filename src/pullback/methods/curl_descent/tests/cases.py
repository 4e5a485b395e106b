"""The components of the room, as their contract needs them."""

from __future__ import annotations

import torch

from pullback.methods.curl_descent import RuleFlip
from pullback.testing import Case

CASES: tuple[Case, ...] = (
    Case(
        name="RuleFlip",
        kind="transform",
        build=lambda: RuleFlip(fraction=0.3),
        neutral=lambda: RuleFlip(fraction=0.0),
        bad=(
            lambda: RuleFlip(fraction=1.5),
            lambda: RuleFlip(fraction=float("nan")),
            lambda: RuleFlip(fraction="half"),  # ty: ignore[invalid-argument-type]
            lambda: RuleFlip([], fraction=0.1),
            lambda: RuleFlip(fraction=0.1, side="left"),  # ty: ignore[invalid-argument-type]
            lambda: RuleFlip(fraction=0.1, which="last"),  # ty: ignore[invalid-argument-type]
            lambda: RuleFlip(mask=torch.tensor([1.0, 0.5])),
            lambda: RuleFlip(torch.nn.LayerNorm(3), fraction=0.1),
            lambda: RuleFlip(torch.nn.Linear(3, 2), mask=torch.ones(2)),
        ),
    ),
    Case(
        name="RuleFlip[rows]",
        kind="transform",
        build=lambda: RuleFlip("*", fraction=0.5, side="post"),
        neutral=lambda: RuleFlip("*", fraction=0.0, side="post"),
    ),
    Case(
        name="RuleFlip[random]",
        kind="transform",
        build=lambda: RuleFlip(fraction=0.4, which="random", seed=3),
        neutral=lambda: RuleFlip(fraction=0.01, which="random"),
    ),
)
