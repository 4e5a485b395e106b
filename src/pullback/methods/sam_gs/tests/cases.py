"""The components of the room, as their contract needs them."""

from __future__ import annotations

from typing import Any

from pullback.methods.sam_gs import SAMGS
from pullback.testing import Case

_any: Any = SAMGS  # with arguments of wrong types, which must be refused
_ONE = {"one_task": "a single row is returned as it is, with a warning, which this check takes for an error"}

CASES: tuple[Case, ...] = (
    Case(
        name="SAMGS",
        kind="aggregator",
        build=SAMGS,
        bad=(
            lambda: SAMGS(num_tasks=0),
            lambda: SAMGS(beta1=1.0),
            lambda: SAMGS(beta2=1.0),
            lambda: SAMGS(gamma=-0.1),
            lambda: SAMGS(eps=0.0),
            lambda: SAMGS(max_norm=0.0),
            lambda: SAMGS(max_norm=float("nan")),
            lambda: _any(num_tasks=2.5),
            lambda: _any(variant="printed"),
            lambda: _any(reduction="max"),
            lambda: _any(nonfinite="warn"),
        ),
        refuses=_ONE,
    ),
    Case(
        name="SAMGS[equalise]",
        kind="aggregator",
        build=lambda: SAMGS(gamma=2.0, max_norm=float("inf")),
        invariances=frozenset({"permutation", "scale", "row_space"}),
        refuses=_ONE,
    ),
    Case(name="SAMGS[momentum]", kind="aggregator", build=lambda: SAMGS(gamma=0.0), refuses=_ONE),
    Case(name="SAMGS[paper]", kind="aggregator", build=lambda: SAMGS(variant="paper"), refuses=_ONE),
)
