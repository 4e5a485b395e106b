"""Checks of signals: the forward pass is the documented one, the backward pass the declared one."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.testing.case import Case
from pullback.testing.check import NotApplicable, check
from pullback.testing.exercise import built
from pullback.testing.tools import (
    SCALES,
    cast,
    differentiable,
    draw,
    expect_close,
    expect_finite,
    expect_same,
    leaves,
    rng,
)


def _cotangent(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=rng(31), dtype=torch.float64).to(out.dtype)


@check("signal", refusable="no")
def forward_values(case: Case) -> None:
    """The forward values are bitwise the declared ones (by default the first input's)."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = draw(case, dtype)
        wanted = inputs[0] if case.forward is None else case.forward(*inputs)
        expect_same(built(case).to(dtype)(*inputs).detach(), wanted, f"Forward values differ in {dtype}")


@check("signal", refusable="no")
def declared_backward(case: Case) -> None:
    """The gradient of every input is the declared one (float64)."""
    if case.backward is None:
        raise NotApplicable("the case declares no backward(grad, *inputs)")
    inputs = leaves(draw(case))
    out = built(case)(*inputs)
    cotangent = _cotangent(out)
    wanted = case.backward(cotangent, *inputs)
    got = torch.autograd.grad(out, differentiable(inputs), cotangent, allow_unused=True)
    for position, (one, other) in enumerate(zip(got, wanted, strict=True)):
        expected = torch.zeros_like(differentiable(inputs)[position]) if other is None else other
        found = torch.zeros_like(expected) if one is None else one
        expect_close(
            found,
            expected,
            f"The gradient of input {position} is not the declared one",
            rtol=1e-9,
            atol=1e-12,
        )


@check("signal", refusable="raises")
def double_backward(case: Case) -> None:
    """The declared backward can be differentiated again (needed by ``create_graph=True``)."""
    if case.backward is None:
        raise NotApplicable("the case declares no backward(grad, *inputs)")
    inputs = leaves(draw(case))
    out = built(case)(*inputs)
    cotangent = _cotangent(out).requires_grad_()
    wanted = [g for g in case.backward(cotangent, *inputs) if g is not None and g.requires_grad]
    got = torch.autograd.grad(out, differentiable(inputs), cotangent, create_graph=True, allow_unused=True)
    firsts = [g for g in got if g is not None and g.requires_grad]
    if not wanted:
        raise NotApplicable("the declared gradient depends on nothing")
    second = _second(firsts, cotangent)
    expect_close(second, _second(wanted, cotangent), "The second derivative is wrong", rtol=1e-9, atol=1e-12)


def _second(grads: list[Tensor], cotangent: Tensor) -> Tensor:
    if not grads:
        return torch.zeros_like(cotangent)
    cotangent.grad = None
    torch.autograd.backward(torch.stack([(g * g).sum() for g in grads]).sum(), retain_graph=True)
    found, cotangent.grad = cotangent.grad, None
    return torch.zeros_like(cotangent) if found is None else found


@check("signal", refusable="declared")
def neutral_signal(case: Case) -> None:
    """With the neutral setting values and gradients are bitwise those of the plain forward."""
    if case.neutral is None:
        raise NotApplicable("the case has no neutral setting")
    for dtype in (torch.float64, torch.float32):
        inputs, plain = leaves(draw(case, dtype)), leaves(draw(case, dtype))
        out = cast(case.neutral(), dtype)(*inputs)
        wanted = plain[0].clone() if case.forward is None else case.forward(*plain)
        expect_same(out.detach(), wanted.detach(), f"The neutral setting changes values in {dtype}")
        cotangent = _cotangent(out)
        got = torch.autograd.grad(out, differentiable(inputs), cotangent, allow_unused=True)
        expected = torch.autograd.grad(wanted, differentiable(plain), cotangent, allow_unused=True)
        expect_same(list(got), list(expected), f"The neutral setting changes gradients in {dtype}")


@check("signal")
def gradient_scales(case: Case) -> None:
    """Incoming gradients times 0, 1e-30 ... 1e30 come out finite, and zero stays a zero tensor."""
    for scale in SCALES:
        inputs = leaves(draw(case))
        out = built(case)(*inputs)
        grads = torch.autograd.grad(
            out, differentiable(inputs)[:1], _cotangent(out) * scale, allow_unused=True
        )
        if scale == 0.0 and grads[0] is None:
            raise NotApplicable("the first input gets no gradient")
        expect_finite(list(grads), f"Incoming gradient times {scale:g}: the gradient")
