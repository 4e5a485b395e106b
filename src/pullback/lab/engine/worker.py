"""What runs inside a worker process: prepare it once, then execute one cell at a time.

Only torch and the trial's own modules are imported here, so that a worker starts fast.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np

from pullback.lab.declare import Trial
from pullback.lab.engine.cells import Cell
from pullback.lab.engine.code import code_hash
from pullback.lab.engine.errors import TrialError
from pullback.lab.engine.reference import StudyRef
from pullback.lab.result import Status

MAX_ARRAY_BYTES = 1_000_000
EXIT_IN_CELL = 70  # any non-zero code: the pool takes a worker that ends with 0 for one that was told to
MAX_ERROR_TEXT = 100_000
MAX_STEP = 2**63 - 1  # the largest whole number that the store holds
POSITIVE_ZERO = 0.0  # added to every value: SQLite has no -0.0, and a value must read back as it was hashed

_executed = 0  # cells that this process has run
_flushes = False  # whether this process flushes denormals


@dataclass(frozen=True)
class Outcome:
    """What one execution of a cell gave.

    ``contract`` marks a fault in what ``run`` returned, ``stale`` a cell that did not run because its code was edited.
    """

    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    traceback_text: str = ""
    contract: bool = False
    stale: bool = False
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class CellLog:
    """The `pullback.lab.declare.Log` of one run, kept in memory until the run ends."""

    def __init__(self) -> None:
        self.curves: dict[str, tuple[list[int], list[float]]] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def value(self, name: str, value: float, step: int) -> None:
        """Keep one point of the curve ``name``, or nothing of it.

        Raises:
            ValueError: if ``step`` is no whole number that the store can hold.
        """
        # Both are converted first: a run that catches an error here must not leave half a point behind.
        number, at = float(value) + POSITIVE_ZERO, int(step)
        if abs(at) > MAX_STEP:
            raise ValueError(f"log.value({name!r}) takes a step below 2**63, got {step}. Count steps from 0.")
        steps, values = self.curves.setdefault(text_of(name), ([], []))
        steps.append(at)
        values.append(number)

    def array(self, name: str, array: np.ndarray) -> None:
        """Keep a small array; the last one of a name wins.

        Raises:
            ValueError: if it holds objects or is larger than 1 MB.
        """
        kept = np.array(array)
        if kept.dtype.kind not in "biufc":
            raise ValueError(f"log.array({name!r}) needs numbers, got dtype {kept.dtype}. Convert it first.")
        if kept.nbytes > MAX_ARRAY_BYTES:
            raise ValueError(
                f"log.array({name!r}) takes at most 1 MB, got {kept.nbytes} bytes. Thin it or use uint8."
            )
        self.arrays[text_of(name)] = kept


def text_of(value: object) -> str:
    """``str(value)`` without lone surrogates (file names have them), which neither SQLite nor UTF-8 takes."""
    return str(value).encode("utf-8", "backslashreplace").decode()


# --- the process ---------------------------------------------------------------------------------------------------


def prepare(parent: int) -> None:
    """Make this process reproducible and tie its life to the driver's.

    Args:
        parent: process id of the driver.
    """
    global _flushes
    try:
        import torch
    except Exception as error:
        logging.disable()  # the pool would log a traceback
        print(f"pullback: a worker cannot import torch: {type(error).__name__}: {error}", file=sys.stderr)
        raise

    # With denormals flushed, a literal such as 1e-310 compiles to 0: no other process may find that in its cache.
    sys.dont_write_bytecode = True
    _flushes = True
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.set_flush_denormal(True)
    # The same switch as use_deterministic_algorithms(True), without its import of the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error")
    threading.Thread(target=_die_with, args=(parent,), daemon=True, name="pullback-orphan-guard").start()
    _report_every_exit()
    with contextlib.suppress(OSError):  # standard output is for the verdict: what runs print goes beside it
        os.dup2(2, 1)


def _die_with(parent: int) -> None:
    """End at once when the driver is gone: a killed driver must leave no process that works for nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(EXIT_IN_CELL)


def _report_every_exit() -> None:
    """Turn ``os._exit(0)`` inside a run into a failure: the pool would wait for that run until its time limit."""
    owner, leave = os.getpid(), os._exit

    def exit_with_failure(status: int) -> None:
        leave(status or EXIT_IN_CELL if os.getpid() == owner else status)

    os._exit = exit_with_failure  # ty: ignore[invalid-assignment]


