"""Facts of the rooms, read from their ``method.toml`` without importing a room; standard library only."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

KINDS = (
    "signal", "aggregator", "transform", "optimizer", "objective", "recompute",
    "probe", "search", "layer", "learner", "field",
)  # fmt: skip
CAPABILITIES = ("conflict", "step", "carry", "local", "read", "invert", "follow")
_MOST_EXPORTS = 4
_LONGEST_SUMMARY = 90


class FactsError(ValueError):
    """A ``method.toml`` is missing a fact or holds one that cannot be true."""


class UnknownRoomError(KeyError):
    """There is no room of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Facts:
    """What a room says about itself.

    Args:
        room: name of the room's folder, as in ``pullback.methods.<room>``.
        title: title of the paper.
        authors: its authors, in order.
        year: year of first publication.
        arxiv: arXiv identifier, empty when there is none.
        venue: where it was published.
        bibtex: one BibTeX entry.
        kind: kind of component, one of ``KINDS``.
        capability: what it is for, one of ``CAPABILITIES``.
        exports: names that ``pullback`` itself offers, at most four.
        extras: optional dependencies, as names of extras of the package.
        summary: one line, under 90 characters.
        claim: what the paper claims and the study tests.
    """

    room: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str
    venue: str
    bibtex: str
    kind: str
    capability: str
    exports: tuple[str, ...]
    extras: tuple[str, ...]
    summary: str
    claim: str

    @property
    def module(self) -> str:
        """Dotted name of the room's package."""
        return f"pullback.methods.{self.room}"


def read_facts(room: str, text: str) -> Facts:
    """Read one room's facts from the text of its ``method.toml``.

    Args:
        room: name of the room's folder.
        text: contents of the file.

    Returns:
        The facts.

    Raises:
        FactsError: if the text is no TOML, or a fact is missing, unknown or impossible.
    """
    where = f"methods/{room}/method.toml"
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FactsError(f"{where} must be TOML, got an error: {error}. Correct that line.") from error
    wanted = [field.name for field in fields(Facts) if field.name != "room"]
    missing = [name for name in wanted if name not in raw and name != "arxiv"]
    unknown = [name for name in raw if name not in wanted]
    if missing or unknown:
        raise FactsError(
            f"{where} must hold {', '.join(wanted)}, got missing {missing} and unknown {unknown}."
        )
    values: dict[str, Any] = {"arxiv": "", **raw}
    for name, value in values.items():
        values[name] = _typed(f"{where}: {name}", name, value)
    _check(where, values)
    return Facts(room=room, **values)


def _typed(where: str, name: str, value: object) -> object:
    if name == "year":
        if isinstance(value, bool) or not isinstance(value, int):
            raise FactsError(f"{where} must be an integer, got {value!r}.")
        return value
    if name in {"authors", "exports", "extras"}:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise FactsError(f"{where} must be a list of strings, got {value!r}.")
        return tuple(value)
    if not isinstance(value, str):
        raise FactsError(f"{where} must be a string, got {value!r}.")
    return value.strip()


def _check(where: str, values: Mapping[str, Any]) -> None:
    for name, options in (("kind", KINDS), ("capability", CAPABILITIES)):
        if values[name] not in options:
            raise FactsError(f"{where}: {name} must be one of {', '.join(options)}, got {values[name]!r}.")
    if not 1 <= len(values["exports"]) <= _MOST_EXPORTS:
        raise FactsError(
            f"{where}: exports must be 1 to {_MOST_EXPORTS} names, got {len(values['exports'])}."
        )
    if "\n" in values["summary"] or not 0 < len(values["summary"]) < _LONGEST_SUMMARY:
        raise FactsError(
            f"{where}: summary must be one line under {_LONGEST_SUMMARY} characters, "
            f"got {len(values['summary'])}. Shorten it."
        )
    for name in ("title", "claim", "bibtex", "authors"):
        if not values[name]:
            raise FactsError(f"{where}: {name} must not be empty.")


def _room_folders() -> dict[str, Traversable]:
    found: dict[str, Traversable] = {}
    for folder in files("pullback.methods").iterdir():
        if folder.is_dir() and folder.joinpath("method.toml").is_file():
            found[folder.name] = folder
    return dict(sorted(found.items()))


@cache
def rooms() -> Mapping[str, Facts]:
    """Facts of every room that is installed, by name, sorted.

    Returns:
        A read-only mapping.

    Raises:
        FactsError: if a room's file is wrong, or two rooms export the same name.
    """
    found: dict[str, Facts] = {}
    import pullback  # late: the package may still be loading

    exported: dict[str, str] = dict.fromkeys(vars(pullback)["_CORE"], "the core")
    for room, folder in _room_folders().items():
        found[room] = read_facts(room, folder.joinpath("method.toml").read_text(encoding="utf-8"))
        for name in found[room].exports:
            if name in exported:
                raise FactsError(
                    f"exports must be unique, got {name!r} in {exported[name]} and {room}. Rename one."
                )
            exported[name] = room
    return MappingProxyType(found)


def facts(room: str) -> Facts:
    """Facts of one room; dashes count as underscores.

    Args:
        room: the room's name.

    Returns:
        Its facts.

    Raises:
        UnknownRoomError: if there is no such room; the message names the nearest one.
    """
    known = rooms()
    name = str(room).replace("-", "_")
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name[:64].lower(), known, n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]!r}?" if near else f"Known rooms: {', '.join(known)}."
    given = repr(room) if len(repr(room)) <= 80 else f"{repr(room)[:77]}..."
    raise UnknownRoomError(f"room must be the name of a method, got {given}. {advice}")
