"""Exchange activation modules in place, and say what such an exchange cannot reach."""

from __future__ import annotations

import dis
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from pullback.core.checks import instance, shown
from pullback.core.swap import swap_modules

Types: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...]

_FUNCTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("relu", "relu_"),
    nn.ReLU6: ("relu6",),
    nn.LeakyReLU: ("leaky_relu", "leaky_relu_"),
    nn.PReLU: ("prelu",),
    nn.ELU: ("elu", "elu_"),
    nn.CELU: ("celu", "celu_"),
    nn.SELU: ("selu", "selu_"),
    nn.GELU: ("gelu",),
    nn.SiLU: ("silu",),
    nn.Mish: ("mish",),
    nn.Tanh: ("tanh", "tanh_"),
    nn.Sigmoid: ("sigmoid", "sigmoid_"),
    nn.Softplus: ("softplus",),
    nn.Hardtanh: ("hardtanh", "hardtanh_"),
    nn.Hardswish: ("hardswish",),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def swap_activations(model: nn.Module, match: Types, make: Callable[[], nn.Module]) -> int:
    """Replace every module of the types ``match`` inside ``model`` by a new one from ``make``, in place.

    An instance that is used in several places is replaced once and stays shared. Types must match exactly, not by
    inheritance, so that gates (the sigmoid of a squeeze-and-excitation block, say) change only when they are named.
    Calls of functions inside a ``forward``, such as ``F.relu(x)``, are no modules: those that the code of the model's
    classes shows are named in a warning, and stay as they are.

    Args:
        model: module that holds the activations; it is no activation itself.
        match: type, or types, of the modules to replace.
        make: makes one replacement, for example ``nn.ELU`` or ``lambda: nn.ELU(alpha=0.5)``.

    Returns:
        The number of instances replaced. Parameters and keys of the ``state_dict`` stay as they are unless the new or
        old activation has some (PReLU): then a warning names them, and an optimizer must be made afterwards.

    Raises:
        TypeError: if an argument has a wrong type, or ``make`` does not return a module.
        ValueError: if nothing matches, ``model`` itself matches, or a matching module carries hooks, which would be
            lost. Nothing has been changed then.
    """
    instance("model", model, nn.Module)
    types = _types(match)
    if isinstance(make, nn.Module) or not callable(make):
        raise TypeError(
            f"make must be a function that makes a new module, got {shown(make)}. Write lambda: nn.ELU(), so that "
            "instances which were distinct stay distinct."
        )
    if type(model) in types:
        raise ValueError(
            f"model must hold the activations, got {type(model).__name__}, which matches itself. Replace it where it "
            "is used."
        )
    calls = functional_calls(model, types)
    parents = [m for m in model.modules() if any(type(child) in types for child in m.children())]
    if not parents:
        raise ValueError(_nothing(model, types, calls))
    keys = set(model.state_dict())
    count = swap_modules(
        model, lambda *_: True, _maker(make), fits=lambda module: type(module) in types, what="activation"
    )
    for parent in parents:
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # else its fused path would go on with the old activation
    _tell(model, keys, calls)
    return count


def _types(match: Any) -> tuple[type[nn.Module], ...]:
    types = match if isinstance(match, tuple) else (match,)
    for each in types:
        if not (isinstance(each, type) and issubclass(each, nn.Module)):
            raise TypeError(
                f"match must be a module type or a tuple of them, got {shown(each)}. "
                "Write nn.ReLU or (nn.ReLU, nn.GELU)."
            )
    if not types:
        raise ValueError("match must name at least one type, got (). Write nn.ReLU.")
    return types


def _maker(make: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """``make`` for one old module, refusing what would be lost or become shared."""
    made: list[nn.Module] = []

    def checked(old: nn.Module) -> nn.Module:
        if any(getattr(old, hooks) for hooks in _HOOKS):
            raise ValueError(
                f"model must have no hooks on what is replaced, got some on a {type(old).__name__}. Remove them before "
                "the swap and register them anew after it."
            )
        new = make()
        if not isinstance(new, nn.Module):
            raise TypeError(f"make must return a module, got {shown(new)}. Write lambda: nn.ELU().")
        if any(new is each for each in made):
            raise ValueError(
                f"make must return a new module each time, got the same {type(new).__name__} twice. Instances that "
                "were distinct must stay distinct."
            )
        made.append(new)
        return new

    return checked


def _tell(model: nn.Module, keys: set[str], calls: tuple[str, ...]) -> None:
    changed = sorted(keys ^ set(model.state_dict()))
    if changed:
        warnings.warn(
            f"swap_activations: keys of the state_dict changed: {', '.join(changed)}. Older checkpoints do not fit, "
            "and an optimizer must be made after the swap.",
            stacklevel=3,
        )
    if calls:
        warnings.warn(
            f"swap_activations: functional calls were seen and not replaced: {'; '.join(calls)}. Edit the code there.",
            stacklevel=3,
        )


def _nothing(model: nn.Module, types: tuple[type[nn.Module], ...], calls: tuple[str, ...]) -> str:
    names = " or ".join(each.__name__ for each in types)
    there = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    seen = f" It calls functions instead: {'; '.join(calls)}; edit the code there." if calls else ""
    return (
        f"match must fit a module of the model, got {names} and no such module.{seen} "
        f"Its modules without children are {shown(', '.join(there))}; a subclass must be named itself."
    )


# --- functional calls -----------------------------------------------------------------------------------------------


def functional_calls(model: nn.Module, match: Types) -> tuple[str, ...]:
    """Places in ``model`` that call the function of an activation instead of a module, as far as code shows it.

    Looked at are the methods of the model's own classes (not of torch's layers) for names such as ``F.relu`` or
    ``x.relu_()``, and attributes that hold such a function, as ``nn.TransformerEncoderLayer`` does. What is called
    behind further functions is not seen.

    Args:
        model: module to look at.
        match: activation type, or types.

    Returns:
        Texts such as ``"Block.forward: relu"``, sorted, each once.
    """
    wanted = {name for each in _types(match) for name in _FUNCTIONS.get(each, ())}
    functions = {
        getattr(home, name) for home in (torch, functional) for name in wanted if hasattr(home, name)
    }
    found: set[str] = set()
    for module in model.modules():
        kind = type(module).__name__
        found |= {
            f"{kind}.{key} = {getattr(value, '__name__', key)}"
            for key, value in vars(module).items()
            if callable(value) and not isinstance(value, nn.Module) and _is_in(value, functions)
        }
        if not type(module).__module__.startswith("torch."):
            found |= {f"{kind}.{method}: {name}" for method, name in _called(type(module)) if name in wanted}
    return tuple(sorted(found))


def _is_in(value: Any, functions: set[Any]) -> bool:
    return any(value is each for each in functions)


def _called(kind: type) -> Iterator[tuple[str, str]]:
    """Method and name of everything that the methods of a class (and of its own bases) take from something else."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for method, function in vars(base).items():
            code = getattr(function, "__code__", None)
            if code is not None and method != "__init__":
                yield from ((method, name) for name in _names(code))


def _names(code: Any) -> Iterator[str]:
    """Globals and attributes that the code loads, but for attributes of ``self`` (``self.relu`` is a module)."""
    before: Any = None
    for step in dis.get_instructions(code):
        own = before is not None and before.opname.startswith("LOAD_FAST") and before.argval == "self"
        if step.opname in {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD"} and not own:
            yield str(step.argval)
        if step.opname not in {"CACHE", "EXTENDED_ARG"}:
            before = step
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):  # comprehensions and inner functions
            yield from _names(constant)
