"""Checks of layers: shapes, exact gradients, every parameter alive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built
from pullback.testing.tools import clone, differentiable, draw, expect_same, leaves, tensors


def pure(component: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """The component as a function of inputs and parameters, and the point; buffers start afresh each time."""
    names = [name for name, p in component.named_parameters() if p.requires_grad]
    points = [
        *leaves(differentiable(inputs)),
        *leaves([dict(component.named_parameters())[n] for n in names]),
    ]
    count = len(differentiable(inputs))

    def function(*floats: Tensor) -> Tensor:
        rest = iter(floats[:count])
        filled = [next(rest) if isinstance(e, Tensor) and e.is_floating_point() else e for e in inputs]
        buffers = {name: buffer.clone() for name, buffer in component.named_buffers()}
        state = {**dict(zip(names, floats[count:], strict=True)), **buffers}
        out = torch.func.functional_call(component, state, tuple(filled))
        return torch.cat([each.reshape(-1) for _, each in tensors(out) if each.requires_grad])

    return function, tuple(points)


@check("layer", "objective", refusable="declared")
def gradcheck(case: Case) -> None:
    """Gradients for inputs and parameters equal finite differences (float64)."""
    function, points = _function(case)
    try:
        torch.autograd.gradcheck(function, points, fast_mode=_large(points))
    except GradcheckError as error:
        raise BrokenContract(_first(error)) from error


@check("layer", "objective", refusable="raises")
def gradgradcheck(case: Case) -> None:
    """Second derivatives equal finite differences (float64)."""
    function, points = _function(case)
    try:
        torch.autograd.gradgradcheck(function, points, fast_mode=_large(points))
    except GradcheckError as error:
        raise BrokenContract(_first(error)) from error


def _function(case: Case) -> tuple[Any, tuple[Tensor, ...]]:
    inputs = tuple(e[:2] if isinstance(e, Tensor) and e.dim() else e for e in draw(case))
    component = built(case)
    function, points = pure(component, inputs)
    if not points:
        raise NotApplicable("nothing to differentiate")
    return function, points


def _large(points: tuple[Tensor, ...]) -> bool:
    return sum(point.numel() for point in points) > 60


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


@check("layer", refusable="no")
def output_shape(case: Case) -> None:
    """The output's shape is the declared function of the input's."""
    if case.shape is None:
        raise NotApplicable("the case declares no shape")
    for size in (None, 1):
        inputs = tuple(e[:size] if isinstance(e, Tensor) and e.dim() else e for e in draw(case))
        out = built(case)(*inputs)
        wanted = tuple(case.shape(inputs[0].shape))
        if tuple(out.shape) != wanted:
            raise BrokenContract(
                f"Input {tuple(inputs[0].shape)} gives {tuple(out.shape)} instead of {wanted}."
            )


@check("layer")
def parameters_alive(case: Case) -> None:
    """Every trainable parameter gets a gradient."""
    component = built(case)
    named = {name: p for name, p in component.named_parameters() if p.requires_grad}
    if not named:
        raise NotApplicable("no parameters")
    outs = [(each * each).sum() + each.sum() for _, each in tensors(component(*draw(case)))]
    grads = torch.autograd.grad(torch.stack(outs).sum(), list(named.values()), allow_unused=True)
    dead = [name for name, grad in zip(named, grads, strict=True) if grad is None]
    if dead:
        raise BrokenContract(f"No gradient reaches {', '.join(dead)}.")


@check("layer", refusable="declared")
def eval_is_pure(case: Case) -> None:
    """In eval mode a call changes no buffer and gives the same values again."""
    component = built(case).eval()
    before = clone(component.state_dict())
    with torch.no_grad():
        first = component(*draw(case))
        second = component(*draw(case))
    expect_same(first, second, "Two calls in eval mode differ")
    expect_same(dict(component.state_dict()), dict(before), "A call in eval mode changed the state")