def seed_everything(seed: int) -> None:
    """Seed the global generators: a safety net for runs that draw from them, not a substitute for own streams."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


# --- one cell ------------------------------------------------------------------------------------------------------


def execute(cell: Cell, *, used: bool = False) -> Outcome:
    """Run one cell and describe how it ended; nothing that the run raises escapes.

    Args:
        cell: what to run.
        used: the process must have run a cell before; a fresh one runs the cell twice and returns the second outcome.
    """
    global _executed
    if used and _executed == 0:
        execute(cell)
    _executed += 1
    start = time.perf_counter()
    log = CellLog()
    try:
        trial = _trial_of(cell.ref, cell.code)
        seed_everything(cell.seed)
        # importing the trial, once for each worker, is no part of the run's duration
        start = time.perf_counter()
        returned = trial.run(trial.sizes[cell.size], cell.arm, dict(cell.hp), cell.seed, log)
        outcome = _judge(cell, trial, returned)
    except StaleCodeError as error:
        return Outcome("failed", error=text_of(error), stale=True)
    except TrialError as error:
        inner = text_of(error.traceback_text)
        outcome = Outcome("failed", error=text_of(error), traceback_text=inner, contract=True)
    except BaseException as error:  # a run may raise anything; its cell keeps what it was
        outcome = _raised(cell, error)
    seconds = time.perf_counter() - start
    return replace(outcome, seconds=seconds, curves=log.curves, arrays=log.arrays)


class StaleCodeError(RuntimeError):
    """The code on disk is no longer the code whose hash names the cell."""


@contextlib.contextmanager
def _exact_literals() -> Generator[None]:
    """Keep denormals while source is parsed: the driver parsed it so, and the hashes must agree."""
    if not _flushes:
        yield
        return
    import torch

    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


@lru_cache(maxsize=64)
def _trial_of(ref: StudyRef, code: str) -> Trial:
    """Import a trial once, and make sure that it is the one that the driver hashed."""
    with _exact_literals():
        if code_hash(ref) == code:
            trial = ref.resolve()
            if code_hash(ref) == code:
                return trial
    raise StaleCodeError(f"{ref.source}: the code was edited after the trial had started. Run it again.")


def where(cell: Cell) -> str:
    """``file: arm 'a', seed 0`` for messages."""
    return text_of(f"{cell.ref.source}: arm {cell.arm!r}, seed {cell.seed}")


def _raised(cell: Cell, error: BaseException) -> Outcome:
    diverged = isinstance(error, FloatingPointError) or type(error).__name__ == "NonFiniteError"
    try:
        said, text = str(error), "".join(traceback.format_exception(error))
    except Exception as fault:  # an exception whose own text raises
        said, text = f"(its text cannot be read: {type(fault).__name__})", ""
    reason = " ".join(f"{type(error).__name__}: {said[:MAX_ERROR_TEXT]}".split()).removesuffix(":")[:2000]
    message = (
        f"{where(cell)}: run raised {reason}{_place(error)}. Correct it, or see the traceback with --debug."
    )
    status: Status = "diverged" if diverged else "failed"
    return Outcome(status, error=text_of(message), traceback_text=text_of(text[-MAX_ERROR_TEXT:]))


def _place(error: BaseException) -> str:
    """`` (line 7 of mine.py)``: the innermost line that is not the engine's; empty when there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f" (line {frames[-1].lineno} of {os.path.basename(frames[-1].filename)})" if frames else ""


def _judge(cell: Cell, trial: Trial, returned: object) -> Outcome:
    """Check what ``run`` returned against the declaration."""
    primary = trial.primary.name
    if not isinstance(returned, Mapping):
        fix = f"Return a mapping such as {{{primary!r}: value}}."
        return _broken(cell, f"run must return a mapping of metrics, got {type(returned).__name__}. {fix}")
    metrics: dict[str, float] = {}
    for name, value in returned.items():
        number = _number(value)
        if number is None:
            shown = text_of(" ".join(repr(value).split())[:80])
            return _broken(cell, f"metric {name!r} must be a number, got {shown}. Return float(value).")
        metrics[text_of(name)] = number + POSITIVE_ZERO
    for name in cell.needs or (primary,):
        if name not in metrics:
            got = ", ".join(repr(known)[:80] for known in list(metrics)[:20]) or "none"
            return _broken(
                cell, f"run returned no metric {name!r}, got {got}. Add it to the mapping that run returns."
            )
    bad = [name for name in (cell.needs or (primary,)) if not math.isfinite(metrics[name])]
    if bad:
        fault = f"metric {bad[0]!r} is {metrics[bad[0]]}. The run counts with the worst score."
        return Outcome("diverged", metrics=metrics, error=text_of(f"{where(cell)}: {fault}"))
    return Outcome("done", metrics=metrics)


def _broken(cell: Cell, message: str) -> Outcome:
    return Outcome("failed", error=text_of(f"{where(cell)}: {message}"), contract=True)


def _number(value: Any) -> float | None:
    """A real number from python, numpy or a tensor of one element; None for anything else."""
    if getattr(value, "numel", lambda: 0)() == 1 or getattr(value, "size", 0) == 1:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the largest float
        return None
