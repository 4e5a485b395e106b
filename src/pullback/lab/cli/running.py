"""Commands that run trials: study, trial and tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pullback.lab.cli import places
from pullback.lab.cli.progress import make_progress
from pullback.lab.cli.terminal import complain, say
from pullback.lab.declare import Scalar, Study
from pullback.lab.doctor import require_torch
from pullback.lab.engine import (
    Executor,
    Interrupted,
    StudyRef,
    TrialError,
    make_executor,
    run_trial,
    studies_of,
    tune_trial,
)
from pullback.lab.engine.cells import check_trial
from pullback.lab.engine.reference import nearest, room_names
from pullback.lab.extras import lack
from pullback.lab.result import Comparison, TrialResult
from pullback.lab.store import Store
from pullback.lab.trial import load_trial

SMOKE_SEEDS = 2  # a smoke run shows that every arm works, and that seeds pair


class UsageError(ValueError):
    """The command's words do not fit together; the message says which and what would."""


@dataclass(frozen=True)
class Plan:
    """What to run and how."""

    size: str
    seeds: int | None
    executor: str
    workers: int | None
    out: Path
    retry_failed: bool
    quiet: bool
    debug: bool


def study_refs(rooms: Sequence[str], *, everything: bool, only: str | None) -> list[StudyRef]:
    """The studies that the command names.

    Raises:
        UsageError: for unknown rooms or studies, or when nothing or too much is named.
    """
    if everything == bool(rooms):
        raise UsageError(
            "name one or more rooms, or give --all (and not both). `pullback list` shows the rooms."
        )
    known = room_names()
    for room in rooms:
        if room not in known:
            raise UsageError(f"unknown room {room!r}. {nearest(room, known)}")
    refs = [
        StudyRef.of_study(study) for room in (known if everything else rooms) for study in studies_of(room)
    ]
    if only is None:
        return refs
    names = sorted({ref.name for ref in refs})
    if only not in names:
        raise UsageError(f"unknown study {only!r}. {nearest(only, names)}")
    return [ref for ref in refs if ref.name == only]


def trial_ref(path: str) -> StudyRef:
    """The trial that the command names.

    Raises:
        UsageError: if there is no such file or trial.
    """
    try:
        return load_trial(path)
    except TrialError as error:
        if error.traceback_text:  # the user's file itself failed: that is no misuse of the command
            raise
        raise UsageError(str(error)) from error


def check(refs: Sequence[StudyRef], plan: Plan) -> None:
    """Refuse a size, seed count or worker count before anything runs.

    Raises:
        UsageError: naming the value and the fix.
    """
    if plan.workers is not None and plan.workers < 1:
        raise UsageError(f"--workers must be >= 1, got {plan.workers}. Leave it out to use every core.")
    for ref in refs:
        trial = ref.resolve()
        check_trial(trial, ref)
        if plan.size not in trial.sizes:
            raise UsageError(
                f"{ref.label} has no size {plan.size!r}. {nearest(plan.size, list(trial.sizes))}"
            )
        declared = len(trial.seeds.test)
        if plan.seeds is not None and not 1 <= plan.seeds <= declared:
            raise UsageError(
                f"--seeds must be 1 to {declared} for {ref.label}, got {plan.seeds}. Leave it out for all."
            )


def able(refs: Sequence[StudyRef]) -> list[StudyRef]:
    """The trials that can run here; of every other one is said in one line what it lacks.

    Raises:
        TrialError: if that leaves nothing.
    """
    kept, said = list[StudyRef](), ""
    for ref in refs:
        trial = ref.resolve()
        lacking = lack(trial.extras) if isinstance(trial, Study) else ""
        if lacking:
            said = f"{ref.label} is left out, it needs optional packages. {lacking}"
            if len(refs) > 1:
                complain(said)
        else:
            kept.append(ref)
    if refs and not kept:
        raise TrialError(said)
    return kept


