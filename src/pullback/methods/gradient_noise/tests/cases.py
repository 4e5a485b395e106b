"""The components of the room, as their contract needs them."""

from __future__ import annotations

from pullback.methods.gradient_noise import GradientNoise
from pullback.testing import Case

CASES: tuple[Case, ...] = (
    Case(
        name="GradientNoise",
        kind="transform",
        build=lambda: GradientNoise(eta=0.1, seed=3),
        neutral=lambda: GradientNoise(eta=0.0),
        bad=(
            lambda: GradientNoise(eta=-0.1),
            lambda: GradientNoise(gamma=float("nan")),
            lambda: GradientNoise(schedule="anealed"),  # ty: ignore[invalid-argument-type]
            lambda: GradientNoise(seed=0.5),  # ty: ignore[invalid-argument-type]
        ),
    ),
    Case(
        name="GradientNoise[constant]",
        kind="transform",
        build=lambda: GradientNoise(eta=0.1, schedule="constant", seed=3),
        neutral=lambda: GradientNoise(eta=0.0, schedule="constant"),
    ),
    Case(
        name="GradientNoise[callable]",
        kind="transform",
        build=lambda: GradientNoise(eta=0.1, schedule=lambda t: 1.0 / (1 + t), seed=3, record=True),
        neutral=lambda: GradientNoise(eta=0.1, schedule=lambda t: 0.0),
    ),
)
