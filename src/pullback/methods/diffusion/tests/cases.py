"""The components of the room, as their contract needs them."""

from __future__ import annotations

from pullback.methods.diffusion import Diffusion
from pullback.testing import Case

CASES: tuple[Case, ...] = (
    Case(
        name="Diffusion",
        kind="transform",
        build=lambda: Diffusion(scale=0.5),
        neutral=lambda: Diffusion(scale=1.0),
        bad=(lambda: Diffusion(scale=-1.0),),
    ),
)
