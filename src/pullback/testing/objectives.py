"""Checks of objectives: a scalar, its reductions, weight zero."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built
from pullback.testing.tools import cast, differentiable, draw, expect_close, expect_same, leaves


@check("objective", refusable="no")
def scalar(case: Case) -> None:
    """The loss is one real number, a 0-dim tensor that carries a gradient."""
    out = built(case)(*leaves(draw(case)))
    if not isinstance(out, Tensor) or out.dim() != 0:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise BrokenContract(f"forward returned {shape} instead of a 0-dim tensor.")
    if not out.requires_grad:
        raise BrokenContract("The loss carries no gradient.", fix="Do not detach it or turn it into a float.")


@check("objective", refusable="declared")
def reductions(case: Case) -> None:
    """``reduction="mean"`` and ``"sum"`` are the mean and sum of ``"none"``."""
    component = built(case)
    if not isinstance(getattr(component, "reduction", None), str):
        raise NotApplicable("no attribute reduction")
    found = {}
    for reduction in ("none", "mean", "sum"):
        component = built(case)
        component.reduction = reduction
        found[reduction] = component(*draw(case))
    for reduction, wanted in (("mean", found["none"].mean()), ("sum", found["none"].sum())):
        expect_close(
            found[reduction], wanted, f"reduction={reduction!r} is not that of 'none'", rtol=1e-9, atol=1e-12
        )


@check("objective", refusable="declared")
def neutral_objective(case: Case) -> None:
    """With weight zero the loss and its gradients are bitwise those of the baseline."""
    if case.neutral is None or case.baseline is None:
        raise NotApplicable("the case has no neutral setting with a baseline")
    inputs, plain = leaves(draw(case)), leaves(draw(case))
    got, wanted = cast(case.neutral(), torch.float64)(*inputs), case.baseline(*plain)
    expect_same(got.detach(), wanted.detach(), "Weight zero is not the baseline")
    expect_same(_grads(got, inputs), _grads(wanted, plain), "Weight zero gives other gradients")


def _grads(loss: Tensor, inputs: tuple[object, ...]) -> list[Tensor]:
    """Gradients for all inputs; none is a gradient of zeros."""
    points = differentiable(inputs)
    if not loss.requires_grad:
        return [torch.zeros_like(point) for point in points]
    grads = torch.autograd.grad(loss, points, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(points, grads, strict=True)]
