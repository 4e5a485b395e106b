"""Exact gradient of a cost of stationary states: implicit differentiation, per example and by autograd alone.

States s are stationary points of an energy E(s, theta), one for each example of a batch, and J is the batch mean of
a cost C(s, theta). With H = d2E/ds2 the implicit function theorem gives dJ/dtheta = mean of dC/dtheta - (H^-1 dC/ds)^T
d2E/(ds dtheta). Units at a bound do not move, and are left out of H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.core.checks import integer, positive

SWEEPS = 4
"""Conjugate-gradient steps of a large problem are at most this many times its number of unknowns."""


@dataclass(frozen=True)
class ImplicitGradient:
    """The exact gradient and how it was found.

    Args:
        grads: dJ/dtheta in the order of the parameters; None for one on which nothing depends.
        adjoint: H^-1 dC/ds by state, each [batch, ...]; 0 where a unit is at a bound.
        residual: largest ``|dE/ds|`` over the units that are free to move.
    """

    grads: list[Tensor | None]
    adjoint: list[Tensor]
    residual: float


@torch.enable_grad()
def implicit_gradient(
    energy: Callable[[list[Tensor]], Tensor],
    cost: Callable[[list[Tensor]], Tensor],
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    free: Sequence[Tensor] | None = None,
    tolerance: float = 1e-6,
    dense_units: int = 1024,
) -> ImplicitGradient:
    """Differentiate the mean cost of stationary states by parameters.

    Args:
        energy: ``energy(states) -> [batch]``, twice differentiable, examples independent of each other.
        cost: ``cost(states) -> [batch]``.
        states: stationary states, each [batch, ...]; float64 is advised.
        parameters: tensors that require gradients and on which energy or cost depend.
        free: for each state a boolean tensor, False where a unit sits at a bound and does not move; default: all free.
        tolerance: largest ``|dE/ds|`` of a free unit that still counts as stationary.
        dense_units: up to so many units of one example H is written out and solved, beyond that by conjugate gradients
            (H must then be positive definite, as it is at a strict minimum).

    Returns:
        The gradient, the adjoint state and the residual.

    Raises:
        ValueError: if the states are not stationary, or H is singular or, where that is needed, not positive definite.
    """
    bound = positive("tolerance", tolerance)
    held = [each.detach().requires_grad_() for each in states]
    mask = _rows([torch.ones_like(s, dtype=torch.bool) for s in held] if free is None else free).bool()
    first = torch.autograd.grad(energy(held).sum(), held, create_graph=True, materialize_grads=True)
    slope = _rows(first)
    residual = float((slope.detach().abs() * mask).max()) if slope.numel() else 0.0
    if not residual <= bound:
        raise ValueError(
            f"states must be stationary: |dE/ds| must be <= {bound:g}, got {residual:.3g}. Relax for more steps, in "
            "float64, or raise tolerance."
        )
    value = cost(held)
    pull = _rows(torch.autograd.grad(value.sum(), held, retain_graph=True, materialize_grads=True))

    def product(vector: Tensor) -> Tensor:
        if not any(each.requires_grad for each in first):
            return torch.zeros_like(vector)
        parts = _parts(vector, held)
        pairs = [(g, v) for g, v in zip(first, parts, strict=True) if g.requires_grad]
        found = torch.autograd.grad(
            [g for g, _ in pairs], held, [v for _, v in pairs], retain_graph=True, materialize_grads=True
        )
        return _rows(found)

    wanted = pull.detach() * mask
    small = slope.shape[1] <= integer("dense_units", dense_units, minimum=0)
    solution = (_dense if small else _conjugate)(product, mask, wanted)
    inner = sum((g * v).sum() for g, v in zip(first, _parts(solution, held), strict=True))
    total = (value.sum() - inner) / len(slope)
    grads: list[Tensor | None] = [None] * len(parameters)
    if total.requires_grad:
        grads = list(torch.autograd.grad(total, list(parameters), allow_unused=True))
    return ImplicitGradient(grads, _parts(solution, held), residual)


def _rows(states: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten(1) for each in states], dim=1)


def _parts(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = rows.split([each[0].numel() for each in like], dim=1)
    return [piece.reshape(each.shape) for piece, each in zip(pieces, like, strict=True)]


def _dense(product: Callable[[Tensor], Tensor], mask: Tensor, wanted: Tensor) -> Tensor:
    """Columns of H by products with unit vectors, all examples at once; units at a bound get identity rows."""
    columns = []
    for unit in range(wanted.shape[1]):
        basis = torch.zeros_like(wanted)
        basis[:, unit] = 1.0
        columns.append(product(basis * mask).detach() * mask + basis * ~mask)
    solution, info = torch.linalg.solve_ex(torch.stack(columns, dim=-1), wanted)
    if bool((info != 0).any()) or not bool(solution.isfinite().all()):
        raise ValueError(
            f"energy must have a regular Hessian at the states, got a singular one in {int((info != 0).sum())} of "
            f"{len(info)} examples. The states lie on a fold or a flat line: move the parameters a little."
        )
    return solution


def _conjugate(product: Callable[[Tensor], Tensor], mask: Tensor, wanted: Tensor) -> Tensor:
    """Conjugate gradients for all examples at once."""
    x, r = torch.zeros_like(wanted), wanted.clone()
    p, rr = r.clone(), wanted.square().sum(1)
    goal = rr * torch.finfo(wanted.dtype).eps ** 1.5
    for _ in range(SWEEPS * wanted.shape[1]):
        active = rr > goal
        if not bool(active.any()):
            return x
        hp = product(p).detach() * mask
        curvature = (p * hp).sum(1)
        if bool((curvature[active] <= 0).any()):
            raise ValueError(
                f"energy must be strictly convex at the states for conjugate gradients, got curvature "
                f"{float(curvature[active].min()):.3g}. Raise dense_units above {wanted.shape[1]}."
            )
        alpha = torch.where(active, rr / curvature, 0.0)[:, None]
        x, r = x + alpha * p, r - alpha * hp
        new = r.square().sum(1)
        p = r + torch.where(active, new / rr, 0.0)[:, None] * p
        rr = torch.where(active, new, rr)
    raise ValueError(
        f"energy must be well conditioned for conjugate gradients, got none in {SWEEPS * wanted.shape[1]} steps. "
        f"Raise dense_units above {wanted.shape[1]}."
    )
