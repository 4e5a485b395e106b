"""One base class per kind of component.

Every base carries ``kind``, its name, and ``refuses``, a mapping from check id to reason for the parts of the
kind's contract that a member declares it cannot meet. ``Aggregator`` needs the extra ``torchjd`` and is
imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pullback.core.kinds.field import Field
from pullback.core.kinds.layer import Layer
from pullback.core.kinds.learner import Learner
from pullback.core.kinds.objective import Objective
from pullback.core.kinds.optimizer import Optimizer
from pullback.core.kinds.probe import Probe
from pullback.core.kinds.recompute import Recompute
from pullback.core.kinds.search import Search, SearchResult
from pullback.core.kinds.signal import Signal
from pullback.core.kinds.transform import StepBatch, Transform

if TYPE_CHECKING:
    from pullback.core.kinds.aggregator import Aggregator

__all__ = [
    "Aggregator",
    "Field",
    "Layer",
    "Learner",
    "Objective",
    "Optimizer",
    "Probe",
    "Recompute",
    "Search",
    "SearchResult",
    "Signal",
    "StepBatch",
    "Transform",
]


def __getattr__(name: str) -> Any:
    if name == "Aggregator":
        from pullback.core.kinds.aggregator import Aggregator

        return Aggregator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
