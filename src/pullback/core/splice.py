"""Runs of neighbours in a container replaced by one module each, with the names that a checkpoint needs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


class Splice:
    """An edit of one container, prepared before anything is changed.

    In a container whose children are numbered they are numbered anew; in a named one the new module gets the name of
    the first that it replaces.

    Args:
        container: an ``nn.Sequential`` or ``nn.ModuleList``.
        runs: the new module for each run (start, stop) of neighbours.
        inside: where the new modules keep the old ones, as the i-th child of this child.
    """

    def __init__(
        self, container: nn.Module, runs: Mapping[tuple[int, int], nn.Module], *, inside: str = "blocks"
    ) -> None:
        self.container, self.modules = container, tuple(runs.values())
        self._old: dict[str, Any] = container._modules
        self._new: dict[str, Any] = OrderedDict()
        self.places: dict[str, str] = {}
        numbered = list(self._old) == [str(i) for i in range(len(self._old))]
        name = ""
        for i, (key, child) in enumerate(self._old.items()):
            run = next(((a, b) for a, b in runs if a <= i < b), None)
            if run is None or run[0] == i:
                name = str(len(self._new)) if numbered else key
                self._new[name] = child if run is None else runs[run]
            self.places[key] = name if run is None else f"{name}.{inside}.{i - run[0]}"

    def apply_(self) -> None:
        """Put the new modules in."""
        self.container._modules = self._new

    def undo_(self) -> None:
        """Put the old ones back."""
        self.container._modules = self._old


def renamed(model: nn.Module, splices: Mapping[nn.Module, Splice]) -> dict[str, str]:
    """Name before and after ``splices`` of all that ``model.state_dict()`` holds; call it before they are applied."""
    modules = dict(_modules(model, splices, "", ""))
    names: dict[str, str] = {}
    for name in model.state_dict():
        owner, _, last = name.rpartition(".")
        names[name] = _join(modules[owner], last)
    return names


def _modules(
    module: nn.Module, splices: Mapping[nn.Module, Splice], old: str, new: str
) -> Iterator[tuple[str, str]]:
    """Old and new name of every module, a shared one at each of its places."""
    yield old, new
    places = splices[module].places if module in splices else {}
    for key, child in module._modules.items():
        if child is not None:
            yield from _modules(child, splices, _join(old, key), _join(new, places.get(key, key)))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
