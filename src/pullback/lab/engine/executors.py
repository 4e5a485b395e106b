"""Where cells run: the protocol, and processes on this machine."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from pebble import ProcessExpired, ProcessPool

from pullback.lab.engine.cells import Cell
from pullback.lab.engine.errors import TrialError
from pullback.lab.engine.worker import EXIT_IN_CELL, Outcome, execute, prepare, where

MAX_POOL_RESTARTS = 3


@dataclass(frozen=True)
class Task:
    """A cell to run; ``used`` asks for a worker that has run a cell before."""

    cell: Cell
    used: bool = False


class Executor(Protocol):
    """Runs cells somewhere. Only the driver, which consumes the outcomes, writes the store."""

    workers: int

    def run(
        self, source: Callable[[], Task | None], stop: Callable[[], bool]
    ) -> Generator[tuple[Task, Outcome]]:
        """Yield each task with its outcome, in the order in which they finish.

        Args:
            source: gives the next task, or None while there is none.
            stop: asked several times a second; once true, work in flight is given up and the iteration ends.
        """
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class LocalExecutor:
    """Spawned processes on this machine that stay alive from cell to cell and from trial to trial.

    Args:
        workers: number of processes; None takes the processors that this process may use.

    Raises:
        ValueError: if ``workers`` is below 1.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}. Use 1 to run one cell at a time.")
        self.workers = (
            workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or 1
        )
        self._pool: ProcessPool | None = None
        self._proven = False  # whether any worker has ever given an outcome

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers within seconds; a later `run` starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def run(
        self, source: Callable[[], Task | None], stop: Callable[[], bool]
    ) -> Generator[tuple[Task, Outcome]]:
        """Yield each task with its outcome (see `Executor.run`); a lost worker costs one failed cell.

        Raises:
            TrialError: if no worker can be started at all.
        """
        flying: dict[Future[Outcome], Task] = {}
        again: list[Task] = []
        restarts = 0
        try:
            while not stop():
                # One task waits per worker, so that none idles while the driver writes.
                while len(flying) < 2 * self.workers:
                    task = again.pop() if again else source()
                    if task is None:
                        break
                    flying[self._schedule(task)] = task
                if not flying:
                    return
                done, _ = concurrent.futures.wait(flying, timeout=0.1, return_when="FIRST_COMPLETED")
                # In the order of submission: the first outcome must be that of a fresh worker, for the leak check.
                for future in [each for each in flying if each in done]:
                    task, outcome = flying.pop(future), _outcome(future, restarts < MAX_POOL_RESTARTS)
                    if outcome is None:
                        again.append(task)
                    else:
                        self._proven = True
                        yield task, _name(task.cell, outcome)
                if again:
                    restarts += 1
                    if restarts == MAX_POOL_RESTARTS and not self._proven:
                        raise TrialError(
                            "no worker process could be started, so that nothing was run. Check free memory, and that "
                            "`python -c 'import torch'` works."
                        )
                    again += flying.values()
                    flying.clear()
                    self.close()
            yield from [(flying[f], _name(flying[f].cell, f.result())) for f in flying if _succeeded(f)]
        finally:
            if flying:
                self.close()

    def _schedule(self, task: Task) -> Future[Outcome]:
        if self._pool is None or not self._pool.active:
            self.close()
            self._pool = ProcessPool(
                max_workers=self.workers,
                initializer=prepare,
                initargs=(os.getpid(),),
                context=multiprocessing.get_context("spawn"),
            )
        limit = task.cell.timeout * (2 if task.used else 1)
        return self._pool.schedule(execute, args=(task.cell,), kwargs={"used": task.used}, timeout=limit)


def make_executor(name: str = "local", workers: int | None = None) -> Executor:
    """The executor of this name.

    Raises:
        TrialError: for ``"ray"``, which this version cannot use yet, and for unknown names.
    """
    if name == "local":
        return LocalExecutor(workers)
    if name == "ray":
        raise TrialError(
            "executor 'ray' needs the extra pullback[ray], which this version lacks. Use 'local'."
        )
    raise TrialError(f"unknown executor {name!r}. Use 'local'.")


def _succeeded(future: Future[Outcome]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _outcome(future: Future[Outcome], may_retry: bool) -> Outcome | None:
    """The outcome of a finished future; None when the whole pool broke and the task should run again."""
    try:
        return future.result()
    except concurrent.futures.TimeoutError:
        return Outcome(
            "timeout", error="ran longer than its time limit. Raise timeout= or make the run shorter."
        )
    except concurrent.futures.process.BrokenProcessPool:
        if may_retry:
            return None
        return Outcome("failed", error="the worker processes could not be kept alive. Check free memory.")
    except ProcessExpired as error:
        return Outcome("failed", error=f"the worker process {_end_of(getattr(error, 'exitcode', None))}")
    except Exception as error:
        return Outcome(
            "failed", error=f"the outcome could not be sent back: {type(error).__name__}: {error}."
        )


def _end_of(code: int | None) -> str:
    """How a worker ended, and what to do about it."""
    if code == -signal.SIGKILL:
        return "was killed, most often for lack of memory. Make the run smaller or use fewer workers."
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"crashed with {name}. Look for a fault in compiled code that the run calls."
    if code == EXIT_IN_CELL:
        return "was ended from inside the run. Leave os._exit and exec out of it."
    return f"ended with exit code {code}. Leave out what ends a process: os._exit, a signal, closed files."


def _name(cell: Cell, outcome: Outcome) -> Outcome:
    """Say which cell an outcome belongs to when it was made outside the worker."""
    if outcome.stale or not outcome.error or outcome.contract or outcome.error.startswith(where(cell)):
        return outcome
    seconds = cell.timeout if outcome.status == "timeout" else outcome.seconds
    return Outcome(outcome.status, error=f"{where(cell)}: {outcome.error}", seconds=seconds)
