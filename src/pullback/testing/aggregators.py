"""Checks of aggregators: finite on nasty Jacobians, declared invariances, driven by TorchJD."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built, matrix
from pullback.testing.tools import SCALES, expect_close, expect_finite, perceptron, rng


def _zoo() -> Iterator[tuple[str, Tensor]]:
    """Jacobians that break aggregators: zero, repeated, opposite, low rank, badly scaled."""
    base = matrix()
    row = base[:1]
    yield "all zero", torch.zeros(3, 6, dtype=torch.float64)
    yield "one zero row", torch.cat([base[:2], torch.zeros(1, 6, dtype=torch.float64)])
    yield "zero columns", base * (torch.arange(6) % 2)
    yield "equal rows", row.repeat(3, 1)
    yield "opposite rows", torch.cat([row, -row])
    yield "rank one", torch.outer(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), row[0])
    yield "one parameter", base[:, :1]
    yield "more tasks than parameters", matrix(shape=(7, 2))
    yield "rows of sizes 1e-8, 1, 1e8", base * torch.tensor([[1e-8], [1.0], [1e8]], dtype=torch.float64)


@check("aggregator", refusable="no")
def torchjd_aggregator(case: Case) -> None:
    """It is a ``torchjd.aggregation.Aggregator``."""
    from torchjd.aggregation import Aggregator

    if not isinstance(built(case), Aggregator):
        raise BrokenContract("It does not derive from torchjd.aggregation.Aggregator.")


@check("aggregator")
def output_form(case: Case) -> None:
    """A Jacobian [tasks, parameters] gives a vector [parameters] of the same dtype."""
    for dtype in (torch.float64, torch.float32):
        out = built(case)(matrix(dtype=dtype))
        if tuple(out.shape) != (6,) or out.dtype != dtype:
            raise BrokenContract(f"[3, 6] in {dtype} gives {tuple(out.shape)} in {out.dtype}.")


@check("aggregator")
def nasty_matrices(case: Case) -> None:
    """Zero, repeated, opposite and low-rank rows give a finite direction."""
    for what, jacobian in _zoo():
        expect_finite(built(case)(jacobian), f"Jacobian with {what}: the direction")


@check("aggregator")
def matrix_scales(case: Case) -> None:
    """Jacobians times 0, 1e-30 ... 1e30 give a finite direction."""
    for scale in SCALES:
        expect_finite(built(case)(matrix() * scale), f"Jacobian times {scale:g}: the direction")


@check("aggregator")
def one_task(case: Case) -> None:
    """With one task the direction is that task's gradient."""
    row = matrix()[:1]
    expect_close(built(case)(row), row[0], "One task does not give its own gradient", rtol=1e-6, atol=1e-9)


@check("aggregator")
def task_order(case: Case) -> None:
    """The order of tasks does not matter."""
    _wants(case, "permutation")
    jacobian = matrix()
    expect_close(
        built(case)(jacobian[[2, 0, 1]]), built(case)(jacobian), "The order of tasks matters", rtol=1e-6, atol=1e-9
    )  # fmt: skip


@check("aggregator")
def scale_equivariance(case: Case) -> None:
    """A(cJ) = c A(J) for c > 0."""
    _wants(case, "scale")
    for scale in (1e-3, 7.0):
        expect_close(
            built(case)(matrix() * scale), scale * built(case)(matrix()), f"A(cJ) is not cA(J) for c = {scale}",
            rtol=1e-6, atol=1e-9,
        )  # fmt: skip


@check("aggregator")
def no_conflict(case: Case) -> None:
    """The direction has no negative product with any task's gradient."""
    _wants(case, "non_conflict")
    for seed in range(5):
        jacobian = matrix(seed)
        products = jacobian @ built(case)(jacobian)
        if float(products.min()) < -1e-6 * float(jacobian.abs().max()) ** 2:
            raise BrokenContract(f"A product with a task's gradient is {float(products.min()):.3g}.")


@check("aggregator")
def row_space(case: Case) -> None:
    """The direction is a combination of the tasks' gradients."""
    _wants(case, "row_space")
    jacobian = matrix()
    direction = built(case)(jacobian)
    inside = torch.linalg.pinv(jacobian) @ (jacobian @ direction)
    expect_close(direction, inside, "The direction leaves the span of the gradients", rtol=1e-6, atol=1e-9)


def _wants(case: Case, invariance: str) -> None:
    if invariance not in case.invariances:
        raise NotApplicable(f"the case does not declare {invariance!r}")


@check("aggregator", refusable="no")
def no_graph_out(case: Case) -> None:
    """The direction carries no autograd graph, even if the Jacobian does."""
    if built(case)(matrix().requires_grad_()).requires_grad:
        raise BrokenContract("The direction requires a gradient.", fix="Detach the Jacobian's Gramian.")


@check("aggregator", refusable="raises")
def driven_by_torchjd(case: Case) -> None:
    """``torchjd.autojac`` gives each parameter its part of the aggregated Jacobian."""
    from torchjd.autojac import backward, jac_to_grad

    model, twin = perceptron(), perceptron()
    inputs = torch.randn(5, 8, generator=rng(3), dtype=torch.float64)
    backward(list((model(inputs) ** 2).mean(0)), inputs=list(model.parameters()))
    jac_to_grad(model.parameters(), built(case))
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    rows = []
    for loss in (twin(inputs) ** 2).mean(0):
        grads = torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    wanted = built(case)(torch.stack(rows))
    expect_close(got, wanted, "torchjd.autojac gives other gradients", rtol=1e-6, atol=1e-9)


@check("aggregator", refusable="no")
def not_a_matrix(case: Case) -> None:
    """Anything but a matrix is refused by ValueError."""
    for wrong in (torch.ones(3), torch.ones(2, 3, 4)):
        try:
            built(case)(wrong)
        except ValueError:
            continue
        raise BrokenContract(f"A tensor with {wrong.dim()} axes was accepted.", fix="Raise ValueError.")


@check("aggregator", refusable="declared")
def nonfinite_matrix(case: Case) -> None:
    """NaN in the Jacobian raises ValueError or stays visible; it never turns into a finite direction."""
    jacobian = matrix()
    jacobian[1, 2] = float("nan")
    try:
        out = built(case)(jacobian)
    except ValueError:
        return
    if bool(out.isfinite().all()):
        raise BrokenContract("A Jacobian with NaN gives a finite direction.", fix="Raise NonFiniteError.")
