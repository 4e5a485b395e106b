"""Put any training function on trial: find the declaration in a user's own file."""

from __future__ import annotations

from pathlib import Path

from pullback.lab.engine.errors import TrialError
from pullback.lab.engine.reference import StudyRef, nearest, trials_in_file


def load_trial(path: str | Path) -> StudyRef:
    """Find a trial in ``FILE.py`` or ``FILE.py:NAME``.

    Args:
        path: the file, with the trial's name after a colon when the file declares more than one.

    Returns:
        The reference that `run_trial` and its workers use.

    Raises:
        TrialError: if the file is missing, cannot be imported, or declares no such trial.
    """
    file, name = _split(str(path))
    if not file.is_file():
        raise TrialError(
            f"there is no file {str(file)!r}. Give the path of a Python file that declares a Trial."
        )
    absolute = str(file.resolve())
    trials = trials_in_file(absolute)
    if not trials:
        raise TrialError(
            f"{file} declares no Trial. Add `trial = Trial(title=..., run=..., arms=..., primary=...)`."
        )
    if name is None:
        if len(trials) > 1:
            raise TrialError(
                f"{file} declares several trials: {', '.join(trials)}. Choose one with {file}:NAME."
            )
        name = next(iter(trials))
    if name not in trials:
        raise TrialError(f"{file} has no trial {name!r}. {nearest(name, list(trials))}")
    return StudyRef(file=absolute, name=name)


def _split(text: str) -> tuple[Path, str | None]:
    """Split ``FILE.py:NAME``; a colon that belongs to the path (a drive letter) stays with it."""
    head, colon, tail = text.rpartition(":")
    if colon and head.endswith(".py") and "/" not in tail and "\\" not in tail:
        return Path(head), tail
    return Path(text), None
