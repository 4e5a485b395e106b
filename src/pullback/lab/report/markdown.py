"""The pages in Markdown: the same words and tables, with every stranger's character escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pullback.lab.report.index import Row, index_rows
from pullback.lab.report.model import Section, Table
from pullback.lab.report.text import markdown as plain

if TYPE_CHECKING:
    from pullback.lab.result import TrialResult

_LONG = 4_000


def table(t: Table) -> str:
    """A Markdown table.

    Args:
        t: plain text.

    Returns:
        The table, without an end of line.
    """
    align = ["---:" if column in t.numeric else "---" for column in range(len(t.head))]
    rows = [t.head, align, *t.rows]
    return "\n".join(
        "| " + " | ".join(cell if row is align else plain(cell, 400) for cell in row) + " |" for row in rows
    )


def study_page(title: str, summary: str, source: str, sections: Sequence[Section]) -> str:
    """The page of one room or trial.

    Args:
        title: heading.
        summary: one line, may be empty.
        source: where the method comes from, may be empty.
        sections: its trials.

    Returns:
        Markdown.
    """
    parts = [f"# {plain(title, 200)}", plain(summary, 300), plain(source, 600)]
    for s in sections:
        parts += _section(s)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(s: Section) -> list[str]:
    smoke = " (smoke size: no verdict)" if s.smoke else ""
    parts = [
        f"## {plain(s.title, 200)}",
        f"**{s.mark} {s.word}{f', {plain(s.note)}' if s.note else ''}**{smoke}. {plain(s.sentence, _LONG)}",
        plain(s.headline, 400),
    ]
    parts += [f"**Claim.** {plain(s.claim, _LONG)}" if s.claim else ""]
    parts += [f"**Refuted if** {plain(s.refuted_if, _LONG)}" if s.refuted_if else ""]
    if s.paper is not None:
        parts += ["### The paper beside this run", table(s.paper), plain(s.paper_note, _LONG)]
    parts += ["### Every seed", f"{plain(s.seeds.caption, 200)}.", table(s.seeds)]
    if s.failures:
        parts += ["### Runs that did not finish"]
        parts += ["\n".join(f"- {plain(what, 300)}: {plain(error, 600)}" for what, error in s.failures)]
    if s.comparisons is not None:
        parts += ["### All comparisons", table(s.comparisons)]
    parts += ["### Hyperparameters and tuning", plain(s.tuning_note, 600), table(s.settings)]
    for heading, text in s.texts:
        parts += [f"### {heading}", plain(text, _LONG)]
    parts += ["### Run it again", f"    {s.command}"]
    parts += ["\n".join(f"- {plain(key)}: {plain(value, 500)}" for key, value in s.provenance)]
    return parts


def index_page(rows: Sequence[Row], trials: Sequence[Row]) -> str:
    """The index.

    Args:
        rows: rooms.
        trials: trials of the user's own.

    Returns:
        Markdown.
    """
    parts = [
        "# Methods and their evidence",
        _rows(rows, adjusted=True) if rows else "Nothing has been run yet.",
    ]
    if trials:
        parts += ["## Your own trials", _rows(trials, adjusted=False)]
    return "\n\n".join(parts) + "\n"


def _rows(rows: Sequence[Row], *, adjusted: bool) -> str:
    head = ["Method", "For", "Verdict", "Measured here", "Paper", *(["After Holm"] if adjusted else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        name = f"[{plain(r.title)}]({r.page.removesuffix('.html')}.md)" if r.page else plain(r.title)
        ours = f"{plain(r.ours)} {plain(r.ours_interval)}".strip()
        cells = [
            f"{name}: {plain(r.subtitle, 200)}",
            plain(r.capability),
            f"{r.mark} {r.word} {plain(r.note)}".strip(),
            ours,
            plain(r.paper),
        ]
        lines.append("| " + " | ".join([*cells, *([r.adjusted] if adjusted else [])]) + " |")
    return "\n".join(lines)


def methods_table(results: Mapping[str | None, Sequence[TrialResult]]) -> str:
    """The table of all methods for a README: what each is for, the verdict and the numbers.

    Args:
        results: trials by room, as `read_evidence` gives them; rooms without any are listed as not run yet.

    Returns:
        A Markdown table, generated from the rooms' facts and the evidence.
    """
    rooms = [room for room, trials in results.items() if room is not None and trials]
    rows = index_rows(results, dict.fromkeys(rooms, ""))
    head = "| Method | For | What it does | Verdict | Measured here | Paper |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        ours = f"{plain(r.ours)} {plain(r.ours_interval)}".strip()
        word = f"{r.adjusted_mark} {r.adjusted}" if r.adjusted_mark else f"{r.mark} {r.word}"
        word += f", {plain(r.note)}" if r.note else ""
        cells = [f"`{r.key}`", plain(r.capability), plain(r.subtitle, 200), word, ours, plain(r.paper)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
