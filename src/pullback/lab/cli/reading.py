"""Commands that read what is there: list, show, report and serve."""

from __future__ import annotations

import os
import sys
import webbrowser
from importlib import resources
from pathlib import Path

from pullback.core.citation import cite
from pullback.core.facts import facts, rooms
from pullback.lab.cli import places
from pullback.lab.cli.terminal import clean, page, say
from pullback.lab.result import TrialResult


def _word(results: list[TrialResult] | None) -> str:
    if not results:
        return "not run yet"
    verdict = results[0].verdict
    return f"{verdict.word}, reduces to {verdict.reduces_to}" if verdict.reduces_to else verdict.word


def list_rooms() -> None:
    """Print a table of all rooms."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    evidence = places.committed()
    table = Table(box=None, pad_edge=False)
    for column in ("capability", "room", "kind", "verdict", "summary"):
        table.add_column(column, no_wrap=column in {"capability", "room", "kind"})
    for room, known in sorted(rooms().items(), key=lambda item: (item[1].capability, item[0])):
        cells = (known.capability, room, known.kind, _word(evidence.get(room)), known.summary)
        table.add_row(*(Text(clean(cell)) for cell in cells))
    # A pipe gets every column in full; a terminal wraps to its own width.
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def show_room(room: str) -> None:
    """Print a room's facts, evidence, page and citation.

    Raises:
        UnknownRoomError: if there is no such room; the message names the nearest one.
    """
    known = facts(room)
    say(f"{room}: {known.summary}")
    say(f"{known.title}. {', '.join(known.authors)}. {known.venue} {known.year}. arXiv {known.arxiv}")
    say(f"kind {known.kind}, capability {known.capability}, from pullback import {', '.join(known.exports)}")
    say(f"claim: {known.claim}")
    say()
    results = places.committed().get(room)
    if not results:
        say(f"evidence: none yet. Run `pullback study {room}`.")
    for result in results or []:
        say(f"evidence, {result.name}: {_word([result])}. {result.verdict.sentence}")
    text = resources.files(known.module) / "README.md"
    if text.is_file():
        say()
        page(text.read_text(encoding="utf-8"))
    say()
    page(cite(room))


def write(out: Path, *, show: bool) -> int:
    """Write the report; opens it on request and says so in words when there is no display."""
    index = places.report(out, with_evidence=True)
    say(f"report: {index}")
    if show and not (_display() and webbrowser.open(index.resolve().as_uri())):
        say("no browser can be opened here; open the file above, or run `pullback serve`.")
    return 0


def _display() -> bool:
    """Whether a window could appear: without one, a text browser would take over the terminal."""
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(shown) or sys.platform in {"darwin", "win32"}


def serve_report(out: Path, *, host: str, port: int, show: bool) -> int:
    """Serve the report folder until interrupted; writes the report first when there is none.

    Raises:
        UsageError: if host or port is none.
    """
    from pullback.lab.cli.running import UsageError
    from pullback.lab.report import serve

    folder = out / "report"
    if not (folder / "index.html").is_file():
        places.report(out, with_evidence=True)
    try:
        serve(folder, host=host, port=port, open_browser=show and _display())
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0
