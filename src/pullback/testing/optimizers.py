"""Checks of optimizers: they are torch's, they descend, they respect gradients, groups and layouts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import case_loss, train
from pullback.testing.tools import expect_close, expect_finite, expect_same, user_model, values


def trained(case: Case, steps: Any = range(5), **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The user's model after ordinary steps; ``settings`` overwrite those of the groups."""
    model = user_model(case)
    optimizer = case.build(list(model.parameters()))
    for group in optimizer.param_groups:
        group.update(settings)
    train(case, model, optimizer, steps)
    return model, optimizer


def _defaults(case: Case) -> dict[str, Any]:
    return dict(case.build([nn.Parameter(torch.zeros(2, 2))]).defaults)


@check("optimizer", refusable="no")
def torch_optimizer(case: Case) -> None:
    """It is a ``torch.optim.Optimizer`` whose groups hold every default."""
    optimizer = case.build([nn.Parameter(torch.zeros(2, 2))])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BrokenContract("It is no torch.optim.Optimizer: schedulers and GradScaler refuse it.")
    missing = set(optimizer.defaults) - set(optimizer.param_groups[0])
    if missing or not optimizer.defaults:
        raise BrokenContract(f"The groups lack the defaults {sorted(missing)}.")


@check("optimizer")
def descends(case: Case) -> None:
    """It lowers the toy loss within 50 steps."""
    model = user_model(case)
    optimizer = case.build(list(model.parameters()))
    losses = train(case, model, optimizer, [0] * 50)
    if not losses[-1] < losses[0]:
        raise BrokenContract(f"The loss went from {losses[0]:.4g} to {losses[-1]:.4g} in 50 steps.")


@check("optimizer", refusable="declared")
def neutral_optimizer(case: Case) -> None:
    """The neutral setting (or lr = 0 without weight decay) leaves parameters bitwise as they are."""
    model = user_model(case)
    before = values(model)
    if case.neutral is not None:
        train(case, model, case.neutral(list(model.parameters())), range(3))
    elif "lr" in _defaults(case):
        settings = {"lr": 0.0, **({"weight_decay": 0.0} if "weight_decay" in _defaults(case) else {})}
        model, _ = trained(case, range(3), **settings)
    else:
        raise NotApplicable("neither a neutral setting nor a learning rate")
    expect_same(values(model), before, "The neutral setting moves parameters")


@check("optimizer", refusable="no")
def bad_rates(case: Case) -> None:
    """A negative or NaN learning rate and an empty list of parameters are refused by ValueError."""
    optimizer = case.build([nn.Parameter(torch.zeros(2, 2))])
    tries: list[tuple[str, Any, dict[str, Any]]] = [("no parameters", [], {})]
    if "lr" in optimizer.defaults:
        tries += [(f"lr={lr}", [nn.Parameter(torch.zeros(2))], {"lr": lr}) for lr in (-0.1, math.nan)]
    for what, params, settings in tries:
        try:
            case.build(params) if not settings else type(optimizer)(params, **settings)
        except ValueError:
            continue
        raise BrokenContract(f"{what} was accepted.", fix="Raise ValueError in __init__.")


@check("optimizer", refusable="no")
def optimizer_missing_gradients(case: Case) -> None:
    """Parameters without gradient and frozen ones stay; a step without gradients is a no-op."""
    model, optimizer = trained(case, range(2))
    first, second = list(model.parameters())[:2]
    second.requires_grad_(False)
    optimizer.zero_grad()
    case_loss(case, model, 2).backward()
    first.grad = None
    before = first.detach().clone(), second.detach().clone()
    optimizer.step()
    expect_same((first.detach(), second.detach()), before, "A parameter without gradient moved")
    optimizer.zero_grad()
    held = values(model)
    optimizer.step()
    expect_same(values(model), held, "A step without any gradient moved parameters")


@check("optimizer", refusable="raises")
def groups_apart(case: Case) -> None:
    """Each group keeps its own learning rate: two groups equal two optimizers."""
    if "lr" not in _defaults(case):
        raise NotApplicable("no learning rate")
    rates = (_defaults(case)["lr"], 0.5 * _defaults(case)["lr"])
    joined, split = user_model(case), user_model(case)
    halves = [list(joined.parameters())[:2], list(joined.parameters())[2:]]
    together = case.build([{"params": h, "lr": r} for h, r in zip(halves, rates, strict=True)])
    pieces = [list(split.parameters())[:2], list(split.parameters())[2:]]
    apart = [case.build([{"params": p, "lr": r}]) for p, r in zip(pieces, rates, strict=True)]
    for step in range(3):
        train(case, joined, together, [step])
        split.zero_grad()
        case_loss(case, split, step).backward()
        for each in apart:
            each.step()
    for name, value in values(joined).items():
        expect_close(value, values(split)[name], f"{name} depends on the other group", rtol=1e-5, atol=1e-7)


