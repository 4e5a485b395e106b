"""What the contract needs to know of this room's component."""

from __future__ import annotations

from pullback.methods.gcond import ConflictResolver
from pullback.testing import Case

INVARIANCES = frozenset({"permutation", "scale", "row_space"})

CASES = (
    Case(
        name="ConflictResolver",
        kind="aggregator",
        build=ConflictResolver,
        invariances=INVARIANCES,
        bad=(
            lambda: ConflictResolver(thresholds=(0.0, -0.5, -0.8)),
            lambda: ConflictResolver(max_iters=0),
            lambda: ConflictResolver(arbiter_weights=(0.0, 0.0)),
            lambda: ConflictResolver(norm_cap=-1.0),
            lambda: ConflictResolver(dominance_window=-1),
        ),
    ),
    Case(
        name="ConflictResolver[legacy]",
        kind="aggregator",
        build=lambda: ConflictResolver(smooth=False, max_iters=None),
        invariances=INVARIANCES,
    ),
    Case(
        name="ConflictResolver[off]",
        kind="aggregator",
        build=lambda: ConflictResolver(thresholds=(-1.0, -1.0, -1.0)),
        invariances=INVARIANCES,
    ),
)
