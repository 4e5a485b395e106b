"""SAM-GS on a [tasks, 1e6] Jacobian against TorchJD's PCGrad, in both branches, and against plain torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio
from torchjd.aggregation import PCGrad

from pullback.methods.sam_gs import SAMGS

ENTRIES = 1_000_000
BRANCHES = {"momentum": 0.0, "equalise": 2.0}
"""The threshold that holds SAM-GS in each branch."""

BOUNDED = 8
"""Tasks from which PCGrad is a bound. It reads the matrix twice; SAM-GS does so too, and moves a momentum of the same
size on. Where the Gram matrix is cheap (few tasks), that traffic alone is more than all of PCGrad."""


def jacobian(tasks: int) -> torch.Tensor:
    """Gradients of about equal size and random direction, in float32."""
    return torch.randn(tasks, ENTRIES, generator=torch.Generator().manual_seed(tasks))


def written_out(matrix: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The momentum branch as one would write it from the paper."""
    state = {"m": torch.zeros_like(matrix), "h": torch.zeros(()), "t": 0}
    first, second = torch.triu_indices(len(matrix), len(matrix), 1)

    def step() -> torch.Tensor:
        state["t"] += 1
        norms = matrix.norm(dim=1)
        pairs = 2 * norms[first] * norms[second] / (norms[first] ** 2 + norms[second] ** 2)
        state["m"] = 0.9 * state["m"] + 0.1 * matrix
        state["h"] = 0.99 * state["h"] + 0.01 * (1 - pairs.mean()) ** 2 + 1e-8
        size = (state["m"] / (1 - 0.9 ** state["t"])).abs()
        root = torch.sqrt(state["h"] / (1 - 0.99 ** state["t"]))
        out = len(matrix) * (matrix * size / root).sum(0)
        return out * (1 / (out.norm() + 1e-6)).clamp(max=1)

    return step


def row(tasks: int, branch: str) -> Row:
    """SAM-GS, held in one of its branches, over PCGrad on the same matrix."""
    matrix, peer = jacobian(tasks), PCGrad()
    aggregator = SAMGS(gamma=BRANCHES[branch])
    taken = ratio(lambda: aggregator(matrix), lambda: peer(matrix), repeats=25)
    bound = 1.0 if tasks >= BOUNDED else None
    return Row(f"SAMGS, {tasks} tasks of 1e6 entries, {branch}", "torchjd PCGrad", taken, bound)


def ratios() -> list[Row]:
    """Both branches for every number of tasks, and the same arithmetic written out."""
    rows = [row(tasks, branch) for tasks in (2, 4, 8) for branch in BRANCHES]
    for tasks in (2, 8):
        matrix, aggregator = jacobian(tasks), SAMGS(gamma=0.0)
        taken = ratio(lambda a=aggregator, m=matrix: a(m), written_out(matrix), repeats=15)
        rows.append(Row(f"SAMGS, {tasks} tasks, momentum", "the same in plain torch", taken, 1.0))
    return rows
