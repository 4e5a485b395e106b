"""What the pages show, as plain text: one `Section` per trial."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pullback.lab.report.text import (
    DASH,
    bare_number,
    clean,
    clean_block,
    difference,
    file_stem,
    interval,
    number,
    p_value,
    scalar,
)
from pullback.lab.result import ArmResult, CellResult, Comparison, TrialResult

MARKS: Mapping[str, str] = {
    "supported": "●",
    "refuted": "✕",
    "inconclusive": "◐",
    "not tested": "○",
    "not run yet": DASH,
}
"""A sign for every verdict, so that none is told by colour alone."""
_ROLES = {"other": "also shown", "ceiling": "upper bound"}


@dataclass(frozen=True)
class Table:
    """A table of plain text; columns in ``numeric`` are set flush right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """One trial of a page, ready to be written."""

    anchor: str
    name: str
    title: str
    word: str
    mark: str
    note: str
    sentence: str
    headline: str
    smoke: bool
    claim: str
    refuted_if: str
    paper: Table | None
    paper_note: str
    seeds: Table
    failures: tuple[tuple[str, str], ...]
    settings: Table
    tuning_note: str
    comparisons: Table | None
    texts: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
    command: str


def unit_of(result: TrialResult, metric: str | None = None) -> str:
    """Unit of ``metric`` (None: the primary one), or an empty text."""
    primary = result.declaration.get("primary") or {}
    if metric in (None, primary.get("name")):
        return str(primary.get("unit", ""))
    return str((result.declaration.get("metrics") or {}).get(metric, {}).get("unit", ""))


def reduction(result: TrialResult) -> str:
    """``reduces to <rival>``, or nothing where the method beat every rival."""
    rival = result.verdict.reduces_to
    return f"reduces to {clean(rival, 40)}" if rival else ""


def main_comparison(result: TrialResult) -> Comparison | None:
    """The comparison that carries the main claim, if it was made."""
    return next((c for c in result.comparisons if c.role == "claim"), None)


def section(result: TrialResult) -> Section:
    """Turn a result into the texts and tables of its section.

    Args:
        result: one trial.

    Returns:
        The section, without drawings.
    """
    told = result.declaration
    paper = told.get("paper") or {}
    texts = [
        ("What this study cannot test", clean_block(told.get("cannot_test") or "")),
        ("How it differs from the paper", clean_block(told.get("deviations") or "")),
    ]
    return Section(
        anchor=f"study-{file_stem(result.name)}",
        name=clean(result.name),
        title=clean(result.title, 200),
        word=result.verdict.word,
        mark=MARKS.get(result.verdict.word, DASH),
        note=reduction(result),
        sentence=_unbroken(clean_block(result.verdict.sentence, 1_000)),
        headline=headline(result),
        smoke=result.size != "full",
        claim=claim_text(told.get("claim"), result),
        refuted_if=clean_block(told.get("refuted_if") or ""),
        paper=_paper_table(result) if paper else None,
        paper_note=_sentences(paper.get("where"), paper.get("setting"), paper.get("note")),
        seeds=_seed_table(result),
        failures=tuple(_failures(result.cells)),
        settings=_settings_table(result.arms),
        tuning_note=_sentences(_tuning_note(result.arms), told.get("note")),
        comparisons=_comparison_table(result),
        texts=tuple((title, text) for title, text in texts if text),
        provenance=tuple(_provenance(result)),
        command=command_of(result),
    )


