"""Checks of transforms with closures and GradScaler, unfused and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, check
from pullback.testing.exercise import case_loss
from pullback.testing.tools import clone, expect_same
from pullback.testing.transforms import OPTIMIZERS, Loop


@check("transform", refusable="raises")
def closures(case: Case) -> None:
    """``optimizer.step(closure)`` gives what an ordinary step gives."""
    for name, make in OPTIMIZERS.items():
        loop = Loop(case, make)
        for step in range(4):

            def closure(loop: Loop = loop, step: int = step) -> Any:
                loop.optimizer.zero_grad()
                loss = case_loss(case, loop.model, step)
                loss.backward()
                return loss

            if loop.optimizer.step(closure) is None:
                raise BrokenContract(f"{name}.step(closure) no longer returns the loss.")
        wanted = Loop(case, make).train(range(4)).values()
        expect_same(loop.values(), wanted, f"{name} with a closure differs from ordinary steps")


def _fused(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True)  # unlike Adam it feels a wrong scale


def _scaled(case: Case, make: Callable[[Any], torch.optim.Optimizer], *, unscale: bool) -> Loop:
    """Four steps under a GradScaler whose scale is a power of two, so that unscaling is exact."""
    loop = Loop(case, make)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        loop.optimizer.zero_grad()
        scaler.scale(case_loss(case, loop.model, step)).backward()
        if unscale:
            scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
        scaler.update()
    return loop


@check("transform")
def scaler_unfused(case: Case) -> None:
    """Under GradScaler an unfused optimizer gives what it gives without."""
    wanted = Loop(case, OPTIMIZERS["SGD"]).train(range(4)).values()
    for unscale in (False, True):
        got = _scaled(case, OPTIMIZERS["SGD"], unscale=unscale).values()
        expect_same(got, wanted, f"GradScaler (unscale_ called: {unscale}) changes the result")


@check("transform", refusable="raises")
def scaler_fused(case: Case) -> None:
    """Under GradScaler a fused optimizer, which gets scaled gradients, gives what it gives without."""
    wanted = Loop(case, _fused).train(range(4)).values()
    for unscale in (True, False):
        got = _scaled(case, _fused, unscale=unscale).values()
        for name, value in got.items():
            if not torch.allclose(value, wanted[name], rtol=1e-5, atol=1e-6):
                raise BrokenContract(
                    f"GradScaler with fused=True (unscale_ called: {unscale}) changes {name}.",
                    fix="Edit batch.grads in pre_step_, where they are unscaled.",
                )


@check("transform")
def scaler_overflow(case: Case) -> None:
    """A step that GradScaler leaves out because of Inf advances nothing, unfused or fused."""
    for name, make in (("unfused", OPTIMIZERS["SGD"]), ("fused", _fused)):
        loop = Loop(case, make).train(range(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before, state = loop.values(), clone(loop.component.state_dict())
        loop.optimizer.zero_grad()
        scaler.scale(case_loss(case, loop.model, 2)).backward()
        next(p.grad for p in loop.model.parameters() if p.grad is not None).fill_(float("inf"))
        scaler.step(loop.optimizer)
        scaler.update()
        expect_same(loop.values(), before, f"A step left out by GradScaler ({name}) moved parameters")
        expect_same(
            loop.component.state_dict(), state, f"A step left out by GradScaler ({name}) advanced the state"
        )
