"""What a running trial tells its caller, for progress bars and logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pullback.lab.result import CellResult

Phase: TypeAlias = Literal["run", "tune"]


@dataclass(frozen=True)
class Started:
    """A trial begins: ``cached`` of its ``total`` cells are in the store already."""

    label: str
    title: str
    phase: Phase
    size: str
    total: int
    cached: int
    workers: int


@dataclass(frozen=True)
class CellFinished:
    """One more cell is in the store.

    ``elapsed`` and ``remaining`` are seconds (``remaining`` is None while nothing is known); ``scores`` holds the mean
    of the decisive metric by arm over the cells that are finished.
    """

    label: str
    phase: Phase
    cell: CellResult
    done: int
    total: int
    elapsed: float
    remaining: float | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class LeakChecked:
    """The first finished cell was run again in a used worker and gave the same numbers bit for bit."""

    label: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Finished:
    """All cells are in the store; ``ran`` of them were run now, in ``seconds``."""

    label: str
    phase: Phase
    ran: int
    seconds: float


Event: TypeAlias = Started | CellFinished | LeakChecked | Finished
OnEvent: TypeAlias = Callable[[Event], None]
