"""Checks of searches: closed form, budget, status, seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built, search
from pullback.testing.tools import expect_same, flags, gradients, hooks, values

_STATUSES = ("converged", "max_steps", "diverged")


def _value(result: Any) -> torch.Tensor:
    return torch.as_tensor(
        np.asarray(result.value.detach() if hasattr(result.value, "detach") else result.value)
    )


@check("search", refusable="no")
def result_form(case: Case) -> None:
    """The result has ``value``, a known ``status`` and a whole number of ``steps``."""
    result = search(case, built(case), None, 0)
    missing = [name for name in ("value", "status", "steps") if not hasattr(result, name)]
    if missing:
        raise BrokenContract(f"The result lacks {', '.join(missing)}.", fix="Return a SearchResult.")
    if result.status not in _STATUSES:
        raise BrokenContract(f"status is {result.status!r}, not one of {', '.join(_STATUSES)}.")
    if isinstance(result.steps, bool) or not isinstance(result.steps, int) or result.steps < 0:
        raise BrokenContract(f"steps is {result.steps!r}.")


@check("search")
def closed_form(case: Case) -> None:
    """The closed-form problem is solved to the stated tolerance, and the status says so."""
    if case.solution is None:
        raise NotApplicable("the case states no solution")
    result = search(case, built(case), None, 0)
    error = (_value(result).double() - torch.as_tensor(case.solution).double()).abs().max().item()
    if not error <= case.tolerance:
        raise BrokenContract(f"The value is off by {error:.3g}, {case.tolerance:g} is promised.")
    if result.status == "diverged":
        raise BrokenContract("The status of a solved problem is 'diverged'.")


@check("search", refusable="declared")
def budget_kept(case: Case) -> None:
    """With a budget of one step it stops there, and says that it has not converged."""
    result = search(case, built(case), 1, 0)
    if result.steps > 1:
        raise BrokenContract(f"A budget of 1 took {result.steps} steps.")
    if case.solution is not None and result.status == "converged":
        error = (_value(result).double() - torch.as_tensor(case.solution).double()).abs().max().item()
        if error > 10 * case.tolerance:
            raise BrokenContract(f"After one step the status is 'converged' with an error of {error:.3g}.")


@check("search", refusable="declared")
def failure_is_a_status(case: Case) -> None:
    """A problem that cannot be solved ends in a status other than 'converged', not in an exception."""
    if case.hopeless is None:
        raise NotApplicable("the case has no hopeless problem")
    result = case.hopeless(built(case))
    if result.status == "converged":
        raise BrokenContract("A hopeless problem has the status 'converged'.")


@check("search", refusable="declared")
def seeded_search(case: Case) -> None:
    """The same seed gives the same value, bitwise, whatever the global generators hold."""
    found = []
    for state in range(2):
        torch.manual_seed(state)
        found.append(_value(search(case, built(case), 3, 5)))
    expect_same(found[0], found[1], "The same seed gives different values")


@check("search", refusable="declared")
def reusable_search(case: Case) -> None:
    """A second run of the same instance gives what the first gave."""
    component = built(case)
    first = _value(search(case, component, None, 0))
    expect_same(_value(search(case, component, None, 0)), first, "A second run differs from the first")


@check("search", refusable="no")
def searched_model_left_alone(case: Case) -> None:
    """A search on the user's model leaves its weights, buffers, gradients, flags and hooks as they were."""
    component = built(case)
    model = getattr(component, "model", None)
    if not isinstance(model, nn.Module):
        raise NotApplicable("the search has no model")
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [values(model), gradients(model), flags(model), hooks(model)]
    search(case, component, 2, 0)
    expect_same(
        [values(model), gradients(model), flags(model), hooks(model)],
        before,
        "The search changed the model it was given",
        fix="Use torch.autograd.grad, and put modes, flags and hooks back in a finally block.",
    )
