"""Progress of a running trial: a live bar on a terminal, one line per cell elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from pullback.lab.cli.terminal import clean, say
from pullback.lab.engine import CellFinished, Event, Finished, LeakChecked, Started


class Progress(Protocol):
    """Listens to the events of one or more trials."""

    def __enter__(self) -> Progress: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __call__(self, event: Event) -> None:
        """Take note of ``event``."""


def make_progress(*, quiet: bool) -> Progress:
    """A bar on a terminal, lines elsewhere, silence when ``quiet``."""
    if quiet:
        return Silent()
    return Bars() if sys.stdout.isatty() else Lines()


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: ``8 s``, ``3 min 05 s``, ``1 h 02 min``."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{arm} {value:.3g}" for arm, value in scores.items())


class Silent:
    """No progress at all."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""

    def __call__(self, event: Event) -> None:
        """Ignore ``event``."""


class Lines(Silent):
    """One plain line per event, for logs and pipes."""

    def __call__(self, event: Event) -> None:
        """Print ``event``."""
        if isinstance(event, Started):
            kept = f", {event.cached} of them kept from before" if event.cached else ""
            say(f"{event.label}: {event.title} ({event.phase}, {event.size}, {event.total} cells{kept})")
        elif isinstance(event, CellFinished):
            c = event.cell
            left = "" if event.remaining is None else f", about {duration(event.remaining)} left"
            ended = "" if c.status == "done" else f" {c.status.upper()}"
            say(f"  {event.done}/{event.total} {c.arm}, seed {c.seed}{ended}, {c.seconds:.1f} s{left}")
        elif isinstance(event, LeakChecked):
            say(f"  {event.arm}, seed {event.seed}, run again: the same numbers bit for bit")
        elif isinstance(event, Finished):
            say(f"  {event.ran} cells run in {duration(event.seconds)}")


class Bars:
    """A live bar per trial with cells done, time left and the running score of each arm."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console()
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[scores]}", markup=False, style="dim"),
            console=self._console,
        )
        self._tasks: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show ``event``."""
        if isinstance(event, LeakChecked):
            return
        key = (event.label, event.phase)
        if isinstance(event, Started):
            self._tasks[key] = self._bars.add_task(
                clean(event.label), total=event.total, completed=event.cached, left="", scores=""
            )
        elif isinstance(event, CellFinished):
            left = "" if event.remaining is None else f"{duration(event.remaining)} left"
            self._bars.update(
                self._tasks[key], completed=event.done, left=left, scores=clean(_scores(event.scores))
            )
        elif key in self._tasks:
            self._bars.update(self._tasks[key], left=duration(event.seconds))
