"""The outcome of one trial as plain values: what the store yields, the evidence keeps and the report draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Word = Literal["supported", "refuted", "inconclusive", "not tested"]
Status = Literal["done", "failed", "diverged", "timeout"]


@dataclass(frozen=True)
class CellResult:
    """One training run: its arm, seed, hyperparameters, final metrics and how it ended.

    A run that did not end as ``done`` keeps its ``error`` text and counts with the metric's worst score.
    """

    arm: str
    seed: int
    hp: Mapping[str, Any]
    status: Status
    metrics: Mapping[str, float]
    seconds: float
    key: str
    error: str = ""
    curves: Mapping[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One tested claim: a paired difference in the metric's unit, positive when ``arm`` is better.

    ``low`` and ``high`` bound the paired t interval, ``p`` is the exact sign-flip (or TOST) p value, ``effect`` the
    difference over the standard deviation of differences, ``wins`` the share of seeds in which ``arm`` is better.
    """

    kind: Literal["greater", "equivalent"]
    role: Literal["claim", "rival", "also"]
    arm: str
    than: str
    metric: str
    margin: float
    n: int
    difference: float
    low: float
    high: float
    p: float
    effect: float
    wins: float
    word: Word


@dataclass(frozen=True)
class Verdict:
    """The word on the main claim, the sentence that explains it, and the rival the method reduces to, if any."""

    word: Word
    sentence: str
    reduces_to: str | None = None


@dataclass(frozen=True)
class ArmResult:
    """An arm as it was run: role, hyperparameters and every point of its tuning, best first."""

    name: str
    role: str
    hp: Mapping[str, Any]
    tuning: list[Mapping[str, Any]] = field(default_factory=list)  # {"hp": ..., "score": ..., "seconds": ...}
    at_edge: tuple[str, ...] = ()  # hyperparameters whose best value lies at an edge of its domain


@dataclass(frozen=True)
class TrialResult:
    """Everything that is known after a trial, ready to be stored as JSON, drawn and printed."""

    room: str | None
    name: str
    title: str
    size: str
    claim_hash: str
    code_hash: str
    # primary metric, claim, paper, refuted_if, cannot_test, deviations, seeds, tuning
    declaration: Mapping[str, Any]
    arms: list[ArmResult]
    cells: list[CellResult]
    comparisons: list[Comparison]
    verdict: Verdict
    provenance: Mapping[str, Any]

    def scores(self, arm: str, metric: str | None = None) -> dict[int, float]:
        """Final value of ``metric`` (None: the primary one) by seed.

        A failed run has the worst score; a run that did not return ``metric`` has NaN.
        """
        primary = self.declaration["primary"]
        wanted = metric or primary["name"]
        worst = float(self.declaration["metrics"].get(wanted, {}).get("worst", math.nan))
        return {
            c.seed: float(c.metrics.get(wanted, math.nan)) if c.status == "done" else worst
            for c in self.cells
            if c.arm == arm
        }

    def curve(self, arm: str, name: str) -> dict[int, tuple[list[int], list[float]]]:
        """The logged curve ``name`` of every seed of ``arm`` as (steps, values)."""
        return {c.seed: c.curves[name] for c in self.cells if c.arm == arm and name in c.curves}

    def array(self, arm: str, name: str) -> np.ndarray | None:
        """The logged array ``name`` of the first seed of ``arm`` that has one."""
        return next((c.arrays[name] for c in self.cells if c.arm == arm and name in c.arrays), None)
