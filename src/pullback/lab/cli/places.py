"""Where results are: the store and report of an output folder, and the committed evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pullback
from pullback.lab.declare import Drawing, Figure
from pullback.lab.engine import StudyRef
from pullback.lab.evidence import read_evidence
from pullback.lab.result import TrialResult
from pullback.lab.store import Store

Results = dict[str | None, list[TrialResult]]
Drawings = dict[tuple[str, str], Sequence[Figure]]


def store_path(out: Path) -> Path:
    """The store of an output folder."""
    return out / "store.sqlite"


def evidence_folder() -> Path | None:
    """``evidence/`` of the source checkout, else of the current folder, else None."""
    root = Path(pullback.__file__).resolve().parents[2]
    places = [root] if (root / "pyproject.toml").is_file() else []
    return next((p / "evidence" for p in [*places, Path.cwd()] if (p / "evidence").is_dir()), None)


def committed() -> Results:
    """Evidence that ships with the source, by room."""
    folder = evidence_folder()
    return {} if folder is None else dict(read_evidence(folder))


def stored(out: Path) -> Results:
    """What an output folder's store holds, by room; a full run hides a smoke run of the same trial."""
    path = store_path(out)
    if not path.is_file():
        return {}
    with Store(path, read_only=True) as store:
        found = store.results()
    latest: dict[tuple[str | None, str, str], TrialResult] = {}
    for result in sorted(found, key=lambda r: r.size != "smoke"):
        latest[result.room, str(result.declaration.get("file")), result.name] = result
    by_room: Results = {}
    for result in latest.values():
        by_room.setdefault(result.room, []).append(result)
    return {room: declared_order(room, results) for room, results in by_room.items()}


def declared_order(room: str | None, results: list[TrialResult]) -> list[TrialResult]:
    """Results of a room in the order in which its studies are declared, the main one first."""
    names = [] if room is None else declared_names(room)
    return sorted(results, key=lambda r: names.index(r.name) if r.name in names else len(names))


def declared_names(room: str) -> list[str]:
    """Names of a room's studies in the order of their declaration; none of a room that is not installed any more."""
    from pullback.lab.engine import TrialError, studies_of

    try:
        return [study.name for study in studies_of(room)]
    except TrialError:  # what such a room measured stays readable
        return []


def drawings(refs: Sequence[StudyRef]) -> Drawings:
    """Figures of users' files that hold drawings; asked for before a run, since files are edited meanwhile."""
    found: Drawings = {}
    for ref in refs:
        drawn = ref.resolve().figures if ref.file is not None else ()
        if any(isinstance(figure, Drawing) for figure in drawn):
            found[Path(str(ref.file)).name, ref.name] = drawn
    return found


def report(out: Path, *, with_evidence: bool, figures: Drawings | None = None) -> Path:
    """Write the report of an output folder and return its index page; ``figures`` are those of a user's file."""
    from pullback.lab.report import write_report

    results = {**(committed() if with_evidence else {}), **stored(out)}
    return Path(write_report(results, out / "report", figures=figures))
