"""Checks of recomputation: bitwise the plain call in all that can be seen, and less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.saved_bytes import saved_bytes
from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built, recompute
from pullback.testing.tools import (
    batch_for,
    differentiable,
    expect_same,
    flags,
    hooks,
    leaves,
    rng,
    user_model,
)


class _Noisy(nn.Module):
    """The user's model behind dropout, or behind batch normalisation, or one that raises when asked to."""

    def __init__(self, model: nn.Module, front: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.front = model, front

    def forward(self, first: Tensor, *others: Any) -> Any:
        return self.model(self.front(first), *others)


def _call(case: Case, front: Callable[[Any], Any] | None, *, wrapped: bool, train: bool = True) -> Any:
    """Output, gradients, buffers and the state of the generator after forward and backward."""
    torch.manual_seed(11)
    model = user_model(case)
    if front is not None:
        model = _Noisy(model, front).to(next(model.parameters()).dtype)
    model.train(train)
    arguments = leaves(batch_for(model, case))
    torch.manual_seed(11)
    out = recompute(case, built(case), model, arguments) if wrapped else model(*arguments)
    weights = torch.randn(out.shape, generator=rng(4), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    grads = [each.grad for each in (*differentiable(arguments), *model.parameters())]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"out": out.detach(), "grads": grads, "buffers": buffers, "rng": torch.get_rng_state()}


def _compare(case: Case, front: Callable[[], Any] | None, keys: tuple[str, ...], what: str) -> None:
    for train in (True, False):
        got = _call(case, None if front is None else front(), wrapped=True, train=train)
        wanted = _call(case, None if front is None else front(), wrapped=False, train=train)
        for key in keys:
            mode = "train" if train else "eval"
            expect_same(got[key], wanted[key], f"{what} ({mode} mode): {key} differ from the plain call")


@check("recompute", refusable="no")
def same_outputs(case: Case) -> None:
    """Outputs are bitwise those of the plain call."""
    _compare(case, None, ("out",), "Plain model")


@check("recompute", refusable="no")
def same_gradients(case: Case) -> None:
    """Gradients of inputs and parameters are bitwise those of the plain call."""
    _compare(case, None, ("grads",), "Plain model")


@check("recompute", refusable="declared")
def same_random_numbers(case: Case) -> None:
    """With dropout, outputs, gradients and the generator's state afterwards are those of the plain call."""
    _compare(case, lambda: nn.Dropout(0.5), ("out", "grads", "rng"), "With dropout")


@check("recompute", refusable="declared")
def same_batch_statistics(case: Case) -> None:
    """BatchNorm's running statistics and counter are updated once, bitwise as in the plain call."""
    if differentiable(batch_for(user_model(case), case))[0].dim() != 2:
        raise NotApplicable("the model's input is no [batch, features]")
    width = differentiable(batch_for(user_model(case), case))[0].shape[-1]
    _compare(case, lambda: nn.BatchNorm1d(width), ("buffers",), "With batch normalisation")


@check("recompute", refusable="declared")
def stored_bytes(case: Case) -> None:
    """The bytes kept for the backward pass are at most ``memory`` times those of the plain call."""
    if case.memory is None:
        raise NotApplicable("the case states no memory")
    model = user_model(case)
    arguments = leaves(batch_for(model, case))
    own = (model, *differentiable(arguments))
    stored = saved_bytes(lambda: recompute(case, built(case), model, arguments), *own)
    plain = saved_bytes(lambda: model(*arguments), *own)
    if stored > case.memory * plain:
        raise BrokenContract(f"Keeps {stored} bytes; {case.memory:g} x {plain} are promised.")


@check("recompute", refusable="declared")
def recompute_without_autograd(case: Case) -> None:
    """Under ``no_grad`` the values are the plain ones and carry no graph."""
    model = user_model(case)
    arguments = batch_for(model, case)
    with torch.no_grad():
        got = recompute(case, built(case), model, arguments)
        expect_same(got, model(*arguments), "Values differ under no_grad")
    if got.requires_grad:
        raise BrokenContract("The output requires a gradient under no_grad.")


@check("recompute", refusable="no")
def recompute_leaves_no_trace(case: Case) -> None:
    """Hooks, train/eval and ``requires_grad`` of the model are as before, also after an exception."""
    model = user_model(case)
    arguments = leaves(batch_for(model, case))
    before = hooks(model), flags(model)
    recompute(case, built(case), model, arguments).sum().backward()
    _unchanged(model, before, "A call")

    def stop(_: Any) -> Any:
        raise ArithmeticError("planned")

    noisy = _Noisy(model, stop)
    before = hooks(noisy), flags(noisy)
    try:
        recompute(case, built(case), noisy, arguments)
    except ArithmeticError:
        _unchanged(noisy, before, "An exception in the model")
        return
    raise BrokenContract("An exception in the model was swallowed.")


def _unchanged(model: nn.Module, before: tuple[Any, Any], what: str) -> None:
    if before != (hooks(model), flags(model)):
        raise BrokenContract(f"{what} left hooks or flags changed.", fix="Restore them in a finally block.")


@check("recompute", refusable="raises")
def recompute_explicit(case: Case) -> None:
    """``torch.autograd.grad`` for the model's parameters works and gives what ``backward()`` gives."""
    model = user_model(case)
    arguments = leaves(batch_for(model, case))
    params = list(model.parameters())
    wanted = torch.autograd.grad(model(*arguments).sum(), params)
    got = torch.autograd.grad(recompute(case, built(case), model, arguments).sum(), params, allow_unused=True)
    for one, other in zip(got, wanted, strict=True):
        if one is None:
            raise BrokenContract(
                "autograd.grad gives None for a parameter.", fix="Make parameters explicit inputs."
            )
        expect_same(one, other, "autograd.grad gives another gradient")
