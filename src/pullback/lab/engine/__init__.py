"""The engine: it runs the cells of a trial once each, keeps every outcome, and says what follows from them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pullback.lab.engine.cells import Cell as Cell
    from pullback.lab.engine.cells import cell_key as cell_key
    from pullback.lab.engine.errors import Interrupted as Interrupted
    from pullback.lab.engine.errors import TrialError as TrialError
    from pullback.lab.engine.events import CellFinished as CellFinished
    from pullback.lab.engine.events import Event as Event
    from pullback.lab.engine.events import Finished as Finished
    from pullback.lab.engine.events import LeakChecked as LeakChecked
    from pullback.lab.engine.events import Started as Started
    from pullback.lab.engine.executors import Executor as Executor
    from pullback.lab.engine.executors import LocalExecutor as LocalExecutor
    from pullback.lab.engine.executors import make_executor as make_executor
    from pullback.lab.engine.reference import StudyRef as StudyRef
    from pullback.lab.engine.reference import load_study as load_study
    from pullback.lab.engine.reference import studies_of as studies_of
    from pullback.lab.engine.run import run_trial as run_trial
    from pullback.lab.engine.run import tune_trial as tune_trial
    from pullback.lab.tuning import Tuned as Tuned

_HOMES = {
    "pullback.lab.engine.cells": ("Cell", "cell_key"),
    "pullback.lab.engine.errors": ("Interrupted", "TrialError"),
    "pullback.lab.engine.events": ("CellFinished", "Event", "Finished", "LeakChecked", "Started"),
    "pullback.lab.engine.executors": ("Executor", "LocalExecutor", "make_executor"),
    "pullback.lab.engine.reference": ("StudyRef", "load_study", "studies_of"),
    "pullback.lab.engine.run": ("run_trial", "tune_trial"),
    "pullback.lab.tuning": ("Tuned",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    # Loaded on first use: a worker that needs one module of the engine must not import all of it.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pullback.lab.engine' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
