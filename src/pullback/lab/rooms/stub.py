"""The typed stub of the package: what editors and type checkers see of the names that are loaded late."""

from __future__ import annotations

from collections.abc import Mapping

import pullback
from pullback.core.facts import Facts

_HEAD = '"""Public names of pullback. Written by `python -m pullback.lab.rooms stub` from the facts of the rooms."""'


def stub_text(rooms: Mapping[str, Facts]) -> str:
    """The text of ``__init__.pyi`` for ``rooms``, sorted, so that it changes only when a name does."""
    imports = []
    names = set()
    for name, (module, attribute) in vars(pullback)["_CORE"].items():
        package, _, last = module.rpartition(".")
        imports.append((package, last) if attribute is None else (module, attribute))
        names.add(name)
    for room, facts in rooms.items():
        imports += [(f"pullback.methods.{room}", name) for name in facts.exports]
        names |= set(facts.exports)
    lines = [f"from {module} import {name} as {name}" for module, name in sorted(imports)]
    listed = "".join(f'    "{name}",\n' for name in sorted(names, key=_rank))
    return f"{_HEAD}\n\n" + "\n".join(lines) + f"\n\n__version__: str\n\n__all__ = [\n{listed}]\n"


def _rank(name: str) -> tuple[int, str]:
    """Names in capitals, then classes, then the rest: the order that the linter asks of ``__all__``."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name
