"""Write a report folder: an index, one self-contained page per room or trial, and Markdown twins."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import pullback
from pullback.lab.declare import Figure
from pullback.lab.report import markdown
from pullback.lab.report.index import Row, index_rows, trial_rows
from pullback.lab.report.model import MARKS, Section, section
from pullback.lab.report.pictures import (
    Picture,
    declared_figures,
    draw_all,
    forest_picture,
    overview_picture,
    tuning_picture,
)
from pullback.lab.report.reuse import page_key, reusable, sealed
from pullback.lab.report.text import clean, clean_block, file_stem
from pullback.lab.result import TrialResult

Given: TypeAlias = Mapping[tuple[str, str], Sequence[Figure]]
"""Figures by trial name and its room, or its file's name where it has no room."""

_NO_SCRIPT = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Page:
    """Head of a page: what it is about and where its method comes from."""

    title: str
    summary: str = ""
    source: str = ""
    bibtex: str = ""


def write_report(
    results: Mapping[str | None, Sequence[TrialResult]],
    folder: str | Path,
    *,
    figures: Given | None = None,
) -> Path:
    """Write the pages of ``results``: readable from the file system, without a server, a network or JavaScript.

    Args:
        results: trials by room, the main one first; the key None holds the user's own trials.
        folder: where to write; files of the same names are replaced, others are left alone.
        figures: figures by (room or file name, trial name), for trials whose drawings no room holds.

    Returns:
        The index page.

    Raises:
        OSError: if the folder cannot be written; pages already there stay whole.
    """
    target = _made(Path(folder))
    given = figures or {}
    rooms = {room: list(trials) for room, trials in results.items() if room is not None and trials}
    own = list(results.get(None, ()))
    stems = _stems([str(room) for room in rooms], [_own_name(trial) for trial in own])
    pages: dict[str, str] = {}
    for (trials, page), stem in zip(_all_pages(rooms, own), stems, strict=True):
        sections = [section(trial) for trial in trials]
        pages[f"{stem}.md"] = markdown.study_page(page.title, page.summary, page.source, sections)
        pages[f"{stem}.html"] = _study_page(target / f"{stem}.html", page, trials, sections, given)
    names = dict(zip(rooms, (f"{stem}.html" for stem in stems), strict=False))
    rows = index_rows(results, names)
    trials = trial_rows(own, [f"{stem}.html" for stem in stems[len(rooms) :]])
    pages["index.md"] = markdown.index_page(rows, trials)
    pages["index.html"] = _index(
        rows, trials, overview_picture([(str(r), t[0]) for r, t in sorted(rooms.items())])
    )
    _write(target, pages)  # the index last: it never names a page that is not there yet
    return target / "index.html"


def _own_name(trial: TrialResult) -> str:
    """A trial's name, or its file's where it has only the default one."""
    file = trial.declaration.get("file")
    return Path(str(file)).stem if file and trial.name == "main" else trial.name


def _home(trial: TrialResult) -> tuple[str, str]:
    return str(trial.room or trial.declaration.get("file")), trial.name


def _stems(rooms: Sequence[str], trials: Sequence[str]) -> list[str]:
    """File stems, all different, also where a trial is called like a room or another file's trial."""
    taken: set[str] = set()
    stems = []
    for name in (*rooms, *trials):
        stem, count = file_stem(name), 2
        while stem in taken:
            stem, count = f"{file_stem(name)}-{count}", count + 1
        taken.add(stem)
        stems.append(stem)
    return stems


def _all_pages(
    rooms: Mapping[str, list[TrialResult]], own: Sequence[TrialResult]
) -> list[tuple[list[TrialResult], Page]]:
    facts: Mapping[str, Any] = importlib.import_module("pullback.core.facts").rooms() if rooms else {}
    pages = [(trials, _room_page(room, facts.get(room))) for room, trials in rooms.items()]
    return [*pages, *(([trial], Page(title=clean(trial.title, 200))) for trial in own)]


def _room_page(room: str, fact: Any) -> Page:
    if fact is None:
        return Page(title=clean(room))
    by = f"{', '.join(fact.authors[:3])}{' and others' if len(fact.authors) > 3 else ''}"
    where = f"{fact.venue} {fact.year}" + (f", arXiv {fact.arxiv}" if fact.arxiv else "")
    return Page(
        title=clean(room),
        summary=clean(fact.summary, 200),
        source=clean(f"{fact.title}. {by}. {where}.", 500),
        bibtex=clean_block(fact.bibtex, 3_000),
    )


def _study_page(
    path: Path, page: Page, trials: Sequence[TrialResult], sections: Sequence[Section], given: Given
) -> str:
    """The page of a room or trial, as it was when nothing that decides it has changed: drawing takes seconds.

    A page with drawings of a user's file is always drawn anew while the file is at hand, and kept as it is without it.
    """
    key = page_key(trials, page)
    kept = None if any(_home(t) in given for t in trials) else reusable(path, key)
    if kept is not None:
        return kept
    drawn = [_drawn(t, s, given, f"s{i}") for i, (t, s) in enumerate(zip(trials, sections, strict=True))]
    return sealed(_render("study.html.j2", page=page, sections=drawn, twin=path.with_suffix(".md").name), key)


def _drawn(result: TrialResult, told: Section, given: Given, prefix: str) -> Drawn:
    figures = given.get(_home(result)) or declared_figures(result)
    return Drawn(
        **vars(told),
        drawings=draw_all(result, figures, prefix),
        forest=forest_picture(result, prefix),
        tuning=tuning_picture(result, prefix),
    )


@dataclass(frozen=True, kw_only=True)
class Drawn(Section):
    """A section with its pictures."""

    drawings: list[Picture]
    forest: Picture | None
    tuning: Picture | None


def _index(rows: Sequence[Row], trials: Sequence[Row], picture: Picture | None) -> str:
    script = _asset("index.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    words = [row.word if row.adjusted not in MARKS else row.adjusted for row in rows]
    counts = {word: words.count(word) for word in MARKS if word in words}
    return _render(
        "index.html.j2",
        csp=f"{_NO_SCRIPT}; script-src 'sha256-{digest}'",
        script=Markup(script),
        rows=rows,
        trials=trials,
        trials_first=not any(row.page for row in rows),
        tally=", ".join(f"{count} {word}" for word, count in counts.items()) + "." if counts else "",
        capabilities=sorted({row.capability for row in rows if row.capability}),
        verdicts=[word for word in MARKS if any(row.word == word for row in rows)],
        picture_of_all=picture,
        twin="index.md",
    )


# --- templates and files -------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pullback.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _asset(name: str) -> str:
    """A file of ours; it goes into a page as it is."""
    return (files("pullback.lab.report") / "templates" / name).read_text(encoding="utf-8")


def _render(template: str, **values: Any) -> str:
    shared = {
        "csp": _NO_SCRIPT,
        "script": "",
        "css": Markup(_asset("style.css")),
        "version": pullback.__version__,
    }
    return _environment().get_template(template).render(**{**shared, **values})


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _write(folder: Path, pages: Mapping[str, str]) -> None:
    try:
        for name, text in pages.items():
            _replace(folder / name, text)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    why = error.strerror or str(error)
    return OSError(
        error.errno, f"cannot write the report to {folder}: {why}. Choose another folder with --out."
    )


def _replace(path: Path, text: str) -> None:
    """Write beside the old file and rename, so that a reader never meets half a page."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".page-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            os.unlink(name)
        raise
