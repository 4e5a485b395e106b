"""SAM-GS on a [tasks, 1e6] Jacobian against TorchJD's PCGrad, in both branches."""

from __future__ import annotations

import torch
from benchmarks.harness import Row, ratio
from torchjd.aggregation import PCGrad

from pullback.methods.sam_gs import SAMGS

ENTRIES = 1_000_000
TASKS = (2, 4, 8)


def jacobian(tasks: int) -> torch.Tensor:
    """Gradients of equal size and random direction, in float32."""
    return torch.randn(tasks, ENTRIES, generator=torch.Generator().manual_seed(tasks))


def row(tasks: int, branch: str, gamma: float) -> Row:
    """One ratio: SAM-GS, held in one of its branches, over PCGrad on the same matrix."""
    matrix, peer = jacobian(tasks), PCGrad()
    aggregator = SAMGS(gamma=gamma)
    taken = ratio(lambda: aggregator(matrix), lambda: peer(matrix), repeats=25)
    return Row(f"SAMGS, {tasks} tasks of 1e6 entries, {branch}", "torchjd PCGrad", taken, 1.0)


def ratios() -> list[Row]:
    """Both branches for every number of tasks."""
    return [
        row(tasks, branch, gamma)
        for tasks in TASKS
        for branch, gamma in (("momentum", 0.0), ("equalise", 2.0))
    ]