def _unbroken(text: str) -> str:
    """Keep '95 %' and 'p = 0.01' on one line."""
    text = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)
    return re.sub(r"\bp ([=<]) (?=\d)", "p\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)


def _sentences(*texts: object) -> str:
    shown = [clean_block(text, 600).strip() for text in texts if text]
    return " ".join(text if text.endswith((".", "!", "?", ")")) else f"{text}." for text in shown if text)


def headline(result: TrialResult) -> str:
    """The main difference with its interval and the number of seeds, where the verdict's sentence lacks it."""
    c = main_comparison(result)
    if c is None or not math.isfinite(c.difference) or "interval" in result.verdict.sentence:
        return ""  # the sentence says it already
    unit = unit_of(result, c.metric)
    return (
        f"{difference(c.difference, unit)}, 95 % interval {interval(c.low, c.high, unit)}, {c.n} paired seeds"
    )


def claim_text(claim: Any, result: TrialResult | None = None) -> str:
    """A declared claim in words; it may be text already or the fields of `Greater` and `Equivalent`."""
    if isinstance(claim, str):
        return clean_block(claim, 600)
    if not isinstance(claim, Mapping) or "arm" not in claim:
        return ""
    arm, than = clean(claim["arm"]), clean(claim.get("than", ""))
    metric = claim.get("metric")
    name = metric.get("name") if isinstance(metric, Mapping) else metric
    unit = unit_of(result, name) if result is not None else ""
    shown = name or ((result.declaration.get("primary") or {}).get("name", "") if result is not None else "")
    on = f" in {clean(shown).replace('_', ' ')}" if shown else ""
    if "within" in claim or claim.get("kind") == "equivalent":
        margin = claim.get("within", claim.get("margin"))
        return f"{arm} and {than} differ by less than {difference(margin, unit).lstrip('+')}{on}."
    margin = claim.get("by", claim.get("margin", 0.0))
    by = f" by more than {difference(margin, unit).lstrip('+')}" if margin else ""
    return f"{arm} is better than {than}{by}{on}."


def command_of(result: TrialResult) -> str:
    """The command that reproduces a result."""
    size = clean(result.size, 20)
    if result.room is None:
        file = clean(result.declaration.get("file") or "FILE.py")
        return f"pullback trial {shlex.quote(f'{file}:{clean(result.name)}')} --size {size}"
    return f"pullback study {clean(result.room)} --size {size}"


# --- tables --------------------------------------------------------------------------------------------------------


def _arm_means(result: TrialResult, metric: str | None = None) -> dict[str, float]:
    scores = {arm.name: result.scores(arm.name, metric) for arm in result.arms}
    return {name: math.fsum(s.values()) / len(s) for name, s in scores.items() if s}


def _paper_table(result: TrialResult) -> Table:
    """The paper's numbers and ours side by side; they are never averaged or compared by a test."""
    paper, unit, means = result.declaration["paper"], unit_of(result), _arm_means(result)
    by_role = {arm.role: arm.name for arm in result.arms}
    rows = []
    for role in ("baseline", "method", "ceiling"):
        if role in by_role:
            name = by_role[role]
            rows.append((clean(name), number(paper.get(role), unit), number(means.get(name), unit)))
    printed = gain(paper, result)
    if printed is not None:
        ours = means.get(by_role.get("method", ""), math.nan) - means.get(
            by_role.get("baseline", ""), math.nan
        )
        rows.append(("gain", difference(printed, unit), difference(ours, unit)))
    return Table(("arm", "paper", "here"), tuple(rows), "The paper's numbers beside ours", frozenset({1, 2}))


def gain(paper: Mapping[str, Any], result: TrialResult) -> float | None:
    """What the paper's method gained over its baseline, where it printed both and there are arms to compare."""
    low, high = paper.get("baseline"), paper.get("method")
    known = isinstance(low, int | float) and isinstance(high, int | float)
    return float(high) - float(low) if known and len(result.arms) > 1 else None


def _seed_table(result: TrialResult) -> Table:
    unit = unit_of(result)
    scores = {arm.name: result.scores(arm.name) for arm in result.arms}
    status = {(c.arm, c.seed): c.status for c in result.cells}
    seeds = sorted({c.seed for c in result.cells})
    rows = []
    for arm in result.arms:
        cells = []
        for seed in seeds:
            state = status.get((arm.name, seed))
            value = bare_number(scores[arm.name].get(seed), unit)
            cells.append(
                DASH if state is None else value if state == "done" else f"{value} {MARKS['refuted']}"
            )
        mean = bare_number(_arm_means(result).get(arm.name), unit)
        rows.append((clean(arm.name), _ROLES.get(arm.role, clean(arm.role, 20)), mean, *cells))
    primary = clean((result.declaration.get("primary") or {}).get("name", "score")).replace("_", " ")
    suffix = " in per cent" if unit == "fraction" else f" in {clean(unit, 20)}" if unit else ""
    head = ("arm", "role", "mean", *(f"seed {seed}" for seed in seeds))
    failed = any(state != "done" for state in status.values())
    note = f"; {MARKS['refuted']} marks a run that did not finish" if failed else ""
    return Table(head, tuple(rows), f"{primary}{suffix}{note}", frozenset(range(2, len(head))))


def _failures(cells: Sequence[CellResult]) -> list[tuple[str, str]]:
    bad = [c for c in cells if c.status != "done"]
    return [
        (f"{clean(c.arm)}, seed {c.seed}: {c.status}", clean_block(c.error or "no message", 3_000))
        for c in bad
    ]


def _settings_table(arms: Sequence[ArmResult]) -> Table:
    names = sorted({name for arm in arms for name in arm.hp})
    rows = [
        (
            clean(arm.name),
            *(scalar(arm.hp[name]) if name in arm.hp else DASH for name in names),
            str(len(arm.tuning)) if arm.tuning else "not tuned",
            ", ".join(clean(edge, 30) for edge in arm.at_edge) or DASH,
        )
        for arm in arms
    ]
    head = ("arm", *(clean(name, 40) for name in names), "points tried", "best value at an edge")
    return Table(head, tuple(rows), "Hyperparameters of every arm", frozenset(range(1, len(names) + 2)))


def _tuning_note(arms: Sequence[ArmResult]) -> str:
    edge = [clean(arm.name) for arm in arms if arm.at_edge]
    if edge:
        return (
            f"The best value lies at an edge of its range for {', '.join(edge)}: a wider range may do better."
        )
    budgets = {len(arm.tuning) for arm in arms}
    if len(budgets) > 1:
        return "The arms were not given the same number of tuning points."
    return ""


def _comparison_table(result: TrialResult) -> Table | None:
    if not result.comparisons:
        return None
    rows = []
    for c in result.comparisons:
        unit = unit_of(result, c.metric)
        kind = "is no different from" if c.kind == "equivalent" else "beats"
        role = {"claim": "main claim", "rival": "rival", "also": "secondary"}.get(c.role, c.role)
        told = f"{clean(c.arm)} {kind} {clean(c.than)}"
        if c.metric != result.declaration["primary"]["name"]:
            told += f" in {clean(c.metric).replace('_', ' ')}"
        wins = DASH if not math.isfinite(c.wins) else f"{round(c.wins * c.n)} of {c.n}"
        rows.append((
            told, role, f"{MARKS.get(c.word, DASH)} {c.word}", difference(c.difference, unit),
            interval(c.low, c.high, unit), p_value(c.p), bare_number(c.effect, signed=True), wins,
            difference(c.margin, unit).lstrip("+") if c.margin else "0",
        ))  # fmt: skip
    head = ("claim", "part", "verdict", "difference", "95 % interval", "p", "effect", "seeds won", "margin")
    return Table(head, tuple(rows), "Every comparison", frozenset({3, 4, 5, 6, 7, 8}))


def _provenance(result: TrialResult) -> list[tuple[str, str]]:
    seeds = result.declaration.get("seeds") or {}
    pairs: list[tuple[str, Any]] = [
        ("size", result.size),
        ("test seeds", ", ".join(str(s) for s in seeds.get("test", ()))),
        ("tuning seeds", ", ".join(str(s) for s in seeds.get("tune", ()))),
        ("claim hash", result.claim_hash),
        ("code hash", result.code_hash),
        ("runs", f"{len(result.cells)}, {sum(c.seconds for c in result.cells):.0f} s of training in all"),
        *((k, v) for k, v in sorted(result.provenance.items())),
    ]
    return [
        (clean(k, 40).replace("_", " "), clean(_flat(v), 400))
        for k, v in pairs
        if v not in ("", None, {}, [])
    ]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_flat(v)}" for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(_flat(v) for v in value)
    return scalar(value)
