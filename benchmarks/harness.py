"""Side-by-side timing: repetitions of all candidates are interleaved, and only ratios are reported."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One ratio of the table: what was timed, against what, and the bound it should keep (None: only shown).

    A row with ``skipped`` holds no ratio but the reason (for example, a peer that is not installed).
    """

    what: str
    against: str
    ratio: float = float("nan")
    bound: float | None = None
    note: str = ""
    skipped: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``over``, ``shown`` (no bound) or ``skipped``."""
        if self.skipped:
            return "skipped"
        if self.bound is None:
            return "shown"
        return "ok" if self.ratio <= self.bound else "over"


def seconds(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every repetition of every candidate, interleaved, after one warm-up call of each.

    ``clock=time.process_time`` leaves out what other processes take, for differences of a few per cent.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, call in candidates.items():
                start = clock()
                call()
                taken[name].append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return taken


def interleaved(candidates: Mapping[str, Callable[[], object]], *, repeats: int = 15) -> dict[str, float]:
    """Median seconds per call of every candidate (see `seconds`)."""
    return {name: statistics.median(values) for name, values in seconds(candidates, repeats=repeats).items()}


def ratio(what: Callable[[], object], against: Callable[[], object], *, repeats: int = 15) -> float:
    """Median over repetitions of the time of ``what`` over the time of ``against``, pair by pair."""
    taken = seconds({"what": what, "against": against}, repeats=repeats)
    return statistics.median(a / b for a, b in zip(taken["what"], taken["against"], strict=True))
