"""Checks of fields: closed form, conversions, order and cost of the solver, times, rows.

A field's value is a tensor or a dataclass of tensors, each with the batch as its first axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built
from pullback.testing.tools import draw, expect_close, expect_same, global_rng, tensors


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
    coarse, fine = _error(case, case.coarse), _error(case, 2 * case.coarse)
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
        if one.is_floating_point() and one.dtype != torch.float32:
            raise BrokenContract(f"float32 in gives {one.dtype} out.")
        expect_close(one, other, f"float32 is wrong{where}", rtol=1e-3, atol=1e-4)


@check("field", refusable="declared")
def rows_apart(case: Case) -> None:
    """Each row of a batch gets what it gets alone."""
    component = built(case)
    inputs = draw(case)
    together = component(*inputs)
    first = tuple(e[:1] if isinstance(e, torch.Tensor) and e.dim() else e for e in inputs)
    for (where, alone), (_, among) in zip(tensors(component(*first)), tensors(together), strict=True):
        wanted = among[:1] if among.dim() else among
        expect_close(alone, wanted, f"A row depends on the others{where}", rtol=1e-6, atol=1e-9)


@check("field")
def times_broadcast(case: Case) -> None:
    """One time for all rows, as a 0-dim tensor or a number, does what the same time for each row does."""
    if case.time is None:
        raise NotApplicable("the case names no time among its inputs")
    component, inputs = built(case), draw(case)
    one = inputs[case.time][0].clone()
    wanted = component(*_replaced(inputs, case.time, one.expand(len(inputs[case.time])).clone()))
    for name, given in (("0-dim tensor", one), ("number", float(one))):
        got = component(*_replaced(inputs, case.time, given))
        for (where, first), (_, second) in zip(_values(got), _values(wanted), strict=True):
            expect_close(first, second, f"A time that is a {name} differs{where}", rtol=1e-9, atol=1e-12)


def _replaced(inputs: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*inputs[:position], value, *inputs[position + 1 :])


def _values(value: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of the states' shape; what belongs to times has another one for one time."""
    found = list(tensors(value))
    largest = max((each.numel() for _, each in found), default=0)
    return [(where, each) for where, each in found if each.numel() == largest]


@check("field")
def field_evaluations(case: Case) -> None:
    """Following the field calls it exactly as often as stated."""
    if case.solve is None or case.evaluations is None:
        raise NotApplicable("the case does not state the number of evaluations")
    for steps in (1, 2, 5):
        component = built(case)
        calls = _counting(component)
        case.solve(component, steps)
        if len(calls) != case.evaluations(steps):
            raise BrokenContract(
                f"{steps} steps take {len(calls)} evaluations, {case.evaluations(steps)} are stated."
            )


def _counting(component: Any) -> list[None]:
    """A list that grows by one with every call of the component."""
    calls: list[None] = []
    plain = type(component)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return plain.__call__(self, *args, **kwargs)

    component.__class__ = type(plain.__name__, (plain,), {"__call__": call, "__doc__": plain.__doc__})
    return calls


@check("field", refusable="declared")
def solve_keeps_no_graph(case: Case) -> None:
    """Following the field builds no autograd graph."""
    if case.solve is None:
        raise NotApplicable("the case has no solve")
    component = built(case)
    with torch.enable_grad():
        value = case.solve(component, 4)
    if value.requires_grad:
        raise BrokenContract(
            "The solved value carries a graph.", fix="Follow the field under torch.no_grad()."
        )


@check("field")
def solve_repeats(case: Case) -> None:
    """Following the field twice gives the same value bit by bit and moves no global generator."""
    if case.solve is None:
        raise NotApplicable("the case has no solve")
    before = global_rng()
    first = case.solve(built(case), 4)
    expect_same(before, global_rng(), "Following the field moved a global generator")
    torch.manual_seed(987)
    second = case.solve(built(case), 4)
    expect_same(first, second, "Following the field twice gives two values", fix="Draw from named streams.")
