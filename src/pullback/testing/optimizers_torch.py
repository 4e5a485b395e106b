"""Checks of optimizers among torch's tools: closures, schedulers, GradScaler, compile, tensor rates, growth."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import case_loss, train
from pullback.testing.optimizers import trained
from pullback.testing.tools import expect_close, expect_same, tensors_left_by, user_model, values


@check("optimizer", refusable="raises")
def optimizer_closures(case: Case) -> None:
    """``step(closure)`` runs the closure with autograd on, returns its loss, and steps the ordinary way."""
    model = user_model(case)
    optimizer = case.build(list(model.parameters()))
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = case_loss(case, model, step)
            loss.backward()
            return loss

        with torch.no_grad():
            wanted = float(case_loss(case, model, step))
        loss = optimizer.step(closure)
        if loss is None or abs(float(torch.as_tensor(loss).detach()) - wanted) > 1e-5 * max(1.0, abs(wanted)):
            raise BrokenContract(f"step(closure) returns {loss} instead of the loss {wanted:.4g}.")
    expect_same(values(model), values(trained(case, range(3))[0]), "Steps with a closure differ")


@check("optimizer")
def optimizer_resumes(case: Case) -> None:
    """5 steps, the state through a file, 5 more: bitwise 10 steps."""
    whole = values(trained(case, range(10))[0])
    first, optimizer = trained(case, range(5))
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = user_model(case)
    second.load_state_dict(weights)
    fresh = case.build(list(second.parameters()))
    fresh.load_state_dict(state)
    train(case, second, fresh, range(5, 10))
    expect_same(
        values(second), whole, "A resumed run differs", fix="Keep counters in groups or state[parameter]."
    )


@check("optimizer", refusable="declared")
def rate_is_followed(case: Case) -> None:
    """Schedulers attach, and a rate that falls to zero stops the parameters."""
    model, optimizer = trained(case, range(1))
    if "lr" not in optimizer.defaults:
        raise NotApplicable("no learning rate")
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    one = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4, cycle_momentum=False)
    train(case, model, optimizer, [1])
    one.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(case, model, optimizer, [2])
    scheduler.step()
    before = values(model)
    train(case, model, optimizer, [3])
    expect_same(values(model), before, "Parameters move after the scheduler set lr to 0")


@check("optimizer", refusable="raises")
def tensor_rate(case: Case) -> None:
    """The learning rate may be a 0-dim tensor."""
    _, optimizer = trained(case, range(1))
    if "lr" not in optimizer.defaults:
        raise NotApplicable("no learning rate")
    rate = float(optimizer.defaults["lr"])
    got = values(trained(case, lr=torch.tensor(rate), foreach=False)[0])
    wanted = values(trained(case, foreach=False)[0])
    for name, value in got.items():
        expect_close(value, wanted[name], f"A tensor rate gives another {name}", rtol=1e-5, atol=1e-6)


@check("optimizer", refusable="raises")
def optimizer_scaler(case: Case) -> None:
    """Under GradScaler it gives what it gives without, and an Inf step leaves no trace."""
    model = user_model(case)
    optimizer = case.build(list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(case_loss(case, model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, value in values(trained(case, range(3))[0]).items():
        expect_close(values(model)[name], value, f"GradScaler changes {name}", rtol=1e-5, atol=1e-6)
    before = values(model)
    optimizer.zero_grad()
    scaler.scale(case_loss(case, model, 3)).backward()
    next(p.grad for p in model.parameters() if p.grad is not None).fill_(float("inf"))
    scaler.step(optimizer)
    expect_same(values(model), before, "A step with Inf moved parameters")


@check("optimizer", refusable="raises")
def optimizer_compiles(case: Case) -> None:
    """``torch.compile`` of the step gives what eager mode gives."""
    model = user_model(case)
    optimizer = case.build(list(model.parameters()))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own deprecations
        step = torch.compile(optimizer.step, backend="eager")
        for seed in range(2):
            optimizer.zero_grad()
            case_loss(case, model, seed).backward()
            step()
    torch._dynamo.reset()
    for name, value in values(trained(case, range(2))[0]).items():
        expect_close(values(model)[name], value, f"The compiled step changes {name}", rtol=1e-5, atol=1e-6)


@check("optimizer", refusable="declared")
def optimizer_no_growth(case: Case) -> None:
    """100 steps leave no tensor per step alive."""
    model, optimizer = trained(case, range(10))
    left = tensors_left_by(lambda: train(case, model, optimizer, range(100)))
    if left > 60:
        raise BrokenContract(f"100 steps leave {left} tensors alive.", fix="Keep no list of tensors.")


@check("optimizer", refusable="no")
def optimizer_ranks(case: Case) -> None:
    """Two replicas with equal gradients stay bitwise equal whatever their global generators hold."""
    found: list[Any] = []
    for rank in range(2):
        model = user_model(case)
        optimizer = case.build(list(model.parameters()))
        for step in range(3):
            torch.manual_seed(100 * rank + step)
            train(case, model, optimizer, [step])
        found.append(values(model))
    expect_same(found[0], found[1], "Replicas drift apart", fix="Draw from streams keyed by seed and step.")
