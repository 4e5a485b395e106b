"""``python -m pullback.lab.rooms``: new, check, stub and table. Exit codes: 0 done, 1 a rule is broken, 2 bad usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pullback
from pullback.core.facts import FactsError, rooms
from pullback.lab.evidence import EvidenceError
from pullback.lab.rooms.generate import new_room
from pullback.lab.rooms.problem import Problem
from pullback.lab.rooms.rules import check_room
from pullback.lab.rooms.stub import stub_text
from pullback.lab.rooms.table import MarkersError, methods_table_text, with_table

PACKAGE = Path(pullback.__file__).resolve().parent
CHECKOUT = PACKAGE.parent.parent


def new(options: argparse.Namespace) -> int:
    """Write a new room and say what comes next."""
    try:
        folder = new_room(options.name, options.methods)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    if options.methods.resolve() == PACKAGE / "methods":  # what is generated from all rooms, in a checkout
        rooms.cache_clear()
        _write(PACKAGE / "__init__.pyi", stub_text(rooms()), only_check=False, command="stub")
        page = CHECKOUT / "README.md"
        if page.is_file():
            text = with_table(page.read_text(encoding="utf-8"), methods_table_text(CHECKOUT / "evidence"))
            _write(page, text, only_check=False, command="table")
    print("next: its maths, then its test; docs/writing-a-room.md shows the way.")
    return 0


def check(options: argparse.Namespace) -> int:
    """Hold rooms to the rules and print every problem."""
    methods: Path = options.methods
    names = options.rooms or sorted(p.name for p in methods.iterdir() if p.is_dir() and p.name[0] not in "._")
    own = methods.resolve() == PACKAGE / "methods"
    problems = [p for name in names for p in check_room(methods / name, options.evidence, load=own)]
    try:
        rooms()
    except FactsError as error:  # for example a name that two rooms export
        if own and not any(str(error).endswith(problem.text) for problem in problems):
            problems.append(Problem("methods", 0, str(error)))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{_count(len(names), 'room')}, {_count(len(problems), 'problem')}")
    return 1 if problems else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _write(path: Path, text: str, *, only_check: bool, command: str) -> int:
    """Write a generated file, or say that it is stale."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    if only_check:
        print(f"{path.name} is stale. Run `python -m pullback.lab.rooms {command}`.", file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
    return 0


def stub(options: argparse.Namespace) -> int:
    """Write ``__init__.pyi`` from the facts."""
    return _write(PACKAGE / "__init__.pyi", stub_text(rooms()), only_check=options.check, command="stub")


def table(options: argparse.Namespace) -> int:
    """Write the table of methods into the README."""
    page: Path = options.page
    try:
        text = with_table(page.read_text(encoding="utf-8"), methods_table_text(options.evidence))
    except (MarkersError, OSError) as error:
        print(f"error: {page.name}: {error}", file=sys.stderr)
        return 1
    return _write(page, text, only_check=options.check, command="table")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m pullback.lab.rooms", description="Make and check rooms.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for run, text in ((new, "write a new room"), (check, "hold rooms to the rules"),
                      (stub, "write __init__.pyi"), (table, "write the README's table")):  # fmt: skip
        command = commands.add_parser(run.__name__, help=text)
        command.set_defaults(run=run)
        if run is new:
            command.add_argument("name")
        if run is check:
            command.add_argument("rooms", nargs="*", metavar="ROOM")
        if run in {new, check}:
            command.add_argument("--methods", type=Path, default=PACKAGE / "methods")
        if run in {check, table}:
            command.add_argument("--evidence", type=Path, default=CHECKOUT / "evidence")
        if run in {stub, table}:
            command.add_argument("--check", action="store_true", help="only say whether it is stale")
        if run is table:
            command.add_argument("--page", type=Path, default=CHECKOUT / "README.md")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a fact, evidence or file that cannot be read is one line."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (FactsError, EvidenceError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
