"""pullback: published methods on the learning signal of neural networks, and trials that prove their worth.

Every name below is loaded when it is first used, so that ``import pullback`` costs next to nothing: the verbs
of the core, and the main names of every room as its ``method.toml`` lists them. `__init__.pyi` tells editors
the same names; ``python -m pullback.lab.rooms stub`` writes it.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_CORE: dict[str, tuple[str, str | None]] = {
    # public name: (module, name in it; None means the module itself)
    "Attachment": ("pullback.core.attachment", "Attachment"),
    "ClipGradNorm": ("pullback.core.clip", "ClipGradNorm"),
    "ConflictMonitor": ("pullback.core.conflict", "ConflictMonitor"),
    "NonFiniteError": ("pullback.core.checks", "NonFiniteError"),
    "attach": ("pullback.core.attachment", "attach"),
    "cite": ("pullback.core.citation", "cite"),
    "schedules": ("pullback.core.schedules", None),
}


def _exports() -> dict[str, tuple[str, str | None]]:
    """Every public name that is loaded late, with the place where it lives."""
    from pullback.core.facts import rooms

    found = dict(_CORE)
    for room, facts in rooms().items():
        found.update({name: (f"pullback.methods.{room}", name) for name in facts.exports})
    return found


def __getattr__(name: str) -> object:
    """Load the public name ``name`` from the core or from the room that exports it."""
    if name == "__all__":
        return sorted(_exports())  # what the stub says
    if name.startswith("_"):
        raise AttributeError(f"module 'pullback' has no attribute {name!r}")
    place = _CORE.get(name) or _exports().get(name)
    if place is None:
        import difflib

        near = difflib.get_close_matches(name, _exports(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " `pullback list` shows the rooms and their names."
        raise AttributeError(f"module 'pullback' has no attribute {name!r}.{hint}")
    module, attribute = place
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted({*_exports(), "__version__"})
