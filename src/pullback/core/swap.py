"""Modules of a model put in the place of others, at every place where they appear; all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn

from pullback.core.checks import instance

Names: TypeAlias = Sequence[str] | Callable[[str, nn.Module], bool]
"""Names as in ``model.named_modules()``, or ``names(name, module)`` that picks them."""


def swap_modules(
    model: nn.Module,
    names: Names,
    make: Callable[[nn.Module], nn.Module],
    *,
    fits: Callable[[nn.Module], bool],
    what: str,
) -> int:
    """Replace modules inside ``model``, in place.

    A module that appears at several places is made once and replaced at all of them. All new modules are made before
    the first is put in, so that an error leaves the model as it was. Modes (train or eval) are carried over.

    Args:
        model: the model to change; it cannot be replaced itself.
        names: which modules. A function is asked about fitting modules only.
        make: gives the new module for an old one.
        fits: whether a module is of the kind that can be replaced.
        what: that kind in words, in the singular, for messages: "linear layer".

    Returns:
        How many modules were replaced, at least 1.

    Raises:
        TypeError: if ``model`` is no module, ``names`` is one string, or a named module does not fit.
        ValueError: if a name is unknown or nothing is picked.
    """
    instance("model", model, nn.Module)
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names or a function, got {names!r}. Pass [{names!r}].")
    places = dict(model.named_modules(remove_duplicate=False))
    places.pop("")
    wanted = [n for n, m in places.items() if fits(m) and names(n, m)] if callable(names) else list(names)
    if not wanted:
        raise ValueError(
            f"names must pick a {what}, got {names!r:.80}, which picks none. See model.named_modules()."
        )
    for name in wanted:
        if name not in places:
            raise ValueError(f"names must be names of modules, got {name!r}. See model.named_modules().")
        if not fits(places[name]):
            kind = type(places[name]).__name__
            raise TypeError(f"names must be of {what}s, got {name!r}, a {kind}. Name the {what} itself.")
    old = {id(places[name]): places[name] for name in wanted}
    new = {key: make(module).train(module.training) for key, module in old.items()}
    for name, module in places.items():
        if id(module) in new:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new[id(module)])
    return len(new)
