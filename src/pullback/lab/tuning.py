"""Equal tuning for every arm: the same number of quasi-random points, the same shared values, the same seeds."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pullback.lab.declare import Choice, Domain, LogUniform, Scalar, Study, Trial, Tune
from pullback.lab.engine.errors import TrialError

TRACE_HASH = "trace_sha256"
EDGE = 0.05  # the outer share of a domain that counts as its edge
STREAM = 20151106  # seed of the scrambling; fixed, so that every run of a tuning tries the same points


@dataclass(frozen=True)
class Settings:
    """The hyperparameters that every arm runs with and where they came from.

    Args:
        hp: by arm.
        tuned: whether a tuning chose them.
        note: what the reader of the result should know about it.
        trace_sha256: hash of the tuning's trace, or "".
    """

    hp: Mapping[str, Mapping[str, Scalar]]
    tuned: bool
    note: str = ""
    trace_sha256: str = ""


# --- points --------------------------------------------------------------------------------------------------------


def domains_of(tune: Tune, arm: str) -> dict[str, Domain]:
    """The domains that ``arm`` tunes: the shared ones, then its own."""
    return {**tune.shared, **tune.only.get(arm, {})}


def points_of(tune: Tune, arm: str) -> list[dict[str, Scalar]]:
    """The points that ``arm`` tries; empty for an arm that has nothing to tune.

    Shared hyperparameters take the same values, in the same order, in every arm. Choices alone are enumerated when
    all their combinations fit into the budget.

    Args:
        tune: the declared budget and domains.
        arm: name of the arm.
    """
    domains = domains_of(tune, arm)
    if not domains:
        return []
    _check(tune, domains)
    choices = [d.values for d in domains.values() if isinstance(d, Choice)]
    if len(choices) == len(domains) and math.prod(map(len, choices)) <= tune.trials:
        return [dict(zip(domains, values, strict=True)) for values in product(*choices)]
    unit = _unit_points(tune)
    columns = {
        name: _values(domain, unit[:, position], tune.trials)
        for position, (name, domain) in enumerate(domains.items())
    }
    return [{name: columns[name][index] for name in domains} for index in range(tune.trials)]


def _check(tune: Tune, domains: Mapping[str, Domain]) -> None:
    if tune.trials < 1:
        raise TrialError(f"Tune.trials must be >= 1, got {tune.trials}. Set tune=None to skip tuning.")
    for name, domain in domains.items():
        if isinstance(domain, Choice):
            if not domain.values:
                raise TrialError(f"the domain of {name!r} has no values. Give Choice at least one.")
            continue
        lowest = 0.0 if isinstance(domain, LogUniform) else -math.inf
        if not (lowest < domain.low < domain.high < math.inf):
            bounds = f"low={domain.low}, high={domain.high}"
            raise TrialError(
                f"the domain of {name!r} must have low < high (positive for LogUniform), got {bounds}."
            )


def _unit_points(tune: Tune) -> np.ndarray:
    """Points of one scrambled Halton sequence, ``[trials, coordinates]``, the same ones for every arm.

    Shared hyperparameters come first. An arm's own ones take the coordinates after them: with a sequence of their own
    they would repeat the base of the first coordinate, and each of their values would meet one range of it only.
    """
    from scipy.stats import qmc

    width = len(tune.shared) + max(map(len, tune.only.values()), default=0)
    return qmc.Halton(width, scramble=True, rng=np.random.default_rng(STREAM)).random(tune.trials)


def _values(domain: Domain, column: np.ndarray, count: int) -> list[Scalar]:
    """A domain's value at each coordinate; each choice comes equally often."""
    if isinstance(domain, Choice):
        ranks = np.argsort(np.argsort(column))  # the rank of a coordinate, not its value, picks the choice
        return [domain.values[int(r) * len(domain.values) // count] for r in ranks]
    return [value_at(domain, float(u)) for u in column]


def value_at(domain: Domain, u: float) -> Scalar:
    """The value of a continuous domain at the share ``u`` in [0, 1] of its length."""
    if isinstance(domain, Choice):
        return domain.values[min(int(u * len(domain.values)), len(domain.values) - 1)]
    if isinstance(domain, LogUniform):
        return float(math.exp(math.log(domain.low) + u * (math.log(domain.high) - math.log(domain.low))))
    return float(domain.low + u * (domain.high - domain.low))


def edges(
    domains: Mapping[str, Domain], best: Mapping[str, Scalar], tried: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    """Hyperparameters whose best value is the lowest or highest one tried, or lies at an end of its domain.

    Args:
        domains: the arm's domains.
        best: the best point.
        tried: all points, each with its ``hp``.
    """
    found = []
    for name, domain in domains.items():
        value = best[name]
        if isinstance(domain, Choice):
            at_edge = len(domain.values) > 2 and value in {domain.values[0], domain.values[-1]}
        else:
            values = [float(point["hp"][name]) for point in tried]
            extreme = len(values) > 2 and value in {min(values), max(values)}
            at_edge = extreme or not EDGE <= _share(domain, float(value)) <= 1 - EDGE
        if at_edge:
            found.append(name)
    return tuple(found)


def ranked(
    domains: Mapping[str, Domain], tried: Sequence[dict[str, Any]], lost: Sequence[int], sign: float
) -> list[dict[str, Any]]:
    """All points, best first: of equal scores fewer failures win, then distance from the edges, then the earlier one.

    Args:
        domains: the arm's domains.
        tried: all points, each with its ``hp`` and ``score``.
        lost: by point, how many of its runs failed.
        sign: 1 if higher scores are better, else -1.
    """

    def place(i: int) -> tuple[float, int, int]:
        return -sign * tried[i]["score"], lost[i], len(edges(domains, tried[i]["hp"], tried))

    return [tried[i] for i in sorted(range(len(tried)), key=place)]


def _share(domain: Any, value: float) -> float:
    if isinstance(domain, LogUniform):
        return math.log(value / domain.low) / math.log(domain.high / domain.low)
    return (value - domain.low) / (domain.high - domain.low)


# --- tuned.toml ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """What a tuning chose.

    Args:
        hp: the best point of each tuned arm, over its defaults.
        traces: by arm, every point with ``hp``, ``score`` and ``seconds``, best first.
        at_edge: by arm, the hyperparameters whose best value lies at an edge.
        trace_sha256: hash of the traces.
        path: the file that was written, or None.
    """

    hp: Mapping[str, Mapping[str, Scalar]]
    traces: Mapping[str, list[dict[str, Any]]]
    at_edge: Mapping[str, tuple[str, ...]]
    trace_sha256: str
    path: Path | None = None
    warnings: tuple[str, ...] = field(default=())


def trace_hash(traces: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """SHA-256 of every point and score of a tuning; durations are left out, they differ from run to run."""
    kept = {
        arm: [{"hp": dict(p["hp"]), "score": repr(float(p["score"]))} for p in trace]
        for arm, trace in traces.items()
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def room_folder(room: str) -> Path:
    """The folder of a room."""
    return Path(str(importlib.import_module(f"pullback.methods.{room}").__file__)).parent


def write_tuned(path: Path, study: str, hp: Mapping[str, Mapping[str, Scalar]], sha256: str) -> None:
    """Put a study's tuned values into ``tuned.toml``, beside those of the room's other studies, in one step."""
    document = read_tuned(path)
    document[study] = {arm: dict(values) for arm, values in hp.items()} | {TRACE_HASH: sha256}
    lines = [
        "# Chosen by `pullback tune` with an equal budget for every arm; rerun it instead of editing.",
        "",
    ]
    for name in sorted(document):
        table = document[name]
        lines += [f"[{_quoted(name)}]", f"{TRACE_HASH} = {_quoted(str(table.get(TRACE_HASH, '')))}", ""]
        for arm in sorted(key for key in table if key != TRACE_HASH):
            lines.append(f"[{_quoted(name)}.{_quoted(arm)}]")
            lines += [f"{_quoted(key)} = {_toml(value)}" for key, value in sorted(table[arm].items())]
            lines.append("")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("\n".join(lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise TrialError(f"{path} cannot be written: {reason}. Check free space and permissions.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _quoted(text: str) -> str:
    """A TOML basic string, valid as a key and as a value."""
    return json.dumps(text, ensure_ascii=False)


def _toml(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _quoted(value) if isinstance(value, str) else repr(value)


def read_tuned(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a ``tuned.toml``; empty when there is none.

    Raises:
        TrialError: if it is no valid TOML of tables.
    """
    if not path.is_file():
        return {}
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrialError(f"{path} cannot be read: {error}. Run `pullback tune` again.") from error
    if not all(isinstance(table, dict) for table in document.values()):
        raise TrialError(f"{path} must hold one table per study. Run `pullback tune` again.")
    return document


def settings_of(trial: Trial) -> Settings:
    """The hyperparameters of every arm: the defaults, overridden by the room's ``tuned.toml``.

    Raises:
        TrialError: if ``tuned.toml`` names an arm that the study does not have.
    """
    arms = trial.arms.names()
    defaults = {arm: trial.hyperparameters(arm) for arm in arms}
    if not isinstance(trial, Study):
        return Settings(defaults, tuned=False, note="Hyperparameters as declared." if trial.tune else "")
    path = room_folder(trial.room) / "tuned.toml"
    table = read_tuned(path).get(trial.name)
    if table is None:
        note = "No tuned values yet: every arm ran with its declared defaults." if trial.tune else ""
        return Settings(defaults, tuned=False, note=note)
    chosen = {arm: values for arm, values in table.items() if isinstance(values, dict)}
    unknown = sorted(set(chosen) - set(arms))
    if unknown:
        raise TrialError(
            f"{path} tunes arm {unknown[0]!r}, which is not declared. Run `pullback tune {trial.room}`."
        )
    hp = {arm: {**defaults[arm], **chosen.get(arm, {})} for arm in arms}
    return Settings(hp, tuned=bool(chosen), trace_sha256=str(table.get(TRACE_HASH, "")))
