"""What a conflict monitor found: one measurement, and the table over many of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from pullback.core.checks import NonFinite, NonFiniteError

ALL = "(all)"
"""Name of the group that joins all groups."""


@dataclass(frozen=True, eq=False)
class ConflictReport:
    """One measurement of the gradients of several tasks; tensors stay on the device until they are read.

    Every number is of the gradients as they enter the sum: of ``weight * loss``. A cosine or ratio with a zero
    gradient (or a task without gradient in the group) is NaN and no conflict.

    Attributes:
        step: number of the monitored step, from 0.
        tasks: names of the tasks.
        groups: names of the groups of parameters; with several groups the last one, ``"(all)"``, joins them.
        gram: inner products ``[groups, tasks, tasks]`` of the weighted gradients.
        weights: factors ``[tasks]`` of the losses in the total; ones where no total was given.
        passes: extra backward passes that the measurement took.
    """

    step: int
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    gram: Tensor
    weights: Tensor
    passes: int

    @property
    def norms(self) -> Tensor:
        """Euclidean norms ``[groups, tasks]`` of the weighted gradients."""
        return _norms(self.gram)

    @property
    def cosine(self) -> Tensor:
        """Cosines ``[groups, tasks, tasks]`` in [-1, 1]; NaN where a gradient is zero."""
        return _cosine(self.gram)

    @property
    def norm_ratio(self) -> Tensor:
        """``[groups, tasks, tasks]``: norm of the row's task over that of the column's; NaN where one is zero."""
        return _norm_ratio(self.gram)

    @property
    def share(self) -> Tensor:
        """Shares ``[groups, tasks]`` of the summed update ``u``: ``<g_i, u> / <u, u>``, with sum 1.

        A negative share means that the update moves against this task. NaN where ``u`` is zero.
        """
        return _share(self.gram)

    @property
    def finite(self) -> bool:
        """Whether no gradient held NaN or Inf (reads the device)."""
        return bool(self.gram.isfinite().all())

    def winner(self, group: str = ALL) -> str | None:
        """The task with the largest projection on the summed update in ``group`` (reads the device).

        Args:
            group: name of a group; the default joins all, and is the only one where there is no other.

        Returns:
            Its name, or ``None`` when the update is zero or not finite.

        Raises:
            ValueError: if there is no such group.
        """
        share = self.share[self._index(group)].tolist()
        if any(map(math.isnan, share)):
            return None
        return self.tasks[share.index(max(share))]

    def _index(self, group: str) -> int:
        if group == ALL:
            return len(self.groups) - 1
        if group not in self.groups:
            raise ValueError(f"group must be one of {', '.join(self.groups)}, got {group!r}.")
        return self.groups.index(group)

    def __str__(self) -> str:
        return str(summarise([self]))


# --- quantities of Gram matrices [..., tasks, tasks] ---------------------------------------------------------


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sqrt()


def _cosine(gram: Tensor) -> Tensor:
    norms = _norms(gram)
    scale = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return (gram / scale).clamp(-1.0, 1.0)  # 0 / 0 is NaN, and clamp keeps it


def _norm_ratio(gram: Tensor) -> Tensor:
    norms = _norms(gram)
    row, column = norms.unsqueeze(-1), norms.unsqueeze(-2)
    return torch.where((row > 0) & (column > 0), row / column, math.nan)


def _share(gram: Tensor) -> Tensor:
    projections = gram.sum(-1)
    square = projections.sum(-1, keepdim=True)
    return torch.where(square > 0, projections / square, math.nan)


# --- many measurements --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairSummary:
    """Two tasks in one group over all measurements in which both had a gradient.

    Attributes:
        group: name of the group.
        tasks: names of the two tasks.
        measured: in how many measurements both gradients were non-zero and finite.
        conflicts: in how many of them the cosine was negative.
        cosine: mean cosine, NaN when ``measured`` is 0.
        lowest: smallest cosine.
        norm_ratio: median of the first task's norm over the second's.
        wins: how often the first, the second of them had the larger projection on the summed update.
    """

    group: str
    tasks: tuple[str, str]
    measured: int
    conflicts: int
    cosine: float
    lowest: float
    norm_ratio: float
    wins: tuple[int, int]

    @property
    def rate(self) -> float:
        """Share of measurements in conflict; NaN when there is none."""
        return self.conflicts / self.measured if self.measured else math.nan


@dataclass(frozen=True)
class ConflictSummary:
    """All pairs in all groups, over a number of measurements; ``print`` it as a table.

    Attributes:
        rows: one entry per group and pair of tasks.
        measurements: how many measurements it covers.
        skipped: how many were left out because of NaN or Inf.
        first_step: step of the first measurement, ``None`` when there is none.
        last_step: step of the last one.
    """

    rows: tuple[PairSummary, ...]
    measurements: int
    skipped: int
    first_step: int | None
    last_step: int | None

    def row(self, group: str, first: str, second: str) -> PairSummary:
        """The entry of a group and a pair, in the order in which the tasks were named.

        Raises:
            KeyError: if there is none.
        """
        for each in self.rows:
            if each.group == group and each.tasks == (first, second):
                return each
        raise KeyError(f"no row of group {group!r} and tasks {first!r}, {second!r}.")

    def __str__(self) -> str:
        lines = [_HEADER, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        span = "" if self.first_step is None else f", steps {self.first_step} to {self.last_step}"
        left_out = f", {self.skipped} skipped" if self.skipped else ""
        return "\n".join([*table, f"{self.measurements} measurements{span}{left_out}"])


_HEADER: tuple[str, ...] = ("group", "tasks", "conflicts", "cosine", "lowest", "norm ratio", "wins")


def _cells(row: PairSummary) -> tuple[str, ...]:
    pair = "/".join(row.tasks)
    if not row.measured:
        return row.group, pair, "0/0", "-", "-", "-", "-"
    return (
        row.group,
        pair,
        f"{row.conflicts}/{row.measured} ({100 * row.rate:.0f} %)",
        f"{row.cosine:+.2f}",
        f"{row.lowest:+.2f}",
        f"{row.norm_ratio:.3g}",
        f"{row.wins[0]}:{row.wins[1]}",
    )


def summarise(reports: Sequence[ConflictReport], *, skipped: int = 0) -> ConflictSummary:
    """Join measurements of the same tasks and groups into one table (reads the device once).

    Args:
        reports: measurements in the order of their steps.
        skipped: how many were left out before.

    Returns:
        The table; without measurements it has no rows.

    Raises:
        ValueError: if tasks or groups differ between the measurements.
    """
    if not reports:
        return ConflictSummary((), 0, skipped, None, None)
    tasks, groups = reports[0].tasks, reports[0].groups
    for report in reports:
        if (report.tasks, report.groups) != (tasks, groups):
            raise ValueError(
                f"reports must be of the same tasks and groups, got {report.tasks} in {report.groups} "
                f"after {tasks} in {groups}. Summarise them apart."
            )
    grams = torch.stack([report.gram for report in reports]).cpu().double()
    cosine, ratio, share = _cosine(grams), _norm_ratio(grams), _share(grams)
    rows = [
        _pair(groups[g], (tasks[a], tasks[b]), cosine[:, g, a, b], ratio[:, g, a, b], share[:, g, [a, b]])
        for g in range(len(groups))
        for a, b in combinations(range(len(tasks)), 2)
    ]
    return ConflictSummary(tuple(rows), len(reports), skipped, reports[0].step, reports[-1].step)


def admitted(reports: Sequence[ConflictReport], policy: NonFinite) -> list[ConflictReport]:
    """The measurements that count under ``policy`` (reads the device once).

    Raises:
        NonFiniteError: if one holds NaN or Inf and the policy is ``"raise"``; names step, group and task.
    """
    if not reports:
        return []
    sound = torch.stack([report.gram.isfinite().all() for report in reports]).tolist()
    if all(sound) or policy == "skip":
        return [report for report, good in zip(reports, sound, strict=True) if good]
    text = _describe(reports[sound.index(False)])
    if policy == "raise":
        raise NonFiniteError(f"{text} Look at its loss; nonfinite='skip' leaves such measurements out.")
    warnings.warn(f"{text} So do {sound.count(False) - 1} other measurements.", RuntimeWarning, stacklevel=3)
    return list(reports)


def _describe(report: ConflictReport) -> str:
    """Say where a measurement holds NaN or Inf: the first group and task."""
    group, task = (~report.gram.isfinite()).any(-1).nonzero()[0].tolist()
    bad = (~report.gram[group].diagonal().isfinite()).nonzero().flatten().tolist()
    name = report.tasks[bad[0] if bad else task]
    return (
        f"ConflictMonitor, step {report.step}: the gradient of task {name!r} in group "
        f"{report.groups[group]!r} holds NaN or Inf."
    )


def _pair(group: str, tasks: tuple[str, str], cosine: Tensor, ratio: Tensor, share: Tensor) -> PairSummary:
    """One entry out of the series ``[measurements]`` of a pair and its shares ``[measurements, 2]``."""
    sound = cosine.isfinite()
    cosine, ratio, share = cosine[sound], ratio[sound], share[sound]
    measured = len(cosine)
    return PairSummary(
        group,
        tasks,
        measured,
        int((cosine < 0).sum()),
        cosine.mean().item() if measured else math.nan,
        cosine.min().item() if measured else math.nan,
        ratio.quantile(0.5).item() if measured else math.nan,
        (int((share[:, 0] > share[:, 1]).sum()), int((share[:, 1] > share[:, 0]).sum())),
    )
