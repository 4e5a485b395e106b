"""The index: one `Row` per room or trial, with Holm's correction over all rooms."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pullback.lab.report.model import MARKS, claim_text, gain, main_comparison, reduction, unit_of
from pullback.lab.report.text import DASH, clean, clean_block, difference, interval, number
from pullback.lab.result import Comparison, TrialResult


@dataclass(frozen=True)
class Row:
    """One line of the index: a room or a user's trial."""

    key: str
    title: str
    subtitle: str
    capability: str
    claim: str
    word: str
    mark: str
    ours: str
    ours_interval: str
    seeds: str
    paper: str
    adjusted: str
    adjusted_mark: str
    note: str
    page: str
    smoke: bool
    comparison: Comparison | None = None


def index_rows(results: Mapping[str | None, Sequence[TrialResult]], pages: Mapping[str, str]) -> list[Row]:
    """One row per room: those with evidence first, then those that the library has and nobody ran yet.

    Args:
        results: trials by room; those under None are left out.
        pages: page of every room that has one.

    Returns:
        Rows in alphabetical order within each group.
    """
    facts = _facts()
    mains = {room: trials[0] for room, trials in results.items() if room is not None and trials}
    adjusted = holm_words(mains)
    rows = [_row(room, mains[room], facts.get(room), pages[room], adjusted[room]) for room in sorted(mains)]
    for room in sorted(set(facts) - set(mains)):
        fact = facts[room]
        rows.append(
            Row(
                key=room, title=room, subtitle=clean(fact.summary, 120), capability=clean(fact.capability, 30),
                claim=clean_block(fact.claim, 300), word="not run yet", mark=MARKS["not run yet"], ours=DASH,
                ours_interval="", seeds="", paper=DASH, adjusted=DASH, adjusted_mark="", note="", page="", smoke=False,
            )
        )  # fmt: skip
    return rows


def trial_rows(trials: Sequence[TrialResult], pages: Sequence[str]) -> list[Row]:
    """One row per trial of the user's own, in the given order.

    Args:
        trials: results without a room.
        pages: the page of each.

    Returns:
        The rows.
    """
    rows = [_row(trial.name, trial, None, page, DASH) for trial, page in zip(trials, pages, strict=True)]
    return [
        replace(row, title=clean(trial.title), subtitle=clean(f"{file}:{trial.name}" if file else trial.name))
        for row, trial in zip(rows, trials, strict=True)
        for file in [trial.declaration.get("file")]
    ]


def _row(key: str, result: TrialResult, fact: Any, page: str, adjusted: str) -> Row:
    c, unit = main_comparison(result), unit_of(result)
    ours, ours_interval = DASH, ""
    if c is not None and math.isfinite(c.difference):
        ours = difference(c.difference, unit_of(result, c.metric))
        ours_interval = interval(c.low, c.high, unit_of(result, c.metric))
    paper, printed = result.declaration.get("paper") or {}, DASH
    if gain(paper, result) is not None:
        printed = f"{number(paper.get('baseline'), unit)} → {number(paper.get('method'), unit)}"
    return Row(
        key=clean(key),
        title=clean(key),
        subtitle=clean(fact.summary if fact else result.title, 160),
        capability=clean(fact.capability, 30) if fact else "",
        claim=claim_text(result.declaration.get("claim"), result),
        word=result.verdict.word,
        mark=MARKS.get(result.verdict.word, DASH),
        ours=ours,
        ours_interval=ours_interval,
        seeds=f"{c.n} seeds" if c is not None else "",
        paper=printed,
        adjusted=adjusted,
        adjusted_mark=MARKS.get(adjusted, ""),
        note=reduction(result),
        page=page,
        smoke=result.size != "full",
        comparison=c,
    )


def holm_words(mains: Mapping[str, TrialResult]) -> dict[str, str]:
    """Verdict of every room after Holm's correction over all tested rooms.

    A room stays 'supported' only if its claim survives the correction (`pullback.lab.statistics.family_p`); other
    words cannot become stronger.

    Args:
        mains: main trial by room.

    Returns:
        Word by room.
    """
    tested = {
        room: c
        for room, r in mains.items()
        if (c := main_comparison(r)) is not None and c.word != "not tested"
    }
    words = {room: r.verdict.word for room, r in mains.items()}
    statistics = importlib.import_module("pullback.lab.statistics")
    p_values = statistics.holm([statistics.family_p(c) for c in tested.values()])
    adjusted = {room: p for room, p in zip(tested, p_values, strict=True) if math.isfinite(p)}
    return {
        room: "inconclusive"
        if word == "supported" and not float(adjusted.get(room, 1.0)) < 0.05
        else str(word)
        for room, word in words.items()
    }


def _facts() -> Mapping[str, Any]:
    return importlib.import_module("pullback.core.facts").rooms()
