"""Run a trial over its paired seeds, or tune its arms with equal budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pullback.lab import statistics, tuning
from pullback.lab.declare import Equivalent, Greater, Metric, Study, Trial
from pullback.lab.engine.cells import Cell, check_trial, claim_hash, digest, make_cell, metrics_of
from pullback.lab.engine.code import code_hash
from pullback.lab.engine.driver import Drive, Plan, score, worst_of
from pullback.lab.engine.errors import TrialError
from pullback.lab.engine.events import OnEvent
from pullback.lab.engine.executors import Executor
from pullback.lab.engine.provenance import provenance
from pullback.lab.engine.reference import StudyRef, nearest
from pullback.lab.extras import lack
from pullback.lab.result import ArmResult, CellResult, TrialResult
from pullback.lab.tuning import Settings, Tuned

if TYPE_CHECKING:
    from pullback.lab.store import Store

SMOKE = "smoke"


def run_trial(
    ref: StudyRef,
    *,
    size: str = "full",
    store: Store,
    executor: Executor,
    seeds: int | Sequence[int] | None = None,
    retry_failed: bool = False,
    check_leaks: bool | None = None,
    on_event: OnEvent | None = None,
) -> TrialResult:
    """Run every arm at every test seed, skip what is in the store, and give the verdict.

    Args:
        ref: where the trial is declared.
        size: one of the trial's sizes; ``smoke`` gives no verdict.
        store: where outcomes are kept; this process must be its only driver.
        executor: where cells run.
        seeds: the seeds to run, or how many of the declared ones; None takes all.
        retry_failed: run cells again that failed, diverged or timed out before.
        check_leaks: repeat the first cell in a used worker and compare; None does it for users' files.
        on_event: called in this thread with each event.

    Returns:
        Everything that is known after the trial; it is in the store as well.

    Raises:
        TrialError: if the declaration or the run function is at fault, naming file, arm, seed and fix.
        Interrupted: after SIGINT or SIGTERM, when everything that is finished is written.
    """
    trial = _resolved(ref, size)
    chosen = _seeds(trial, seeds)
    settings = tuning.settings_of(trial)
    claim, code = claim_hash(trial), code_hash(ref)
    version = digest([claim, code, size, ref.name])
    groups = _groups(trial, ref, claim, code, size, settings, chosen)
    leaks = check_leaks if check_leaks is not None else ref.file is not None
    plan = Plan(
        ref.label,
        trial.title,
        "run",
        size,
        groups,
        trial.primary,
        version if leaks else None,
        retry_failed,
        statistics.warm_up,
    )
    results, ran, seconds = Drive(plan, store, executor, on_event or _ignore).run()
    cells = [results[cell.key] for group in groups for cell in group]
    result = _result(trial, ref, size, claim, code, settings, cells, store)
    result = dataclasses.replace(
        result, provenance=_kept_provenance(result, store, ran) or provenance(executor.workers, seconds, ran)
    )
    store.save_result(result)
    return result


def tune_trial(
    ref: StudyRef,
    *,
    store: Store,
    executor: Executor,
    retry_failed: bool = False,
    on_event: OnEvent | None = None,
    folder: Path | None = None,
) -> Tuned:
    """Tune every arm with the same budget, on the tuning seeds and the selection metric only.

    Args:
        ref: where the trial is declared.
        store: where outcomes and traces are kept.
        executor: where cells run.
        retry_failed: run cells again that failed before.
        on_event: called in this thread with each event.
        folder: where ``tuned.toml`` is written; None takes the room's folder, and writes nothing for a user's file.

    Raises:
        TrialError: if the trial declares no tuning, or for the reasons of `run_trial`.
        Interrupted: as in `run_trial`.
    """
    trial = ref.resolve()
    tune = trial.tune
    if tune is None:
        raise TrialError(f"{ref.label} declares no tuning. Add tune=Tune(...) to the declaration.")
    trial = _resolved(ref, tune.size)
    claim, code = claim_hash(trial), code_hash(ref)
    points = {arm: p for arm in trial.arms.names() if (p := tuning.points_of(tune, arm))}
    needs = (tune.select.name,)
    grid: dict[str, list[list[Cell]]] = {
        arm: [
            [
                dataclasses.replace(
                    make_cell(
                        trial, ref, claim=claim, code=code, size=tune.size, arm=arm, seed=seed,
                        hp={**trial.hyperparameters(arm), **point},
                    ),
                    needs=needs,
                )
                for seed in trial.seeds.tune
            ]
            for point in tried
        ]
        for arm, tried in points.items()
    }  # fmt: skip
    longest = max(map(len, grid.values()), default=0)
    groups = [[c for rows in grid.values() if i < len(rows) for c in rows[i]] for i in range(longest)]
    plan = Plan(ref.label, trial.title, "tune", tune.size, groups, tune.select, None, retry_failed)
    results, _, _ = Drive(plan, store, executor, on_event or _ignore).run()
    return _tuned(trial, ref, grid, points, results, store, folder)


def _kept_provenance(result: TrialResult, store: Store, ran: int) -> Mapping[str, Any] | None:
    """Where the same cells came from when they were run: looking at a finished trial again changes nothing."""
    kept = None if ran else store.result(result)
    same = kept is not None and [c.key for c in kept.cells] == [c.key for c in result.cells]
    return kept.provenance if kept is not None and same else None


# --- pieces --------------------------------------------------------------------------------------------------------


def _ignore(_event: object) -> None:
    """Listen to nothing."""


def _resolved(ref: StudyRef, size: str) -> Trial:
    trial = ref.resolve()
    check_trial(trial, ref)
    if isinstance(trial, Study) and (said := lack(trial.extras)):
        raise TrialError(f"{ref.label} needs optional packages. {said}")
    if size not in trial.sizes:
        raise TrialError(f"{ref.label} has no size {size!r}. {nearest(size, list(trial.sizes))}")
    return trial


def _seeds(trial: Trial, seeds: int | Sequence[int] | None) -> tuple[int, ...]:
    declared = trial.seeds.test
    if seeds is None:
        return declared
    if isinstance(seeds, int):
        if not 1 <= seeds <= len(declared):
            raise TrialError(
                f"seeds must be 1 to {len(declared)}, the declared number, got {seeds}. Change Seeds.test."
            )
        return declared[:seeds]
    chosen = tuple(seeds)
    clash = sorted(set(chosen) & set(trial.seeds.tune))
    if clash or len(set(chosen)) != len(chosen) or not chosen:
        raise TrialError(f"seeds must be distinct and no tuning seeds, got {list(chosen)}. Choose others.")
    return chosen


def _groups(
    trial: Trial, ref: StudyRef, claim: str, code: str, size: str, settings: Settings, seeds: Sequence[int]
) -> list[list[Cell]]:
    """The cells of all arms, seed by seed."""
    needs = _needed(trial)
    return [
        [
            dataclasses.replace(
                make_cell(
                    trial, ref, claim=claim, code=code, size=size, arm=arm, hp=settings.hp[arm], seed=seed
                ),
                needs=needs,
            )
            for arm in trial.arms.names()
        ]
        for seed in seeds
    ]


def _needed(trial: Trial) -> tuple[str, ...]:
    """Metrics on which a claim rests: they must be present and finite."""
    named = [(c.metric or trial.primary).name for c in (trial.main_claim(), *trial.also)]
    return tuple(dict.fromkeys([trial.primary.name, *named]))


def _tuned(
    trial: Trial,
    ref: StudyRef,
    grid: Mapping[str, list[list[Cell]]],
    points: Mapping[str, list[dict[str, Any]]],
    results: Mapping[str, CellResult],
    store: Store,
    folder: Path | None,
) -> Tuned:
    tune = trial.tune
    if tune is None:
        raise TrialError(f"{ref.label} declares no tuning. Add tune=Tune(...) to the declaration.")
    sign = 1.0 if tune.select.better == "higher" else -1.0
    select = dataclasses.replace(tune.select, worst=worst_of(tune.select, results.values()))
    traces: dict[str, list[dict[str, Any]]] = {}
    at_edge: dict[str, tuple[str, ...]] = {}
    for arm, rows in grid.items():
        trace, lost = [], []
        for point, cells in zip(points[arm], rows, strict=True):
            runs = [results[cell.key] for cell in cells]
            mean = sum(score(r, select) for r in runs) / len(runs)
            lost.append(sum(r.status != "done" for r in runs))
            trace.append({"hp": point, "score": mean, "seconds": sum(r.seconds for r in runs)})
        traces[arm] = tuning.ranked(tuning.domains_of(tune, arm), trace, lost, sign)
        at_edge[arm] = tuning.edges(tuning.domains_of(tune, arm), traces[arm][0]["hp"], trace)
    best = {arm: trace[0]["hp"] for arm, trace in traces.items()}
    sha256 = tuning.trace_hash(traces)
    store.save_tuning(ref.label, sha256, {"traces": traces, "at_edge": at_edge})
    target = folder or (tuning.room_folder(ref.room) if ref.room is not None else None)
    path = None if target is None else target / "tuned.toml"
    if path is not None:
        tuning.write_tuned(path, trial.name, best, sha256)
    warnings = tuple(
        f"{arm}: the best {name} ({best[arm][name]}) lies at an edge of what was tried. Widen its domain."
        for arm, names in at_edge.items()
        for name in names
    )
    warnings += tuple(
        f"{arm}: no run ended well, so that nothing was chosen: {best[arm]} is only the first point."
        for arm, rows in grid.items()
        if all(results[cell.key].status != "done" for cells in rows for cell in cells)
    )
    hp = {arm: {**trial.hyperparameters(arm), **best.get(arm, {})} for arm in trial.arms.names()}
    return Tuned(hp, traces, at_edge, sha256, path, warnings)


def _result(
    trial: Trial,
    ref: StudyRef,
    size: str,
    claim: str,
    code: str,
    settings: Settings,
    cells: list[CellResult],
    store: Store,
) -> TrialResult:
    metrics, note = _judged(trial, cells)
    settings = dataclasses.replace(settings, note=f"{settings.note} {note}".strip())
    scores = {
        name: {arm: {c.seed: score(c, metric) for c in cells if c.arm == arm} for arm in trial.arms.names()}
        for name, metric in metrics.items()
    }
    main = trial.main_claim().metric or trial.primary
    means = {arm: sum(by_seed.values()) / len(by_seed) for arm, by_seed in scores[main.name].items()}
    comparisons = statistics.compare(trial, scores, tested=size != SMOKE)
    failures = {arm: sum(c.arm == arm and c.status != "done" for c in cells) for arm in trial.arms.names()}
    return TrialResult(
        room=ref.room,
        name=trial.name,
        title=trial.title,
        size=size,
        claim_hash=claim,
        code_hash=code,
        declaration=declaration(trial, ref, settings, cells, metrics),
        arms=_arms(trial, ref, settings, store),
        cells=cells,
        comparisons=comparisons,
        verdict=statistics.verdict(trial, comparisons, means, size=size, failures=failures),
        provenance={},
    )


def _arms(trial: Trial, ref: StudyRef, settings: Settings, store: Store) -> list[ArmResult]:
    kept = (store.tuning(ref.label, settings.trace_sha256) if settings.trace_sha256 else None) or {}
    traces, at_edge = kept.get("traces", {}), kept.get("at_edge", {})
    return [
        ArmResult(
            arm,
            trial.arms.role(arm),
            dict(settings.hp[arm]),
            traces.get(arm, []),
            tuple(at_edge.get(arm, ())),
        )
        for arm in trial.arms.names()
    ]


def _judged(trial: Trial, cells: Sequence[CellResult]) -> tuple[dict[str, Metric], str]:
    """The declared metrics, with a worst score that no finished run undercuts where runs failed, and what to say."""
    metrics = metrics_of(trial)
    if all(c.status == "done" for c in cells):
        return metrics, ""
    judged = {name: dataclasses.replace(m, worst=worst_of(m, cells)) for name, m in metrics.items()}
    told = [
        f"A run without {name} counts as {judged[name].worst:.4g}, the worst of all: "
        f"the declared {metric.worst:.4g} is better than some that finished."
        for name, metric in metrics.items()
        if math.isfinite(metric.worst) and judged[name].worst != metric.worst
    ]
    return judged, " ".join(told)


def declaration(
    trial: Trial,
    ref: StudyRef,
    settings: Settings,
    cells: Sequence[CellResult],
    judged: Mapping[str, Metric],
) -> dict[str, Any]:
    """What was declared beforehand, as plain values for the page and the evidence."""
    metrics = {name: dataclasses.asdict(metric) for name, metric in judged.items()}
    for name in sorted({n for c in cells for n in c.metrics} - set(metrics)):
        metrics[name] = {"name": name, "better": "higher", "unit": "", "worst": math.nan}
    tune = trial.tune
    study = trial if isinstance(trial, Study) else None
    return {
        "primary": metrics[trial.primary.name],
        "metrics": metrics,
        "claim": _claim(trial.main_claim(), trial),
        "also": [_claim(c, trial) for c in trial.also],
        "paper": None if study is None else dataclasses.asdict(study.paper),
        "refuted_if": "" if study is None else study.refuted_if,
        "cannot_test": "" if study is None else study.cannot_test,
        "deviations": "" if study is None else study.deviations,
        "seeds": {"test": sorted({c.seed for c in cells}), "tune": list(trial.seeds.tune)},
        "tuning": None
        if tune is None
        else {
            "trials": tune.trials,
            "select": dataclasses.asdict(tune.select),
            "size": tune.size,
            "shared": {name: _domain(d) for name, d in tune.shared.items()},
            "only": {arm: {n: _domain(d) for n, d in own.items()} for arm, own in tune.only.items()},
            "trace_sha256": settings.trace_sha256,
        },
        "tuned": settings.tuned,
        "note": settings.note,
        "file": None if ref.file is None else Path(ref.file).name,
        "figures": [_figure(figure) for figure in trial.figures],
    }


def _claim(claim: Greater | Equivalent, trial: Trial) -> dict[str, Any]:
    kind, margin = ("greater", claim.by) if isinstance(claim, Greater) else ("equivalent", claim.within)
    metric = (claim.metric or trial.primary).name
    return {"kind": kind, "arm": claim.arm, "than": claim.than, "margin": margin, "metric": metric}


def _domain(domain: Any) -> dict[str, Any]:
    return {"type": type(domain).__name__, **dataclasses.asdict(domain)}


def _figure(figure: Any) -> dict[str, Any]:
    fields = {f.name: getattr(figure, f.name) for f in dataclasses.fields(figure) if f.name != "draw"}
    return {"type": type(figure).__name__, **fields}
