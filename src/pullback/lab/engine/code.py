"""The hash of the code that a cell executes: it changes when the code does, not when a comment does."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import pullback
from pullback.lab.engine.errors import TrialError
from pullback.lab.engine.reference import METHODS, StudyRef

# Harness modules decide when and where a cell runs, not what it computes.
_FOLLOWED = ("pullback.core", "pullback.lab.data", "pullback.lab.models", METHODS)


class _Bare(ast.NodeTransformer):
    """Remove docstrings and other bare strings; comments never reach the syntax tree."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not _is_bare_string(s)]
            node.body = kept or [ast.Pass()]  # ty: ignore[missing-attribute]
        return node


def _is_bare_string(statement: ast.stmt) -> bool:
    value = getattr(statement, "value", None) if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def source_hash(text: str | bytes) -> str:
    """SHA-256 of Python source without its comments, docstrings and layout; bytes may name their encoding."""
    tree = _Bare().visit(ast.parse(text))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def code_hash(ref: StudyRef) -> str:
    """Hash of everything that a run of ``ref`` may execute and that is ours or the user's.

    For a room these are its modules, for a file the file itself; added to it are the modules that they import,
    directly or not, from the core, the data, the models, rooms, and from the file's own folder.

    Raises:
        TrialError: if a file cannot be read or parsed.
    """
    start = _room_files(ref.room) if ref.room is not None else [Path(str(ref.file))]
    folder = None if ref.file is None else Path(ref.file).parent
    todo, seen = list(start), {}
    while todo:
        path = todo.pop().resolve()
        if path in seen:
            continue
        seen[path], imported = _read(path)
        todo += [file for name in imported for file in _files_of(name, path, folder)]
    total = hashlib.sha256()
    for name, value in sorted((path.name, value) for path, value in seen.items()):
        total.update(f"{name}\0{value}\n".encode(errors="surrogatepass"))
    return total.hexdigest()


def _room_files(room: str | None) -> list[Path]:
    spec = importlib.util.find_spec(f"{METHODS}.{room}")
    if spec is None or not spec.submodule_search_locations:
        raise TrialError(f"unknown room {room!r}. List the rooms with `pullback list`.")
    return sorted(f for root in spec.submodule_search_locations for f in Path(root).glob("*.py"))


def _read(path: Path) -> tuple[str, tuple[str, ...]]:
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError, ValueError) as error:
        raise TrialError(f"{path} cannot be read as Python: {error}. Correct it and run again.") from error


@lru_cache(maxsize=1024)
def _parsed(path: Path, _modified: int) -> tuple[str, tuple[str, ...]]:
    source = path.read_bytes()  # bytes: Python itself sees to a byte-order mark and to a coding line
    return source_hash(source), tuple(sorted(_imports(ast.parse(source))))


def _imports(tree: ast.Module) -> set[str]:
    """Dotted names of imported modules, those of relative imports with their dots in front."""
    names, ours = set[str](), {"pullback"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            ours |= {alias.asname for alias in node.names if alias.name == "pullback" and alias.asname}
        elif isinstance(node, ast.ImportFrom):
            dots, module = "." * node.level, node.module or ""
            names.add(dots + module)
            names |= {f"{dots}{module}{'.' if module else ''}{alias.name}" for alias in node.names}
    uses = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    # ``pullback.attach``: a public name, loaded late
    return names | {
        f"pullback.{u.attr}" for u in uses if isinstance(u.value, ast.Name) and u.value.id in ours
    }


def _files_of(name: str, importer: Path, folder: Path | None) -> tuple[Path, ...]:
    """Source files of a followed module and of the packages above it; none for everybody else's modules."""
    bare = name.lstrip(".")
    parts = tuple(bare.split(".")) if bare else ()
    if level := len(name) - len(bare):
        return _sources(importer.parents[min(level, len(importer.parents)) - 1], parts)
    if parts[0] == "pullback":
        home = _public_homes().get(bare, bare)
        inside = tuple(home.split(".")[1:])
        return _sources(Path(__file__).parents[2], inside) if home.startswith(_FOLLOWED) else ()
    return () if folder is None else _sources(folder, parts)


@lru_cache(maxsize=4096)
def _sources(root: Path, parts: tuple[str, ...]) -> tuple[Path, ...]:
    stems = [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    candidates = [f for stem in stems for f in (stem.with_suffix(".py"), stem / "__init__.py")]
    return tuple(f for f in candidates if f.is_file())


@lru_cache(maxsize=1)
def _public_homes() -> dict[str, str]:
    """The module behind each public name, so that ``from pullback import GradientNoise`` counts as its room."""
    exports = pullback._exports()  # ty: ignore[missing-attribute] (left out of the stub)
    return {f"pullback.{name}": module for name, (module, _) in exports.items()}
