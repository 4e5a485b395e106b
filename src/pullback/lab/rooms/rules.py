"""The rules that every room keeps; each function looks at one thing and returns what is wrong with it."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pullback.core.facts import Facts, FactsError, read_facts
from pullback.lab.declare import Study
from pullback.lab.extras import EXTRAS
from pullback.lab.rooms.problem import Problem
from pullback.lab.rooms.source import check_source, check_text
from pullback.lab.tuning import TRACE_HASH

NAME = re.compile(r"[a-z][a-z0-9_]{0,22}[a-z0-9]")
NEEDED = ("method.toml", "__init__.py", "study.py", "tuned.toml", "README.md", "tests")
NEEDED_TESTS = ("__init__.py", "reference.py", "cases.py")
MOST_MODULES = 3
SECTIONS = ("idea", "when", "example", "trap", "cost", "deviation", "cit")
FEWEST_SEEDS = 5
IGNORED = frozenset({"__pycache__", ".pytest_cache", ".DS_Store"})


def check_room(folder: Path, evidence: Path, *, load: bool = True) -> list[Problem]:
    """Hold the room in ``folder`` to all rules.

    Args:
        folder: the room's folder.
        evidence: the folder of the exported evidence, which may be absent.
        load: also import the room and its study; needs the room to be importable as ``pullback.methods.<room>``.

    Returns:
        Every problem, sorted by file and line.
    """
    room = folder.name
    if not NAME.fullmatch(room):
        return [
            Problem(
                ascii(room)[:80],
                0,
                "a room's name is 2 to 24 lower-case letters, digits and '_', a letter first. Rename it.",
            )
        ]
    if not folder.is_dir():
        return [Problem(room, 0, "there is no such room. `pullback list` shows the rooms.")]
    found = [*_files(folder), *_texts(folder), *_readme(folder)]
    facts, wrong = _facts(folder)
    found += wrong
    tuned, wrong = _tuned(folder)
    found += wrong
    if load and facts is not None:
        found += _exports(facts)
        studies, wrong = _studies(room)
        found += wrong
        found += _tuned_fits(room, tuned, studies)
        found += _evidence(evidence / f"{room}.json", studies, tuned)
    return sorted(found)


# --- files and texts -----------------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[Problem]:
    room = folder.name
    present = {path.name for path in folder.iterdir()} - IGNORED
    for name in NEEDED:
        if name not in present:
            yield Problem(f"{room}/{name}", 0, "is missing.")
    modules = sorted(n for n in present - set(NEEDED) if n.endswith(".py"))
    for name in sorted(present - set(NEEDED) - set(modules)):
        yield Problem(
            f"{room}/{name}", 0, "does not belong in a room. Move it to the core, the lab or the docs."
        )
    if not 1 <= len(modules) <= MOST_MODULES:
        yield Problem(room, 0, f"has {len(modules)} modules of maths, must be 1 to {MOST_MODULES}.")
    tests = folder / "tests"
    inside = {path.name for path in tests.iterdir()} - IGNORED if tests.is_dir() else set()
    for name in NEEDED_TESTS:
        if tests.is_dir() and name not in inside:
            yield Problem(f"{room}/tests/{name}", 0, "is missing.")
    others = sorted(inside - set(NEEDED_TESTS))
    if tests.is_dir() and not any(name.startswith("test_") for name in others):
        yield Problem(f"{room}/tests", 0, "holds no test_*.py.")
    for name in others:
        if not (name.startswith("test_") and name.endswith(".py")):
            yield Problem(
                f"{room}/tests/{name}", 0, "does not belong here: reference.py, cases.py and test_*.py only."
            )


def _texts(folder: Path) -> Iterator[Problem]:
    for path in sorted(folder.rglob("*")):
        if path.suffix not in {".py", ".md", ".toml"} or IGNORED & set(path.parts):
            continue
        inside = path.relative_to(folder)
        name = f"{folder.name}/{inside.as_posix()}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            yield Problem(name, 0, f"cannot be read as UTF-8 text: {error}.")
            continue
        if path.suffix == ".py":
            yield from check_source(
                name, text, study=inside.as_posix() == "study.py", test=inside.parts[0] == "tests"
            )
        else:
            yield from check_text(name, text)


def _readme(folder: Path) -> Iterator[Problem]:
    path, name = folder / "README.md", f"{folder.name}/README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    headings = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("##")]
    for section in SECTIONS:
        if not any(section in heading for heading in headings):
            yield Problem(name, 0, f"has no '##' section whose heading says {section!r}.")
    if not text.startswith("# "):
        yield Problem(name, 1, "must begin with a '# ' title.")
    if "```python" not in text:
        yield Problem(name, 0, "has no ```python example for the tests to run.")


# --- facts, tuned values -------------------------------------------------------------------------------------------


def _facts(folder: Path) -> tuple[Facts | None, list[Problem]]:
    path = folder / "method.toml"
    if not path.is_file():
        return None, []
    try:
        return read_facts(folder.name, path.read_text(encoding="utf-8")), []
    except (FactsError, UnicodeDecodeError) as error:
        said = str(error).removeprefix(f"methods/{folder.name}/method.toml").lstrip(": ")
        return None, [Problem(f"{folder.name}/method.toml", 0, said)]


def _tuned(folder: Path) -> tuple[Mapping[str, Any], list[Problem]]:
    path, name = folder / "tuned.toml", f"{folder.name}/tuned.toml"
    if not path.is_file():
        return {}, []
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [Problem(name, 0, f"is not TOML: {error}. `pullback tune {folder.name}` writes it.")]


def _tuned_fits(room: str, tuned: Mapping[str, Any], studies: tuple[Study, ...]) -> Iterator[Problem]:
    name, known = f"{room}/tuned.toml", {study.name: study for study in studies}
    for study, arms in tuned.items():
        if not isinstance(arms, Mapping):
            continue  # a value beside the tables, such as the hash of a trace
        if study not in known:
            yield Problem(name, 0, f"names the study {study!r}, there is {', '.join(known) or 'none'}.")
            continue
        for arm, values in arms.items():
            if isinstance(values, Mapping) and arm not in known[study].arms.names():
                arms_text = ", ".join(known[study].arms.names())
                yield Problem(name, 0, f"{study!r} has no arm {arm!r}, there is {arms_text}.")


# --- names ---------------------------------------------------------------------------------------------------------


def _load(module: str) -> ModuleType | Problem:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a room's import may fail in any way, and all of them are the same news
        room, _, inside = module.removeprefix("pullback.methods.").partition(".")
        file = f"{room}/{inside}.py" if inside else f"{room}/__init__.py"
        return Problem(file, 0, f"cannot be imported: {type(error).__name__}: {error}")


def _exports(facts: Facts) -> Iterator[Problem]:
    name = f"{facts.room}/__init__.py"
    if facts.extras:
        return  # its optional dependency may be absent; the contract tests of the room look at its names
    loaded = _load(facts.module)
    if isinstance(loaded, Problem):
        yield loaded
        return
    public = getattr(loaded, "__all__", None)
    if public is None:
        yield Problem(name, 0, "has no __all__.")
        return
    for export in facts.exports:
        if export not in public:
            yield Problem(name, 0, f"__all__ lacks {export!r}, which method.toml exports.")
    for export in public:
        if not hasattr(loaded, export):
            yield Problem(name, 0, f"__all__ names {export!r}, which does not exist.")
        elif callable(getattr(loaded, export)) and not (getattr(loaded, export).__doc__ or "").strip():
            yield Problem(name, 0, f"{export} has no docstring.")


# --- studies and evidence ------------------------------------------------------------------------------------------


def _studies(room: str) -> tuple[tuple[Study, ...], list[Problem]]:
    name = f"{room}/study.py"
    loaded = _load(f"pullback.methods.{room}.study")
    if isinstance(loaded, Problem):
        return (), [loaded]
    studies = getattr(loaded, "STUDIES", None)
    if not isinstance(studies, tuple) or not studies or not all(isinstance(s, Study) for s in studies):
        return (), [Problem(name, 0, "must declare STUDIES: tuple[Study, ...], the main study first.")]
    names = [study.name for study in studies]
    found = [problem for study in studies for problem in _study(name, room, study)]
    if len(set(names)) != len(names):
        found.append(Problem(name, 0, f"two studies share a name: {names}. Rename one."))
    return studies, found


def _study(name: str, room: str, study: Study) -> Iterator[Problem]:
    label = f"study {study.name!r}"
    if study.room != room:
        yield Problem(name, 0, f"{label} says room={study.room!r}, must be {room!r}.")
    for size in ("smoke", "full"):
        if size not in study.sizes:
            yield Problem(name, 0, f"{label} has no size {size!r}.")
    if not study.refuted_if.strip():
        yield Problem(name, 0, f"{label} does not say what would refute it. Fill refuted_if.")
    if len(study.seeds.test) < FEWEST_SEEDS:
        yield Problem(
            name, 0, f"{label} has {len(study.seeds.test)} test seeds, must be at least {FEWEST_SEEDS}."
        )
    for extra in study.extras:
        if extra not in EXTRAS:
            yield Problem(name, 0, f"{label} needs the extra {extra!r}, there is {', '.join(EXTRAS)}.")
    if not study.arms.rivals:
        yield Problem(
            name, 0, f"{label} has no rival arm. Name the strongest trivial alternative in Arms.rivals."
        )


def _evidence(path: Path, studies: tuple[Study, ...], tuned: Mapping[str, Any]) -> Iterator[Problem]:
    """Evidence must belong to the declarations and the tuned values as they are now."""
    if not path.is_file() or not studies:
        return
    from pullback.lab.engine.cells import claim_hash

    name = f"evidence/{path.name}"
    try:
        entries = json.loads(path.read_text("utf-8"))["studies"]
        kept = {entry["name"]: entry["claim_hash"] for entry in entries}
        traces = {
            entry["name"]: (entry["declaration"]["tuning"] or {}).get(TRACE_HASH, "") for entry in entries
        }
    except (ValueError, KeyError, TypeError) as error:
        yield Problem(name, 0, f"is not evidence: {type(error).__name__}: {error}. Export it again.")
        return
    known = {study.name: study for study in studies}
    if studies[0].name in kept and next(iter(kept)) != studies[0].name:
        yield Problem(name, 0, f"must begin with the main study, {studies[0].name!r}. Export it again.")
    for study, kept_hash in kept.items():
        if study not in known:
            yield Problem(
                name, 0, f"holds the study {study!r}, which is no longer declared. Export it again."
            )
        elif kept_hash != claim_hash(known[study]):
            yield Problem(
                name, 0, f"{study!r} was declared anew since it ran. Run it in full size and export it."
            )
        elif traces[study] != tuned.get(study, {}).get(TRACE_HASH, ""):
            yield Problem(
                name, 0, f"{study!r} was tuned anew since it ran. Run it in full size and export it."
            )