def run(refs: Sequence[StudyRef], plan: Plan) -> int:
    """Run trials one after the other, print each verdict, write the report; returns the exit status."""
    require_torch()
    refs = able(refs)
    check(refs, plan)
    figures = places.drawings(refs)
    executor = _executor(plan)
    status = 0
    with Store(places.store_path(plan.out)) as store, closing(executor):
        for ref in refs:
            try:
                with make_progress(quiet=plan.quiet) as progress:
                    result = run_trial(
                        ref,
                        size=plan.size,
                        store=store,
                        executor=executor,
                        seeds=plan.seeds or (SMOKE_SEEDS if plan.size == "smoke" else None),
                        retry_failed=plan.retry_failed,
                        on_event=progress,
                    )
            except TrialError as error:
                complain(error)
                if plan.debug and error.traceback_text:
                    say(error.traceback_text)
                status = 1
                continue
            except Interrupted as stop:
                complain(stop)
                status = stop.exit_code
                break
            status = max(status, tell(ref.label, result))
    # An interrupted command still reports the trials that were finished before it.
    if places.stored(plan.out):
        say(f"report: {places.report(plan.out, with_evidence=False, figures=figures)}")
    return status


def tell(label: str, result: TrialResult) -> int:
    """Print a verdict; 1 when every run of an arm failed, since then nothing was compared."""
    rival = f", but reduces to {result.verdict.reduces_to}" if result.verdict.reduces_to else ""
    word = (
        "" if result.verdict.word == "not tested" else f"{result.verdict.word}{rival}. "
    )  # its sentence says so
    say(f"{label}: {word}{result.verdict.sentence}")
    if (
        (paper := result.declaration.get("paper"))
        and paper["baseline"] is not None
        and paper["method"] is not None
    ):
        say(f"  the paper ({paper['where']}): {paper['baseline']:g} -> {paper['method']:g}")
    for other in result.comparisons[1:]:
        say(f"  {_told(other, result)}")
    lost = [
        arm.name for arm in result.arms if all(c.status != "done" for c in result.cells if c.arm == arm.name)
    ]
    for arm in lost:
        first = next(c for c in result.cells if c.arm == arm)
        complain(f"{label}: every run of arm {arm!r} ended as {first.status}: {first.error}")
    return int(bool(lost))


def _told(c: Comparison, result: TrialResult) -> str:
    """A rival or secondary claim in one line."""
    from pullback.lab.report.model import unit_of  # the report brings matplotlib and torch along
    from pullback.lab.report.text import difference, interval

    unit = unit_of(result, c.metric)
    against = f"{c.arm} against {'the rival ' if c.role == 'rival' else ''}{c.than}"
    amount = f"{difference(c.difference, unit)} {interval(c.low, c.high, unit)}"
    return f"{against}, {c.metric.replace('_', ' ')}: {amount}, {c.word}"


def tune(refs: Sequence[StudyRef], plan: Plan) -> int:
    """Tune the trials that declare a tuning; returns the exit status."""
    require_torch()
    tunable = [ref for ref in refs if ref.resolve().tune is not None]
    if not tunable:
        raise UsageError(
            f"none of {', '.join(ref.label for ref in refs)} declares a tuning. Add tune=Tune(...)."
        )
    check([], plan)
    tunable = able(tunable)
    executor = _executor(plan)
    with Store(places.store_path(plan.out)) as store, closing(executor):
        for ref in tunable:
            try:
                with make_progress(quiet=plan.quiet) as progress:
                    tuned = tune_trial(
                        ref, store=store, executor=executor, retry_failed=plan.retry_failed, on_event=progress
                    )
            except Interrupted as stop:
                complain(stop)
                return stop.exit_code
            for arm, hp in tuned.hp.items():
                say(f"{ref.label}: {arm}: {_listed(hp)}")
            for warning in tuned.warnings:
                say(f"{ref.label}: {warning}")
            if tuned.path is not None:
                say(f"{ref.label}: written to {tuned.path}")
    return 0


def _executor(plan: Plan) -> Executor:
    try:
        return make_executor(plan.executor, plan.workers)
    except TrialError as error:
        raise UsageError(str(error)) from error


def _listed(hp: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{k} = {v:.6g}" if isinstance(v, float) else f"{k} = {v}" for k, v in hp.items())
