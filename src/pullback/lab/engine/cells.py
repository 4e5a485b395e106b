"""Cells: one training run each, and the key under which its outcome is kept."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from pullback.lab.declare import Equivalent, Greater, Metric, Scalar, Trial
from pullback.lab.engine.errors import TrialError
from pullback.lab.engine.reference import StudyRef


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Args:
        ref: where the trial is declared.
        size: which of the trial's sizes.
        arm: which arm.
        hp: the hyperparameters that ``run`` gets.
        seed: the seed that ``run`` gets.
        key: hash of everything that decides the outcome (see `cell_key`).
        timeout: seconds after which the run is stopped.
        code: hash of the code that the run must execute.
        needs: metrics that must be present and finite.
    """

    ref: StudyRef
    size: str
    arm: str
    hp: Mapping[str, Scalar]
    seed: int
    key: str
    timeout: float
    code: str
    needs: tuple[str, ...] = field(default=())


def canonical(value: Any, where: str = "value") -> Any:
    """A JSON-able form of a plain value that is equal for equal values.

    Args:
        value: scalars, strings, sequences, mappings, sets, enumerations, paths and dataclasses of these.
        where: what is being described, for the message.

    Raises:
        TrialError: for an object whose content cannot be described, because its cells could not be recognised again.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": value.hex() if math.isfinite(value) else repr(value)}
    if isinstance(value, enum.Enum):
        return {"enum": f"{type(value).__qualname__}.{value.name}"}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: canonical(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)
        }
        return {"class": type(value).__qualname__, "fields": fields}
    if isinstance(value, Mapping):
        pairs = [(canonical(k, where), canonical(v, f"{where}[{k!r}]")) for k, v in value.items()]
        return {"mapping": sorted(pairs, key=lambda pair: json.dumps(pair[0], sort_keys=True))}
    if isinstance(value, tuple | list | range):
        return [canonical(v, where) for v in value]
    if isinstance(value, set | frozenset):
        return {
            "set": sorted((canonical(v, where) for v in value), key=lambda v: json.dumps(v, sort_keys=True))
        }
    raise TrialError(
        f"{where} must be made of plain values, got {type(value).__name__}. "
        "Use Python's own numbers, texts and lists, or a frozen dataclass of them."
    )


def digest(value: Any, where: str = "value") -> str:
    """SHA-256 of the canonical form of ``value``, in hexadecimal."""
    text = json.dumps(canonical(value, where), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- what a trial claims ------------------------------------------------------------------------------------------


def metrics_of(trial: Trial) -> dict[str, Metric]:
    """Every declared metric by name: the primary one, those of the claims, and the one that tuning selects by."""
    metrics = {trial.primary.name: trial.primary}
    for claim in (trial.main_claim(), *trial.also):
        if claim.metric is not None:
            metrics.setdefault(claim.metric.name, claim.metric)
    if trial.tune is not None:
        metrics.setdefault(trial.tune.select.name, trial.tune.select)
    return metrics


def check_trial(trial: Trial, ref: StudyRef) -> None:
    """Refuse a declaration that contradicts itself, before anything runs.

    Raises:
        TrialError: naming the field, its value and the fix.
    """
    arms = trial.arms.names()
    known = f"Arms are {', '.join(arms)}."
    for claim in (trial.main_claim(), *trial.also):
        for arm in (claim.arm, claim.than):
            if arm not in arms:
                raise TrialError(f"{ref.source}: a claim names arm {arm!r}, which is not declared. {known}")
        margin = claim.by if isinstance(claim, Greater) else claim.within
        if not (math.isfinite(margin) and (margin > 0 if isinstance(claim, Equivalent) else margin >= 0)):
            raise TrialError(
                f"{ref.source}: the margin of a claim must be positive, got {margin}. Set by= or within=."
            )
    unknown = sorted((set(trial.hp) | set(trial.tune.only if trial.tune else ())) - {*arms, "*"})
    if unknown:
        raise TrialError(f"{ref.source}: hyperparameters for unknown arm {unknown[0]!r}. {known}")
    _check_run(trial, ref)
    if not trial.timeout > 0:
        raise TrialError(
            f"{ref.source}: timeout must be > 0 seconds, got {trial.timeout}. Give the limit of one run."
        )
    if trial.tune is not None and not trial.seeds.tune:
        raise TrialError(
            f"{ref.source}: tuning needs seeds of its own, got none. Give Seeds.tune at least one."
        )
    if len(set(trial.seeds.test)) != len(trial.seeds.test) or not trial.seeds.test:
        raise TrialError(
            f"{ref.source}: test seeds must be distinct, got {list(trial.seeds.test)}. Change Seeds.test."
        )


def _check_run(trial: Trial, ref: StudyRef) -> None:
    """Refuse a run function that cannot be called as runs are."""
    try:
        signature = inspect.signature(trial.run)
    except ValueError:  # some compiled functions have none
        return
    try:
        signature.bind(None, "", {}, 0, None)
    except TypeError as error:
        raise TrialError(
            f"{ref.source}: run must take (cfg, arm, hp, seed, log), got {signature}. Add what is missing."
        ) from error


def claim_hash(trial: Trial) -> str:
    """Hash of what was promised beforehand: arms, metrics, claims, margins and the refutation condition.

    Seeds, titles and figures are not part of it: more seeds or a new caption make no new claim.
    """
    return digest(
        {
            "room": getattr(trial, "room", None),
            "name": trial.name,
            "arms": trial.arms,
            "primary": _promise(trial.primary),
            "claims": [_claim(c) for c in (trial.main_claim(), *trial.also)],
            "refuted_if": getattr(trial, "refuted_if", ""),
        },
        "claim",
    )


def _promise(metric: Metric | None) -> Any:
    return (
        None
        if metric is None
        else {"name": metric.name, "better": metric.better, "worst": float(metric.worst)}
    )


def _claim(claim: Greater | Equivalent) -> dict[str, Any]:
    margin = claim.by if isinstance(claim, Greater) else claim.within
    head = {"kind": type(claim).__name__, "arm": claim.arm, "than": claim.than, "margin": float(margin)}
    return {**head, "metric": _promise(claim.metric)}


def cell_key(
    *, claim: str, code: str, size: str, config: Any, arm: str, hp: Mapping[str, Scalar], seed: int
) -> str:
    """SHA-256 that names a cell: the same inputs give the same key in every process and on every machine.

    Args:
        claim: the claim's hash.
        code: the hash of the code that the run executes.
        size: name of the size.
        config: the configuration of that size, made of plain values.
        arm: the arm.
        hp: hyperparameters of the arm.
        seed: the run's seed.
    """
    parts = {
        "claim": claim,
        "code": code,
        "size": size,
        "config": config,
        "arm": arm,
        "hp": dict(hp),
        "seed": seed,
    }
    return digest(parts, f"arm {arm!r} at size {size!r}: cell")


def make_cell(
    trial: Trial,
    ref: StudyRef,
    *,
    claim: str,
    code: str,
    size: str,
    arm: str,
    hp: Mapping[str, Scalar],
    seed: int,
) -> Cell:
    """The cell of one arm and seed, with its key."""
    key = cell_key(claim=claim, code=code, size=size, config=trial.sizes[size], arm=arm, hp=hp, seed=seed)
    return Cell(ref, size, arm, dict(hp), seed, key, trial.timeout, code)
