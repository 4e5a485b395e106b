"""Rules for one Python file, read from its syntax tree: ceilings, imports, unsafe loading, unfinished marks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from pullback.lab.rooms.problem import Problem

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
UNSAFE_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
UNFINISHED = re.compile(
    r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK|raise NotImpl" + r"ementedError)\b"
)
HOME_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work|mnt)/\w+")


def check_source(
    file: str, text: str, *, room: bool = True, study: bool = False, test: bool = False
) -> list[Problem]:
    """Hold one Python file to the rules.

    Args:
        file: path for the messages.
        text: the source.
        room: whether the file belongs to a room, which may not import the lab or the contracts.
        study: whether this is a room's ``study.py``, the one place that may import the lab.
        test: whether this is a test, which may import anything and may show what is refused.

    Returns:
        Every problem, in the order of the lines.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [Problem(file, error.lineno or 0, f"is not Python: {error.msg}.")]
    found = [
        *_ceilings(file, text, tree),
        *_imports(file, tree, room=room, study=study, test=test),
        *check_text(file, text),
    ]
    if not test:
        found += _calls(file, tree)
    return sorted(found)


def check_text(file: str, text: str) -> list[Problem]:
    """Refuse marks of unfinished work and paths of somebody's machine in any text of the product."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, what in (
            (UNFINISHED, "is a mark of unfinished work"),
            (HOME_PATH, "is a path of one machine"),
        ):
            match = pattern.search(line)
            if match:
                found.append(Problem(file, number, f"{match.group()!r} {what}. Finish it or take it out."))
    return found


def _ceilings(file: str, text: str, tree: ast.Module) -> Iterator[Problem]:
    lines = len(text.splitlines())
    if lines > LONGEST_FILE:
        yield Problem(
            file, lines, f"has {lines} lines, the ceiling is {LONGEST_FILE}. Split it by what it does."
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = _length(node)
            if length > LONGEST_FUNCTION:
                text = f"{node.name} has {length} lines, the ceiling is {LONGEST_FUNCTION}. Split it."
                yield Problem(file, node.lineno, text)


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def _imports(file: str, tree: ast.Module, *, room: bool, study: bool, test: bool) -> Iterator[Problem]:
    for line, name in _imported(tree):
        if name.startswith("."):
            yield Problem(file, line, "relative import. Write the whole name of the module.")
        if test:
            continue
        if name.split(".")[0] in UNSAFE_MODULES:
            yield Problem(file, line, f"imports {name}, which can run code on loading. Use pullback.core.")
        if room and not study and _below(name, "pullback.lab"):
            yield Problem(file, line, f"imports {name}. Only a room's study.py may import the lab.")
        if room and _below(name, "pullback.testing"):
            yield Problem(file, line, f"imports {name}. Only a room's tests may import the contracts.")


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported; relative names begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            if module == "pullback":
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _calls(file: str, tree: ast.Module) -> Iterator[Problem]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called == "torch.load" and not _is(keywords.get("weights_only"), value=True):
            yield Problem(
                file, node.lineno, "torch.load can run code. Pass weights_only=True, or use safetensors."
            )
        if called.endswith((".load", "_load")) and _is(keywords.get("allow_pickle"), value=True):
            yield Problem(file, node.lineno, f"{called}(allow_pickle=True) can run code. Keep plain arrays.")
        if called in {"eval", "exec"}:
            yield Problem(file, node.lineno, f"{called} runs text as code. Look the name up in a table.")


def _is(node: ast.expr | None, *, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
