"""Extend one object by a class of ours: its parts, names, hooks and place in the model stay."""

from __future__ import annotations

import functools

from torch import nn


def extend(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Give ``module`` a subclass of its own class in which ``mixin`` comes first.

    No wrapper stands in the way: parameters keep their names, hooks stay, and look-ups by class, or by the
    class's name, still find the module. Copies and pickles of it work.

    Args:
        module: any module without a ``forward`` of its own among its attributes.
        mixin: overrides what it wants to; ``super()`` is the module's own class.

    Raises:
        ValueError: if something has replaced the module's ``forward`` by an attribute, which would bypass
            the mixin.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"{type(module).__name__} must have the forward of its class, got one set on the object. "
            "Remove what replaced it (hooks of a trainer or of an offloader), then convert."
        )
    module.__class__ = extended(mixin, type(module))


@functools.cache
def extended(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass that `extend` gives, under the name of ``base``."""
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}

    def reduce(self: nn.Module, _: object) -> tuple[object, ...]:
        return _blank, (mixin, base), self.__dict__

    return type(base.__name__, (mixin, base), {**body, "__reduce_ex__": reduce})


def _blank(mixin: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """An object of the extended class without its attributes."""
    cls = extended(mixin, base)
    return cls.__new__(cls)
