"""How a driver and its workers find the same declaration: by room and name, or by file and name."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pullback.lab.declare import Study, Trial
from pullback.lab.engine.errors import TrialError

METHODS = "pullback.methods"


@dataclass(frozen=True)
class StudyRef:
    """Where a trial is declared; cheap to send to another process.

    Args:
        room: the room that holds the study, or None for a user's file.
        file: absolute path of the user's file, or None for a room.
        name: the trial's ``name``.
    """

    room: str | None = None
    file: str | None = None
    name: str = "main"

    def __post_init__(self) -> None:
        if (self.room is None) == (self.file is None):
            raise ValueError(
                f"StudyRef needs a room or a file, got room={self.room!r}, file={self.file!r}. Give one."
            )

    @classmethod
    def of_study(cls, study: Study) -> StudyRef:
        """The reference of a study that ships with a room."""
        return cls(room=study.room, name=study.name)

    @property
    def label(self) -> str:
        """Short text for progress and messages: ``room/name`` or ``file.py:name``."""
        return f"{self.room}/{self.name}" if self.file is None else f"{Path(self.file).name}:{self.name}"

    @property
    def source(self) -> str:
        """The file in which a user looks for a fault."""
        return self.file if self.file is not None else f"{METHODS}.{self.room}.study"

    def resolve(self) -> Trial:
        """Import the declaration.

        Raises:
            TrialError: if it cannot be found or imported.
        """
        if self.room is not None:
            return load_study(self.room, self.name)
        return trials_in_file(str(self.file))[self.name]


# --- studies of rooms ----------------------------------------------------------------------------------------------


def room_names() -> list[str]:
    """Folder names of all rooms, sorted."""
    package = importlib.import_module(METHODS)
    folders = [Path(root) for root in package.__path__]
    return sorted({f.name for root in folders for f in root.iterdir() if (f / "study.py").is_file()})


def nearest(name: str, known: list[str]) -> str:
    """``Did you mean 'x'?`` or the list of what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"There is: {', '.join(known) or 'none'}."


def studies_of(room: str) -> tuple[Study, ...]:
    """All studies of a room, the main one first.

    Raises:
        TrialError: if there is no such room or its ``study.py`` cannot be imported.
    """
    rooms = room_names()
    if room not in rooms:
        raise TrialError(f"unknown room {room!r}. {nearest(room, rooms)}")
    try:
        module = importlib.import_module(f"{METHODS}.{room}.study")
    except Exception as error:
        raise _import_failure(f"study of room {room!r}", error) from error
    return tuple(module.STUDIES)


def load_study(room: str, name: str | None = None) -> Study:
    """One study of a room: the named one, or the main one.

    Raises:
        TrialError: if there is no such room or study.
    """
    studies = studies_of(room)
    found = [s for s in studies if name is None or s.name == name]
    if not found:
        raise TrialError(
            f"room {room!r} has no study {name!r}. {nearest(str(name), [s.name for s in studies])}"
        )
    return found[0]


# --- trials in a user's file ---------------------------------------------------------------------------------------


def trials_in_file(file: str) -> dict[str, Trial]:
    """Import ``file`` and return the trials it declares at module level, by name.

    Raises:
        TrialError: if the file cannot be imported, or two of its trials share a name.
    """
    module = _import_file(file)
    trials: dict[str, Trial] = {}
    for value in vars(module).values():
        for trial in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(trial, Trial) or trials.get(trial.name) is trial:
                continue
            if trial.name in trials:
                raise TrialError(
                    f"{file}: two trials are named {trial.name!r}. Give each Trial its own name=."
                )
            trials[trial.name] = trial
    return trials


def _import_file(file: str) -> ModuleType:
    """Import a file as a module of its own, with its folder importable as for ``python file.py``."""
    path = Path(file)
    digest = hashlib.sha256(
        f"{path}\0{os.stat(path).st_mtime_ns}".encode(errors="surrogatepass")
    ).hexdigest()[:16]
    name = f"pullback_trial_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TrialError(f"{file} is not a Python file. Give a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failure(file, error) from error
    return module


def _import_failure(what: str, error: BaseException) -> TrialError:
    text = "".join(traceback.format_exception(error))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == what]
    # A syntax error names its place itself, and it may lie in another file.
    line = f" (line {frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    fix = "Correct it there." if line else "Run it with python to see where."
    if "relative import" in str(error):
        fix = "A trial's file is imported by itself: write `import helper` for a module beside it."
    elif isinstance(error, SystemExit):
        fix = "Keep what ends the process under `if __name__ == '__main__':`."
    return TrialError(f"{what} cannot be imported: {reason}{line}. {fix}", traceback_text=text)
