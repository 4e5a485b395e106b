"""Checks of transforms in trouble: NaN and Inf in gradients under each policy."""

from __future__ import annotations

import warnings

import torch

from pullback.core.checks import NonFinite, NonFiniteError
from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, check
from pullback.testing.exercise import case_loss
from pullback.testing.tools import clone, expect_same
from pullback.testing.transforms import OPTIMIZERS, Loop


def _poisoned(case: Case, policy: NonFinite) -> tuple[Loop, str]:
    """Two good steps, then gradients with one NaN, ready for the step; the name of the poisoned parameter."""
    loop = Loop(case, OPTIMIZERS["AdamW"], nonfinite=policy).train(range(2))
    loop.optimizer.zero_grad()
    case_loss(case, loop.model, 2).backward()
    name, grad = next((n, p.grad) for n, p in loop.model.named_parameters() if p.grad is not None)
    with torch.no_grad():
        grad.view(-1)[0] = float("nan")
    return loop, name


@check("transform", refusable="no")
def nonfinite_raise(case: Case) -> None:
    """``nonfinite="raise"`` names the parameter and leaves parameters and state as they were."""
    loop, name = _poisoned(case, "raise")
    before, state = loop.values(), clone(loop.component.state_dict())
    try:
        loop.optimizer.step()
    except NonFiniteError as error:
        if name not in str(error):
            raise BrokenContract(f"The error does not name {name}: {error}") from error
    else:
        raise BrokenContract("A NaN in a gradient raised nothing.")
    expect_same(loop.values(), before, "Parameters moved although NaN was refused")
    expect_same(loop.component.state_dict(), state, "The state advanced although NaN was refused")


@check("transform", refusable="no")
def nonfinite_skip(case: Case) -> None:
    """``nonfinite="skip"`` leaves all as if the step had not happened, also what follows."""
    loop, _ = _poisoned(case, "skip")
    loop.optimizer.step()
    got = loop.train(range(3, 6)).values()
    wanted = Loop(case, OPTIMIZERS["AdamW"]).train([0, 1, 3, 4, 5]).values()
    expect_same(got, wanted, "A skipped step left a trace")


@check("transform", refusable="declared")
def nonfinite_warn(case: Case) -> None:
    """``nonfinite="warn"`` warns and goes on."""
    loop, _ = _poisoned(case, "warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loop.optimizer.step()
    if not any(issubclass(each.category, RuntimeWarning) for each in seen):
        raise BrokenContract("No RuntimeWarning was given.")
    if loop.component.steps != 3:
        raise BrokenContract(f"After 3 steps with a warning the count is {loop.component.steps}.")
