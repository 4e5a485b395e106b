"""The lab: declare a paired trial, run it over paired seeds, and keep evidence that can be read again.

The names below are loaded on first use, so that a declaration costs no import of torch, scipy or matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pullback.lab.declare import Arms as Arms
    from pullback.lab.declare import Choice as Choice
    from pullback.lab.declare import Claim as Claim
    from pullback.lab.declare import Curves as Curves
    from pullback.lab.declare import Drawing as Drawing
    from pullback.lab.declare import Equivalent as Equivalent
    from pullback.lab.declare import Greater as Greater
    from pullback.lab.declare import Hyperparameters as Hyperparameters
    from pullback.lab.declare import Log as Log
    from pullback.lab.declare import LogUniform as LogUniform
    from pullback.lab.declare import Metric as Metric
    from pullback.lab.declare import PairedSeeds as PairedSeeds
    from pullback.lab.declare import PaperResult as PaperResult
    from pullback.lab.declare import Run as Run
    from pullback.lab.declare import Scalar as Scalar
    from pullback.lab.declare import Seeds as Seeds
    from pullback.lab.declare import Study as Study
    from pullback.lab.declare import Trial as Trial
    from pullback.lab.declare import Tune as Tune
    from pullback.lab.declare import Uniform as Uniform
    from pullback.lab.engine import LocalExecutor as LocalExecutor
    from pullback.lab.engine import StudyRef as StudyRef
    from pullback.lab.engine import run_trial as run_trial
    from pullback.lab.engine import tune_trial as tune_trial
    from pullback.lab.result import TrialResult as TrialResult
    from pullback.lab.store import Store as Store
    from pullback.lab.trial import load_trial as load_trial

_HOMES = {
    "pullback.lab.declare": (
        "Arms",
        "Choice",
        "Claim",
        "Curves",
        "Drawing",
        "Equivalent",
        "Greater",
        "Hyperparameters",
        "Log",
        "LogUniform",
        "Metric",
        "PairedSeeds",
        "PaperResult",
        "Run",
        "Scalar",
        "Seeds",
        "Study",
        "Trial",
        "Tune",
        "Uniform",
    ),
    "pullback.lab.engine": ("LocalExecutor", "StudyRef", "run_trial", "tune_trial"),
    "pullback.lab.result": ("TrialResult",),
    "pullback.lab.store": ("Store",),
    "pullback.lab.trial": ("load_trial",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pullback.lab' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
