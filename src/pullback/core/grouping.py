"""Sort named parameters into groups of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor

from pullback.core.checks import shown

Groups: TypeAlias = Callable[[str], str | None] | Mapping[str, str | Sequence[str]] | None
"""How parameters are grouped by name: a function, or glob patterns by group, or by top-level module."""


def without_wrappers(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters by the names that they have inside ``torch.compile`` and data-parallel wrappers."""
    plain = {name.replace("_orig_mod.", ""): param for name, param in params.items()}
    while all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): param for name, param in plain.items()}
    return plain


def grouped(params: Mapping[str, Tensor], groups: Groups = None) -> list[tuple[str, Tensor, str]]:
    """Give every parameter its group and leave out those that have none.

    Args:
        params: parameters by name.
        groups: ``None`` groups by top-level module, the first part of the name. A function gives the group of a name,
            or ``None`` to leave it out. A mapping holds glob patterns by group; the first group that matches counts.

    Returns:
        Rows of name, parameter and group; groups follow each other in the order of the mapping, else of their first
        parameter.

    Raises:
        TypeError: if ``groups`` or a group's name is of another type.
        ValueError: if nothing is left, or a group of the mapping matches no parameter.
    """
    if groups is None:
        place: Callable[[str], str | None] = _top
    elif isinstance(groups, Mapping):
        place = _by_pattern(groups)
    elif callable(groups):
        place = groups
    else:
        raise TypeError(
            f"groups must be None, a function of the name or patterns by group, got {shown(groups)}. "
            'Pass {"trunk": "trunk.*"}, for example.'
        )
    rows: list[tuple[str, Tensor, str]] = []
    for name, param in params.items():
        group = place(name)
        if group is None:
            continue
        if not isinstance(group, str):
            raise TypeError(
                f"groups({name!r}) must be a string or None, got {shown(group)}. Return the group's name."
            )
        rows.append((name, param, group))
    found = list(dict.fromkeys(group for _, _, group in rows))
    empty = [group for group in groups if group not in found] if isinstance(groups, Mapping) else []
    if empty or not rows:
        raise ValueError(
            f"groups must match at least one parameter each, got none for {empty or 'any group'}. "
            f"Names look like {shown(next(iter(params)))}."
        )
    order = list(groups) if isinstance(groups, Mapping) else found
    return sorted(rows, key=lambda row: order.index(row[2]))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _by_pattern(groups: Mapping[str, str | Sequence[str]]) -> Callable[[str], str | None]:
    patterns = {
        group: (given,) if isinstance(given, str) else tuple(given) for group, given in groups.items()
    }

    def place(name: str) -> str | None:
        for group, some in patterns.items():
            if any(fnmatchcase(name, pattern) for pattern in some):
                return group
        return None

    return place
