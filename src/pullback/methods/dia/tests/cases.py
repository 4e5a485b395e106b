"""The components of the room, as their contract needs them."""

from __future__ import annotations

from pullback.methods.dia import Dia
from pullback.testing import Case

CASES: tuple[Case, ...] = (
    Case(
        name="Dia",
        kind="transform",
        build=lambda: Dia(scale=0.5),
        neutral=lambda: Dia(scale=1.0),
        bad=(lambda: Dia(scale=-1.0),),
    ),
)
