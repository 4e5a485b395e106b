"""How far the parallel form of a stack is from the sequential one: sizes, gaps and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pullback.core import checks
from pullback.core.streams import generator
from pullback.methods.shallow.stack import Mode, ResidualStack

SCALES = (1.0, 0.5, 0.25)
"""Factors on all branches between which the slopes are fitted."""


@dataclass(frozen=True)
class TruncationReport:
    """What the expansion of a stack leaves out, on one batch.

    Args:
        blocks: number of blocks N.
        parameters: trainable parameters of the stack.
        eps: ||s F_k(z_(k-1))|| / ||z_(k-1)|| of every block in the sequential form, mean over the batch. The argument
            behind the parallel form needs all of these to be small.
        gaps: ||y_seq - y_K|| / ||y_seq - x|| for order K = 1 (and 2).
        path_share: ||y_1 - x|| / ||y_seq - x||, the part of the first-order terms.
        slopes: exponent with which ||y_seq - y_K|| falls when all branches shrink: K + 1 where the branches are small
            and smooth; NaN where there is no error.
        cosines: per block, cosine between its gradients in the two forms; NaN for a block without gradient.
        gradient_norms: per block, its gradient's norm in the sequential and in the parallel form (order 1).
        determination: Q = samples * outputs / parameters, or None where these were not given.
    """

    blocks: int
    parameters: int
    eps: tuple[float, ...]
    gaps: tuple[float, ...]
    path_share: float
    slopes: tuple[float, ...]
    cosines: tuple[float, ...]
    gradient_norms: dict[Mode, tuple[float, ...]]
    determination: float | None


def determination_ratio(samples: int, outputs: int, parameters: int | nn.Module) -> float:
    """Q = K M / P: constraints that the training set poses over free parameters; below 1 the network can fit noise.

    Args:
        samples: training examples K.
        outputs: outputs M of the network for each.
        parameters: trainable parameters P, or the whole network.

    Raises:
        TypeError: if a number is no integer.
        ValueError: if a number is below 1.
    """
    if isinstance(parameters, nn.Module):
        parameters = _count(parameters)
    k, m = checks.integer("samples", samples, minimum=1), checks.integer("outputs", outputs, minimum=1)
    return k * m / checks.integer("parameters", parameters, minimum=1)


def truncation_report(
    stack: ResidualStack,
    x: Tensor,
    *,
    max_order: int = 2,
    loss: Callable[[Tensor], Tensor] | None = None,
    samples: int | None = None,
    outputs: int | None = None,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = torch.float64,
    seed: int = 0,
) -> TruncationReport:
    """Measure what the parallel form of ``stack`` leaves out on the batch ``x``.

    It works on a copy in evaluation mode, so that dropout draws nothing, running statistics rest and the stack is left
    as it is.

    Args:
        stack: in any form; its settings do not matter but for ``branch_scale``.
        x: what reaches the stack, [batch, ...].
        max_order: 1 leaves the second order out.
        loss: scalar function of the stack's output for the gradients; None: its product with one fixed Gaussian tensor.
        samples: training examples, for the determination ratio.
        outputs: outputs of the network for each example, for the same.
        model: the whole network whose parameters count for it; None: the stack.
        dtype: of the copy; small differences want float64. None keeps the stack's.
        seed: of the Gaussian tensor.

    Raises:
        TypeError: if ``stack`` is none, or ``x`` no floating tensor.
        ValueError: if ``x`` has no batch axis, or an argument is out of range.
    """
    checks.instance(
        "stack", stack, ResidualStack, fix="Build one with ResidualStack(blocks) or shallow_(model, ...)."
    )
    checks.floating("x", x)
    if x.dim() < 2 or not len(x):
        raise ValueError(
            f"x must be a batch of at least one example, got shape {tuple(x.shape)}. Add a first axis."
        )
    orders = range(1, checks.choice("max_order", max_order, (1, 2)) + 1)
    q = None
    if samples is not None or outputs is not None:
        q = determination_ratio(samples or 0, outputs or 0, stack if model is None else model)
    twin, x = copy.deepcopy(stack).eval(), x.detach()
    if dtype is not None:
        twin, x = twin.to(dtype), x.to(dtype)
    errors = {factor: _errors(twin, x, orders, factor * twin.scale) for factor in SCALES}
    y = twin.form(x, "sequential", 1, twin.scale).detach()
    first = twin.form(x, "parallel", 1, twin.scale).detach()
    moved = float((y - x).norm())
    grads = {mode: _gradients(twin, x, mode, loss, seed) for mode in ("sequential", "parallel")}
    return TruncationReport(
        blocks=len(stack.blocks),
        parameters=_count(stack),
        eps=_eps(twin, x),
        gaps=tuple(_ratio(error, moved) for error in errors[1.0]),
        path_share=_ratio(float((first - x).norm()), moved),
        slopes=tuple(_slope([errors[factor][k - 1] for factor in SCALES]) for k in orders),
        cosines=tuple(map(_cosine, grads["sequential"], grads["parallel"])),
        gradient_norms={mode: tuple(float(g.norm()) for g in rows) for mode, rows in grads.items()},  # ty: ignore
        determination=q,
    )


# --- parts -----------------------------------------------------------------------------------------------------


def mean_ratio(part: Tensor, whole: Tensor) -> float:
    """Mean over the batch of ||part|| / ||whole||, in float64."""
    parts, wholes = (each.double().flatten(1).norm(dim=1) for each in (part, whole))
    return float(torch.where(parts == 0, 0.0, parts / wholes).mean())


def relative(part: Tensor, whole: Tensor) -> float:
    """||part|| / ||whole|| over the whole batch, in float64; 0 where the part is."""
    return _ratio(float(part.double().norm()), float(whole.double().norm()))


def _ratio(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole else math.inf


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def _eps(stack: ResidualStack, x: Tensor) -> tuple[float, ...]:
    found = []
    for branch in stack.branches():
        step = branch(x) * stack.scale
        found.append(mean_ratio(step, x))
        x = x + step
    return tuple(found)


@torch.no_grad()
def _errors(stack: ResidualStack, x: Tensor, orders: Sequence[int], scale: float) -> list[float]:
    """||y_seq - y_K|| for each order K, at one scale of the branches."""
    y = stack.form(x, "sequential", 1, scale)
    return [float((y - stack.form(x, "parallel", order, scale)).norm()) for order in orders]


def _slope(errors: Sequence[float]) -> float:
    """Least-squares slope of log error against log scale; NaN without errors."""
    if min(errors) <= 0 or not all(map(math.isfinite, errors)):
        return math.nan
    steps, logs = [math.log(each) for each in SCALES], [math.log(each) for each in errors]
    centre, middle = sum(steps) / len(steps), sum(logs) / len(logs)
    top = sum((a - centre) * (b - middle) for a, b in zip(steps, logs, strict=True))
    return top / sum((a - centre) ** 2 for a in steps)


@torch.enable_grad()
def _gradients(
    stack: ResidualStack, x: Tensor, mode: Mode, loss: Callable[[Tensor], Tensor] | None, seed: int
) -> list[Tensor]:
    """One flat gradient for each block, of zero length where it has no trainable parameter."""
    y = stack.form(x, mode, 1, stack.scale)
    if loss is None:
        noise = torch.randn(y.shape, generator=generator("shallow", seed), dtype=torch.float64)
        value = (y * noise.to(y)).sum()
    else:
        value = loss(y)
    rows = [[p for p in block.parameters() if p.requires_grad] for block in stack.blocks]
    flat = [p for row in rows for p in row]
    if not flat:
        return [x.new_zeros(0) for _ in rows]
    grads = iter(torch.autograd.grad(value, flat, allow_unused=True))
    found = [[(p, next(grads)) for p in row] for row in rows]
    return [
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in row])
        if row
        else x.new_zeros(0)
        for row in found
    ]


def _cosine(first: Tensor, second: Tensor) -> float:
    size = float(first.norm()) * float(second.norm())
    return float(first @ second) / size if size else math.nan
