"""Pages that need not be drawn again: a page ends with the hash of what it was made from and of its own text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pullback.lab.result import TrialResult

_MARK = "<!-- made from {key}, text {text} -->\n"


def page_key(results: Sequence[TrialResult], head: object) -> str:
    """Hash of everything that decides a page: its results, its heading, and the code that draws it.

    Args:
        results: the trials of the page.
        head: the page's title and source.

    Returns:
        SHA-256 in hexadecimal.
    """
    total = hashlib.sha256(_code_of({result.room for result in results}).encode())
    for value in (head, *results):
        _feed(total, value)
    return total.hexdigest()


def sealed(page: str, key: str) -> str:
    """``page`` with the mark by which `reusable` knows it again.

    Args:
        page: the whole page.
        key: from `page_key`.

    Returns:
        The page and one comment.
    """
    return page + _MARK.format(key=key, text=_digest(page))


def reusable(path: Path, key: str) -> str | None:
    """The page at ``path`` if it was made from the same things and nobody edited it.

    Args:
        path: where the page would be written.
        key: from `page_key`.

    Returns:
        Its text, or None.
    """
    if path.is_symlink() or not path.is_file():
        return None
    text = path.read_bytes().decode("utf-8", errors="replace")
    page, start, end = text.rpartition("<!-- made from ")
    return text if start + end == _MARK.format(key=key, text=_digest(page)) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest()


def _feed(total: Any, value: Any) -> None:
    """Hash plain values, arrays and dataclasses with their types, so that different content differs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(total, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        total.update(b"{%d" % len(value))
        for name in value:
            _feed(total, name)
            _feed(total, value[name])
    elif isinstance(value, list | tuple):
        total.update(b"[%d" % len(value))
        for item in value:
            _feed(total, item)
    elif isinstance(value, np.ndarray):
        total.update(f"a{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    else:
        text = f"{type(value).__name__}:{value!r}".encode("utf-8", errors="backslashreplace")
        total.update(b"%d:" % len(text) + text)


def _code_of(rooms: set[str | None]) -> str:
    return "".join(_package_hash(name) for name in ("report", "figures")) + "".join(
        _room_hash(room) for room in sorted(room for room in rooms if room is not None)
    )


@cache
def _package_hash(name: str) -> str:
    return _files_hash(files("pullback.lab") / name)


@cache
def _room_hash(room: str) -> str:
    """The code of a room's drawings; a room that is not installed has none."""
    if not room.isidentifier():
        return ""
    folder = files("pullback.methods") / room
    return _files_hash(folder) if folder.is_dir() else ""


def _files_hash(folder: Any) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.is_file() and file.name.endswith((".py", ".j2", ".css", ".js", ".toml")):
            content = file.read_bytes()
            total.update(f"{file.name}:{len(content)}:".encode() + content)
        elif file.name == "templates":
            total.update(_files_hash(file).encode())
    return total.hexdigest()