@check("optimizer", refusable="raises")
def optimizer_added_group(case: Case) -> None:
    """``add_param_group`` in the middle of a run trains the new parameter."""
    model, optimizer = trained(case, range(2))
    extra = nn.Parameter(torch.linspace(-1.0, 1.0, 12).reshape(4, 3))
    optimizer.add_param_group({"params": [extra]})
    before = extra.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        (case_loss(case, model, 2) + (extra**2).sum()).backward()
        optimizer.step()
    if torch.equal(extra.detach(), before):
        raise BrokenContract("The parameter of the added group was not trained.")


@check("optimizer", refusable="raises")
def optimizer_dtypes(case: Case) -> None:
    """bfloat16 and float64 parameters keep their dtype and stay finite."""
    for dtype in (torch.bfloat16, torch.float64):
        model = user_model(case).to(dtype)
        train(case, model, case.build(list(model.parameters())), range(3))
        if any(p.dtype != dtype for p in model.parameters()):
            raise BrokenContract(f"A {dtype} parameter changed its dtype.")
        expect_finite(values(model), f"After 3 steps in {dtype}, a parameter")


@check("optimizer", refusable="raises")
def optimizer_odd_parameters(case: Case) -> None:
    """0-dim, empty and transposed parameters and gradients give what contiguous ones give."""
    found: list[Tensor] = []
    for turned in (False, True):
        base = torch.arange(12.0).reshape(3, 4) / 12
        matrix = nn.Parameter(base.t().contiguous().t() if turned else base)
        params = [matrix, nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(0, 3))]
        optimizer = case.build(params)
        for _ in range(3):
            params[0].grad = torch.full((4, 3), 0.1).t() if turned else torch.full((3, 4), 0.1)
            params[1].grad, params[2].grad = torch.tensor(0.1), torch.zeros(0, 3)
            optimizer.step()
        expect_finite(params, "A parameter of an odd shape")
        found.append(matrix.detach())
    expect_close(found[1], found[0], "A transposed parameter ends elsewhere", rtol=1e-5, atol=1e-6)


@check("optimizer", refusable="raises")
def sparse_gradients(case: Case) -> None:
    """Sparse gradients work as dense ones do, or are refused by an error that says so."""
    found = []
    for sparse in (True, False):
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = case.build([weight])
        gradient = torch.zeros(4, 3)
        gradient[1] = 0.5
        weight.grad = gradient.to_sparse(1) if sparse else gradient
        try:
            optimizer.step()
        except (RuntimeError, ValueError, TypeError) as error:
            if sparse and "sparse" in str(error).lower() and "SparseCPU" not in str(error):
                return
            raise BrokenContract(
                f"Sparse gradients end in {str(error)[:80]!r}.", fix="Refuse them in step()."
            ) from error
        found.append(weight.detach())
    expect_close(found[0][1], found[1][1], "A sparse gradient gives another update", rtol=1e-5, atol=1e-7)


@check("optimizer", refusable="declared")
def maximizes(case: Case) -> None:
    """``maximize=True`` equals descending the negative loss."""
    if "maximize" not in _defaults(case):
        raise NotApplicable("no maximize")
    up, down = user_model(case), user_model(case)
    for model, sign in ((up, -1.0), (down, 1.0)):
        optimizer = case.build(list(model.parameters()))
        for group in optimizer.param_groups:
            group["maximize"] = sign < 0
        for step in range(3):
            optimizer.zero_grad()
            (sign * case_loss(case, model, step)).backward()
            optimizer.step()
    for name, value in values(up).items():
        expect_close(value, values(down)[name], f"maximize gives another {name}", rtol=1e-5, atol=1e-7)


@check("optimizer")
def foreach_equals_loop(case: Case) -> None:
    """``foreach=True`` gives what the loop gives."""
    if "foreach" not in _defaults(case):
        raise NotApplicable("no foreach")
    one, other = trained(case, foreach=True)[0], trained(case, foreach=False)[0]
    for name, value in values(one).items():
        expect_close(
            value, values(other)[name], f"foreach gives another {name} than the loop", rtol=1e-5, atol=1e-7
        )
