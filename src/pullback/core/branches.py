"""Modules that read the same input: whether they may be computed together, and stacked under ``torch.func.vmap``.

Their tensors are gathered from their own parameters in every call, so that these stay the leaves of autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_RANDOM = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = ("_parameters", "_buffers", "_modules")


# --- what may be computed together -----------------------------------------------------------------------------


def tree(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and all modules below it, a shared one at each of its places."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from tree(child)


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says: hooks, or a ``forward`` of its own."""
    own = vars(module)
    return any(own.get(name) for name in _HOOKS) or "forward" in own


def alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules differ in the values of their tensors alone."""
    if type(first) is not type(second):
        return False
    mine, other = vars(first), vars(second)
    for name in ("_parameters", "_buffers"):
        if [_shape(*row) for row in mine[name].items()] != [_shape(*row) for row in other[name].items()]:
            return False
    settings = [
        {k: v for k, v in own.items() if k not in _TENSORS and "hook" not in k} for own in (mine, other)
    ]
    try:
        if not bool(settings[0] == settings[1]):
            return False
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ):  # settings that hold tensors or arrays have no plain equality
        return False
    ours, theirs = mine["_modules"], other["_modules"]
    return list(ours) == list(theirs) and all(
        (a is None and b is None) or (a is not None and b is not None and alike(a, b))
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def _shape(name: str, tensor: Tensor | None) -> tuple[Any, ...]:
    return (name,) if tensor is None else (name, tensor.shape, tensor.dtype, tensor.device)


def unsteady(module: nn.Module) -> bool:
    """Whether two calls in a row would differ or leave a trace: dropout or running statistics, in training."""
    return keeps_statistics(module) or any(m.training and isinstance(m, _RANDOM) for m in tree(module))


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a call edits buffers: running statistics, in training."""
    return any(m.training and bool(m._buffers) for m in tree(module))


def plain(branches: Sequence[nn.Module]) -> str:
    """Why the branches cannot be computed together at all; empty if they can."""
    if any(hooked(module) for branch in branches for module in tree(branch)):
        return "a module has hooks or a forward of its own"
    if not all(alike(branches[0], branch) for branch in branches[1:]):
        return "the branches differ in structure"
    return ""


def equal_pair(modules: Sequence[nn.Module]) -> tuple[int, int] | None:
    """Positions of two different modules with equal values in all parameters, if there are any."""
    seen: dict[tuple[float, ...], int] = {}
    for k, module in enumerate(modules):
        params = list(module.parameters())
        if not params or any(p.is_meta or nn.parameter.is_lazy(p) for p in params):
            continue
        sums = tuple(torch.stack([p.detach().double().sum() for p in params]).tolist())
        first = seen.setdefault(sums, k)
        if modules[first] is not module and all(map(torch.equal, params, modules[first].parameters())):
            return first, k
    return None


def of_torch(module: nn.Module) -> bool:
    """Whether all code of ``module`` is torch's own, so that nothing in it may depend on values or keep tensors."""
    return all(type(each).__module__.startswith("torch.nn.modules.") for each in tree(module))


# --- forward mode ----------------------------------------------------------------------------------------------


def jvp(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x)`` and its derivative in the direction ``tangent`` (`torch.func.jvp`), without torch's warnings."""
    if not torch.compiler.is_compiling():
        _load_rules()
    forward_mode: Any = torch.func.jvp  # its type is that of has_aux=True as well
    return forward_mode(function, (x,), (tangent,))


def jvp_with_statistics(branch: nn.Module, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """As `jvp` of a module that edits its buffers, which forward mode allows only on copies; they are kept."""
    own = dict(branch.named_buffers())

    def call(v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        copies = {name: buffer.clone() for name, buffer in own.items()}
        return torch.func.functional_call(branch, copies, (v,)), copies

    _load_rules()
    forward_mode: Any = torch.func.jvp
    out, turned, edited = forward_mode(call, (x,), (tangent,), has_aux=True)
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(edited[name])
    return out, turned


@cache
def _load_rules() -> None:
    """Let torch load its forward-mode rules, which it scripts by a function that it has deprecated itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))


# --- any structure, stacked ------------------------------------------------------------------------------------


def stacked_state(branches: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of all branches, each name's stacked along a new first axis, by the leaves themselves."""
    rows = [{**dict(b.named_parameters()), **dict(b.named_buffers())} for b in branches]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def each_branch(branch: nn.Module, state: dict[str, Tensor], x: Tensor, chunk: int | None) -> Tensor:
    """F_i(x) of all branches [count, *x.shape], ``chunk`` of them at a time; dropout draws for each its own."""

    def call(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(branch, own, (x,))

    return torch.vmap(call, randomness="different", chunk_size=chunk)(state)


def each_product(
    branch: nn.Module, state: dict[str, Tensor], x: Tensor, tangents: Tensor, chunk: int | None
) -> Tensor:
    """J_i(x) t_i of all branches, one forward-mode product under ``vmap``; tangents [count, *x.shape]."""

    def call(own: dict[str, Tensor], tangent: Tensor) -> Tensor:
        return jvp(lambda v: torch.func.functional_call(branch, own, (v,)), x, tangent)[1]

    return torch.vmap(call, randomness="error", chunk_size=chunk)(state, tangents)
