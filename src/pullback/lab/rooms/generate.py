"""Write a new room that keeps every rule; only its maths is left to its author."""

from __future__ import annotations

import keyword
import re
import shutil
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from pullback.lab.rooms.rules import NAME

RESERVED = frozenset({"con", "prn", "aux", "nul", "tests", "core", "lab", "testing", "adapters", "methods"})


def room_name(name: str) -> str:
    """``name`` if it can be a room's, which is also a Python package's and a file's name.

    Raises:
        ValueError: if it cannot; nothing of a hostile name reaches the file system.
    """
    shown = ascii(name) if len(name) <= 60 else f"{name[:60]!a}..."
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a room's name must be 2 to 24 lower-case letters, digits and '_', a letter first, got {shown}."
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or re.sub(r"\d$", "", name) in RESERVED:
        raise ValueError(f"a room's name must not be reserved, got {shown}. Choose another.")
    return name


def new_room(name: str, methods: Path) -> Path:
    """Write the room ``name`` into the folder ``methods``.

    The new room holds a transform that scales gradients, with its contract, study and page, and one test that fails
    until the maths is written.

    Args:
        name: the room's name.
        methods: folder of the rooms, ``src/pullback/methods`` of a checkout.

    Returns:
        The new folder.

    Raises:
        ValueError: if the name cannot be a room's.
        FileExistsError: if there is a room of that name; it is left as it is.
        NotADirectoryError: if ``methods`` is not a folder.
    """
    words = {"room": room_name(name), "Name": _class_name(name), "title": name.replace("_", " ").capitalize()}
    if not methods.is_dir():
        raise NotADirectoryError(f"the rooms' folder must exist, got {methods}. Run this in a checkout.")
    folder = methods / name
    if folder.exists():
        raise FileExistsError(f"there is a room {name!r} already. Choose another name.")
    unfinished = methods / f".{name}.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    for source, target in _templates(words["room"]):
        path = unfinished / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(source.read_text(encoding="utf-8")).substitute(words), encoding="utf-8")
    unfinished.rename(folder)
    return folder


def _class_name(room: str) -> str:
    return "".join(part.capitalize() for part in room.split("_"))


def _templates(room: str) -> list[tuple[Traversable, str]]:
    """Every template with the path it is written to; ``maths.py`` and its test bear the room's name."""
    root = files("pullback.lab.rooms") / "templates"
    names = {
        "method.toml": "method.toml",
        "init.py": "__init__.py",
        "maths.py": f"{room}.py",
        "study.py": "study.py",
        "tuned.toml": "tuned.toml",
        "README.md": "README.md",
        "tests_init.py": "tests/__init__.py",
        "cases.py": "tests/cases.py",
        "reference.py": "tests/reference.py",
        "test_maths.py": f"tests/test_{room}.py",
    }
    return [(root / f"{source}.txt", target) for source, target in names.items()]
