"""Checks of fields: closed form, conversions, order of the solver."""

from __future__ import annotations

import math

import torch

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built
from pullback.testing.tools import draw, expect_close, tensors


def _error(case: Case, steps: int) -> float:
    if case.solve is None or case.solution is None:
        raise NotApplicable("the case has no solve with a solution")
    value = case.solve(built(case), steps)
    return float((value.detach().double() - torch.as_tensor(case.solution).double()).abs().max())


@check("field")
def field_closed_form(case: Case) -> None:
    """Following the field with many steps reaches the closed form to the stated tolerance."""
    error = _error(case, 256)
    if not error <= case.tolerance:
        raise BrokenContract(f"256 steps are off by {error:.3g}, {case.tolerance:g} is promised.")


@check("field", refusable="declared")
def solver_order(case: Case) -> None:
    """Halving the step divides the error by two to the power of the stated order."""
    if case.order is None:
        raise NotApplicable("the case states no order")
    coarse, fine = _error(case, 8), _error(case, 16)
    if coarse < 1e-11:
        raise NotApplicable("exact up to rounding already")
    found = math.log2(coarse / max(fine, 1e-300))
    if found < case.order - 0.35:
        raise BrokenContract(f"The error falls with order {found:.2f}, {case.order:g} is promised.")


@check("field")
def conversions_invert(case: Case) -> None:
    """Each conversion there and back gives the original."""
    if case.conversions is None:
        raise NotApplicable("the case has no conversions")
    for position, (original, back) in enumerate(case.conversions(built(case), *draw(case))):
        expect_close(back, original, f"Conversion {position} does not invert", rtol=1e-6, atol=1e-8)


@check("field", refusable="raises")
def field_dtypes(case: Case) -> None:
    """float32 in gives float32 out, near the float64 value."""
    component = built(case)
    if isinstance(component, torch.nn.Module):
        component.to(torch.float32)
    inputs = draw(case, torch.float32)
    got = component(*inputs)
    reference = built(case)
    if isinstance(reference, torch.nn.Module):
        reference.to(torch.float64)
    exact = tuple(e.double() if isinstance(e, torch.Tensor) and e.is_floating_point() else e for e in inputs)
    for (where, one), (_, other) in zip(tensors(got), tensors(reference(*exact)), strict=True):
        if one.dtype != torch.float32:
            raise BrokenContract(f"float32 in gives {one.dtype} out.")
        expect_close(one, other, f"float32 is wrong{where}", rtol=1e-3, atol=1e-4)


@check("field", refusable="declared")
def rows_apart(case: Case) -> None:
    """Each row of a batch gets what it gets alone."""
    component = built(case)
    inputs = draw(case)
    together = component(*inputs)
    first = tuple(e[:1] if isinstance(e, torch.Tensor) and e.dim() else e for e in inputs)
    expect_close(component(*first), together[:1], "A row depends on the others", rtol=1e-6, atol=1e-9)
