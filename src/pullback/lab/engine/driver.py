"""Drive a plan of cells to its end: skip what is finished, run the rest in a good order, write every outcome."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pullback.lab.declare import Metric
from pullback.lab.engine.cells import Cell
from pullback.lab.engine.errors import Interrupted, TrialError
from pullback.lab.engine.events import CellFinished, Finished, LeakChecked, OnEvent, Phase, Started
from pullback.lab.engine.executors import Executor, Task
from pullback.lab.engine.stop import Stop, polite_stop
from pullback.lab.engine.worker import Outcome, where
from pullback.lab.result import CellResult

if TYPE_CHECKING:
    from pullback.lab.store import Store

HOPELESS = 3  # this many runs that raise, and none that does not, end the trial early


@dataclass(frozen=True)
class Plan:
    """What is to be run, for whom.

    Args:
        label: the trial's label.
        title: the trial's title.
        phase: test runs or tuning runs.
        size: the size.
        groups: cells that belong together (one seed of all arms, one point of all seeds); early groups finish first.
        metric: what the running score shows.
        leak_version: key under which the leak check is kept, or None to make none.
        retry_failed: run cells again that failed, diverged or timed out.
        meanwhile: called once in a thread while the driver waits for cells.
    """

    label: str
    title: str
    phase: Phase
    size: str
    groups: Sequence[Sequence[Cell]]
    metric: Metric
    leak_version: str | None = None
    retry_failed: bool = False
    meanwhile: Callable[[], object] | None = None


@dataclass
class Drive:
    """The state of one run of a plan."""

    plan: Plan
    store: Store
    executor: Executor
    on_event: OnEvent
    results: dict[str, CellResult] = field(default_factory=dict)
    pending: list[tuple[int, Cell]] = field(default_factory=list)
    checks: list[Task] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ran: int = 0
    start: float = 0.0

    def run(self) -> tuple[dict[str, CellResult], int, float]:
        """Finish the plan.

        Returns:
            The result of every cell by key, how many were run now, and the wall time in seconds.

        Raises:
            TrialError: if the run function breaks its contract or leaks state.
            Interrupted: after a signal; everything that is finished is in the store.
        """
        self.start = time.perf_counter()
        self.store.acquire()
        try:
            self._recall()
            with polite_stop() as stop, contextlib.closing(self.executor.run(self._next, stop)) as outcomes:
                for task, outcome in outcomes:
                    self._take(task, outcome, stop)
            if stop.signum is not None and (self.pending or self.missing()):
                raise Interrupted(stop.signum, self._kept())
        finally:
            self.store.release()
        elapsed = time.perf_counter() - self.start
        self.on_event(Finished(self.plan.label, self.plan.phase, self.ran, elapsed))
        return self.results, self.ran, elapsed

    def missing(self) -> int:
        """Number of distinct cells without a result."""
        return len({c.key for group in self.plan.groups for c in group} - set(self.results))

    # --- before ----------------------------------------------------------------------------------------------------

    def _recall(self) -> None:
        """Take from the store what is finished and line up the rest."""
        plan = self.plan
        for arm, mean in self.store.seconds_by_arm(plan.label, plan.size).items():
            self.seconds[arm] = [mean]
        planned: set[str] = set()
        for index, group in enumerate(plan.groups):
            for cell in group:
                if cell.key in planned:
                    continue
                planned.add(cell.key)
                kept = self.store.get(cell.key)
                if kept is None or (plan.retry_failed and kept.status != "done"):
                    self.pending.append((index, cell))
                else:
                    self.results[cell.key] = kept
        total, cached = len(planned), len(self.results)
        self.on_event(
            Started(plan.label, plan.title, plan.phase, plan.size, total, cached, self.executor.workers)
        )
        for group in plan.groups:
            for cell in group:
                if cell.key in self.results:
                    self._refuse_broken(cell, self.results[cell.key])
        self._recall_check()

    def _recall_check(self) -> None:
        """Repeat the refusal of a trial that leaked before; check a trial whose check was cut short."""
        if self.plan.leak_version is None:
            return
        message = self.store.check(self.plan.leak_version)
        if message:
            raise TrialError(message)
        cells = (c for group in self.plan.groups for c in group)
        first = next(
            (c for c in cells if c.key in self.results and self.results[c.key].status == "done"), None
        )
        if message is None and first is not None:
            self.checks.append(Task(first, used=True))

    # --- during ----------------------------------------------------------------------------------------------------

    def _next(self) -> Task | None:
        """The leak check first, then the earliest group, and in it the arm that takes longest."""
        if self.checks:
            return self.checks.pop()
        if not self.pending:
            return None
        best = min(self.pending, key=lambda item: (item[0], -self._expected(item[1].arm)))
        self.pending.remove(best)
        return Task(best[1])

    def _expected(self, arm: str) -> float:
        known = self.seconds.get(arm)
        return sum(known) / len(known) if known else 0.0

    def _take(self, task: Task, outcome: Outcome, stop: Stop) -> None:
        if outcome.stale:
            raise TrialError(outcome.error)
        if task.used:
            self._judge_leak(task.cell, outcome)
            return
        result = self.store.add(task.cell, outcome)
        self.results[task.cell.key] = result
        self.ran += 1
        if self.ran == 1 and self.plan.meanwhile is not None:
            # After the first cell: before it, the workers need the processors for their own imports.
            threading.Thread(target=self.plan.meanwhile, name="pullback-meanwhile").start()
        if outcome.status == "done":
            self.seconds.setdefault(task.cell.arm, []).append(outcome.seconds)
        self._tell(result)
        if stop():
            return
        self._refuse_broken(task.cell, result)
        version = self.plan.leak_version
        if (
            version is not None
            and outcome.status == "done"
            and self.ran == 1
            and self.store.check(version) is None
        ):
            self.checks.append(Task(task.cell, used=True))

    def _tell(self, result: CellResult) -> None:
        elapsed = time.perf_counter() - self.start
        total = len(self.results) + self.missing()
        left = elapsed / self.ran * (total - len(self.results)) if self.ran else None
        self.on_event(
            CellFinished(
                self.plan.label,
                self.plan.phase,
                result,
                len(self.results),
                total,
                elapsed,
                left,
                self._scores(),
            )
        )

    def _scores(self) -> dict[str, float]:
        metric = self.plan.metric
        by_arm: dict[str, list[float]] = {}
        for result in self.results.values():
            by_arm.setdefault(result.arm, []).append(score(result, metric))
        return {arm: sum(values) / len(values) for arm, values in by_arm.items()}

    # --- refusals --------------------------------------------------------------------------------------------------

    def _refuse_broken(self, cell: Cell, result: CellResult) -> None:
        """End a trial whose run function cannot work: it breaks its contract, or nothing but exceptions came."""
        if result.status != "failed":
            return
        contract, text = self.store.trouble(cell.key)
        if contract:
            raise TrialError(result.error, traceback_text=text)
        statuses = {r.status for r in self.results.values()}
        if statuses == {"failed"} and len(self.results) >= min(HOPELESS, len(self.results) + self.missing()):
            count = len(self.results)
            hint = "They run again when the code changes, or with --retry-failed (retry_failed=True)."
            raise TrialError(
                f"{result.error} All of the first {count} runs failed. {hint}", traceback_text=text
            )

    def _judge_leak(self, cell: Cell, outcome: Outcome) -> None:
        """Compare a repeated cell with its first run, bit for bit."""
        version = self.plan.leak_version
        first = self.results[cell.key]
        message = ""
        if outcome.status != "done":
            ended = f"worked in a fresh process and ended as {outcome.status!r} in a used one"
            message = f"{where(cell)}: run {ended}. {_CAUSES} There it ended so: {outcome.error}"
        for name in cell.needs if outcome.status == "done" else ():
            before, after = first.metrics[name], outcome.metrics[name]
            if float(before).hex() != float(after).hex():
                values = f"{before!r} in a fresh process and {after!r} after other runs"
                message = f"{where(cell)}: state leaks between runs: metric {name!r} was {values}. {_CAUSES}"
                break
        if version is not None:
            self.store.save_check(version, message)
        if message:
            raise TrialError(message, traceback_text=outcome.traceback_text)
        self.on_event(LeakChecked(self.plan.label, cell.arm, cell.seed))

    def _kept(self) -> str:
        done, left = len(self.results), self.missing()
        return f"{done} of {done + left} runs are kept in {self.store.path}; the same command goes on from there."


_CAUSES = (
    "Usual causes: a model, list or cache at module level that run changes, or a generator that is not seeded from "
    "seed. Make them inside run."
)


def worst_of(metric: Metric, results: Iterable[CellResult]) -> float:
    """What a run without a score counts: the metric's worst, or the worst finished score where that is worse."""
    scores = [r.metrics.get(metric.name, math.nan) for r in results if r.status == "done"]
    known = [float(metric.worst), *(value for value in scores if math.isfinite(value))]
    if math.isnan(known[0]):
        return known[0]
    return max(known) if metric.better == "lower" else min(known)


def score(result: CellResult, metric: Metric) -> float:
    """The metric of a run that ended well, else the metric's worst value."""
    value = result.metrics.get(metric.name, math.nan) if result.status == "done" else math.nan
    return value if math.isfinite(value) else float(metric.worst)
