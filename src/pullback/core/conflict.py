"""The conflict monitor: do the gradients of several losses pull against each other, where, and who wins?"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from pullback.core.autograph import reaches
from pullback.core.checks import NON_FINITE_POLICIES, NonFinite, choice, integer, shown
from pullback.core.conflict_report import ALL, ConflictReport, ConflictSummary, admitted, summarise
from pullback.core.gram import gram, with_remainder
from pullback.core.grouping import Groups, grouped, without_wrappers
from pullback.core.kinds.probe import Probe
from pullback.core.parameters import ParameterSource, named_parameters
from pullback.core.state import StateError, check_state
from pullback.core.taskgrads import count_present, factors_in, ranks, scalar_loss, shares, task_gradients

FORMAT_VERSION = 1


@final
class ConflictMonitor(Probe):
    r"""Watch how the gradients of several losses agree, per group of layers, every few steps.

    Two ways to use it. Both leave parameters, ``.grad``, random states, modes and hooks alone and keep the graph
    usable; both do nothing but count on the steps in between:

    * ``monitor(losses)`` before ``total.backward()``: one extra backward pass per task on a measured step;
    * ``with monitor.around(losses, total): total.backward()``: one pass less, as the last task's gradient is what
      your own backward pass adds to the others'. With two tasks and ``every=20`` that is under 5 % of training.

    A pass goes back to the watched parameters only: watching the last shared block alone costs little.

    Args:
        params: the model, or named parameters (a filtered list, if you like). Tied parameters count once, frozen
            ones are left out while they are frozen. ``torch.compile`` and ``DistributedDataParallel`` wrappers are
            looked through.
        tasks: names of the losses, at least two.
        every: measure the first step and then every so many calls. Under gradient accumulation call it for one
            micro-batch per optimizer step.
        groups: by default one group per top-level module. Or a function from a parameter's name to the name of its
            group (``None`` leaves it out), or glob patterns by group:
            ``{"early": "stem.*", "late": ("b3.*", "b4.*")}``.
        history: how many measurements are kept, the newest ones.
        reduce: average the gradients over all ranks before they are compared (one all-reduce of all tasks' gradients
            per measurement; every rank then holds the same report). Without it every rank reports its own.
        nonfinite: what to do about NaN and Inf when measurements are *read* (`reports`, `summary`): ``"raise"``,
            ``"skip"`` (left out and counted) or ``"warn"`` (kept; NaN is no conflict). Measuring reads nothing.

    Attributes:
        step: how many calls there were so far.

    Raises:
        TypeError: if ``params`` hold no parameters, or ``tasks`` are no strings.
        ValueError: if there are fewer than two tasks, names repeat, a group is empty, or a number is out of range.

    Note:
        Backward hooks of your own run in the extra passes too, and activations with ``retain_grad()`` collect their
        gradient (PyTorch offers no pass without them). Sharded (``DTensor``) parameters and sparse gradients are
        refused. Memory: one gradient per task, for the time of the measurement.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        >>> monitor = ConflictMonitor(model, tasks=("a", "b"), every=20)
        >>> features = model["trunk"](torch.ones(2, 3))
        >>> losses = {task: model[task](features).square().mean() for task in ("a", "b")}
        >>> total = losses["a"] + losses["b"]
        >>> with monitor.around(losses, total):
        ...     total.backward()
        >>> monitor.last.cosine.shape  # groups trunk, a, b and (all); 2 tasks
        torch.Size([4, 2, 2])
    """

    def __init__(
        self,
        params: ParameterSource,
        tasks: Sequence[str],
        *,
        every: int = 20,
        groups: Groups = None,
        history: int = 1000,
        reduce: bool = False,
        nonfinite: NonFinite = "raise",
    ) -> None:
        self.tasks = _task_names(tasks)
        self.every = integer("every", every, minimum=1, fix="Use 1 to measure every step.")
        self.nonfinite = choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
        self.reduce = bool(reduce)
        self.step = 0
        rows = grouped(without_wrappers(named_parameters(params)), groups)
        _refuse_shards(rows)
        self._names = [name for name, _, _ in rows]
        self._params = [param for _, param, _ in rows]
        self._own_groups = tuple(dict.fromkeys(group for _, _, group in rows))
        self._group_of = [self._own_groups.index(group) for _, _, group in rows]
        self._reports: deque[ConflictReport] = deque(maxlen=integer("history", history, minimum=1))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups as in the reports: several groups are followed by ``"(all)"``."""
        return self._own_groups if len(self._own_groups) == 1 else (*self._own_groups, ALL)

    # --- measuring ------------------------------------------------------------------------------------------

    def __call__(self, losses: Mapping[str, Tensor], total: Tensor | None = None) -> ConflictReport:
        """Count one step, and measure it when it is due; call it before the backward pass.

        Args:
            losses: the scalar loss of every task, by name; their graph stays usable.
            total: the scalar that the losses are summed to; gives the gradients the weights they have in it. Without
                it every weight is 1. Terms of the total that are no task's are not seen.

        Returns:
            The report of this step, or the last one when this step is not due.

        Raises:
            TypeError: if ``losses`` is no mapping to floating tensors.
            ValueError: if names are missing or unknown, a loss is no scalar or has no graph, no watched parameter
                gets a gradient from two tasks, or a loss is no part of ``total``.
        """
        self._advance(self._measure(*self._checked(losses, total)) if self._due else None)
        return self._reports[-1]

    @contextmanager
    def around(self, losses: Mapping[str, Tensor], total: Tensor) -> Generator[None]:
        """Count one step, and measure it around the user's own backward pass when it is due.

        The last task's gradient is ``.grad`` less the gradients of the others: one backward pass per task but the last.
        It is exact up to the rounding of the backward pass, relative to the *total* (1e-7 in float32, about 0.4 % under
        bfloat16 autocast), as long as nothing on the way edits gradients non-linearly: a task with a smaller share of
        the total is reported as zero or, under autocast, as noise.

        Where that is impossible every task is measured as by calling the monitor: when ``.grad`` is not ``None`` before
        (accumulation, or ``zero_grad(set_to_none=False)``), under a process group with several ranks, with hooks on
        watched parameters, with parameters below float32, or when ``total`` has terms besides the losses that lead
        to watched parameters.

        Args:
            losses: the scalar loss of every task, by name.
            total: the scalar made of them, with any weights, whose backward pass runs inside the block; a factor on it
                (``scaler.scale(total).backward()``) is fine. Under float16 give the scaled total here, too.

        Yields:
            Nothing.

        Raises:
            TypeError: see `__call__`.
            ValueError: see `__call__`.
            RuntimeError: if the block ran no backward pass of ``total``, or several, or cleared its gradients.
        """
        if not self._due:
            yield
            self._advance(None)
            return
        checked, factors = self._checked(losses, total)
        if not self._can_spare(checked, total):
            report = self._measure(checked, factors)
            yield
            self._advance(report)
            return
        params, names, group_of = self._trainable()
        rows = task_gradients(checked[:-1], factors[:-1], params)
        used = [param for param, *column in zip(params, *rows, strict=True) if count_present(column)]
        if not (shares(rows) or reaches(checked[-1], used)):
            raise ValueError(self._unshared())
        arrived: list[Tensor] = []
        handle = total.register_hook(lambda gradient: arrived.append(gradient.detach()))
        try:
            yield
        finally:
            handle.remove()
        _check_block(len(arrived), rows, params, names)
        rows.append([param.grad for param in params])
        grams = gram(rows, params, group_of, len(self._own_groups), names=names)
        grams = with_remainder(grams, arrived[0], max((p.dtype for p in params), key=_rounding))
        self._advance(self._report(grams, factors, passes=len(rows) - 1))

    @property
    def _due(self) -> bool:
        return self.step % self.every == 0 or not self._reports

    def _advance(self, report: ConflictReport | None) -> None:
        if report is not None:
            self._reports.append(report)
        self.step += 1

    def _measure(self, losses: Sequence[Tensor], factors: Sequence[Tensor | None]) -> ConflictReport:
        """Compare the gradients of all tasks: one backward pass each."""
        params, names, group_of = self._trainable()
        rows = task_gradients(losses, factors, params)
        if not shares(rows):
            raise ValueError(self._unshared())
        grams = gram(rows, params, group_of, len(self._own_groups), names=names, average=self._averages)
        return self._report(grams, factors, passes=len(rows))

    def _report(self, grams: Tensor, factors: Sequence[Tensor | None], *, passes: int) -> ConflictReport:
        if len(self._own_groups) > 1:
            grams = torch.cat([grams, grams.sum(0, keepdim=True)])
        one = grams.new_ones(())
        weights = torch.stack([one if f is None else f.detach().to(one) for f in factors])
        if self._averages:
            torch.distributed.all_reduce(weights)
            weights /= torch.distributed.get_world_size()
        return ConflictReport(self.step, self.tasks, self.groups, grams, weights, passes)

    @property
    def _averages(self) -> bool:
        return self.reduce and ranks() > 1

    def _trainable(self) -> tuple[list[Tensor], list[str], list[int]]:
        """Parameters that want a gradient now, their names and groups."""
        rows = zip(self._params, self._names, self._group_of, strict=True)
        wanted = [row for row in rows if row[0].requires_grad]
        if not wanted:
            raise ValueError(
                f"params must hold a parameter that requires a gradient, got {len(self._params)} frozen ones. "
                "Unfreeze a shared layer, or do not call the monitor."
            )
        return [p for p, _, _ in wanted], [n for _, n, _ in wanted], [g for _, _, g in wanted]

    def _checked(
        self, losses: Mapping[str, Tensor], total: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The losses in the order of the tasks, and what a unit of the total is worth to each."""
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"losses must be a mapping from task to scalar tensor, got {shown(losses)}. "
                f"Name them: {{{', '.join(f'{task!r}: ...' for task in self.tasks)}}}."
            )
        missing, unknown = set(self.tasks) - set(losses), set(losses) - set(self.tasks)
        if missing or unknown:
            raise ValueError(
                f"losses must have the tasks {list(self.tasks)}, got missing {sorted(missing)} and unknown "
                f"{sorted(map(str, unknown))}. Use the names given to ConflictMonitor."
            )
        checked = [scalar_loss(f"losses[{task!r}]", losses[task]) for task in self.tasks]
        if total is None:
            return checked, [None] * len(checked)
        return checked, factors_in(checked, self.tasks, scalar_loss("total", total))

    def _can_spare(self, losses: Sequence[Tensor], total: Tensor) -> bool:
        """Whether the last task's gradient may be taken from the user's own backward pass."""
        params = self._trainable()[0]
        return (
            ranks() == 1
            and all(p.grad is None for p in params)
            and not any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in params)
            and all(torch.finfo(p.dtype).bits >= 32 for p in params)
            and not reaches(total, params, around=losses)
        )

    def _unshared(self) -> str:
        return (
            f"losses must share a watched parameter, got {list(self.tasks)} without one that gets a gradient from two "
            "of them. Watch the model that computes them; after copying or wrapping it make a new monitor."
        )

    # --- reading --------------------------------------------------------------------------------------------

    @property
    def last(self) -> ConflictReport | None:
        """The newest measurement as it is, or ``None`` before the first."""
        return self._reports[-1] if self._reports else None

    def reports(self) -> tuple[ConflictReport, ...]:
        """The measurements that are kept, oldest first (reads the device once).

        Raises:
            NonFiniteError: if one holds NaN or Inf and the policy is ``"raise"``.
        """
        return tuple(admitted(self._reports, self.nonfinite))

    def summary(self) -> ConflictSummary:
        """Conflict rate with count, cosine, norm ratio and wins per group and pair; ``print`` it as a table.

        Raises:
            NonFiniteError: if a measurement holds NaN or Inf and the policy is ``"raise"``.
        """
        kept = self.reports()
        return summarise(kept, skipped=len(self._reports) - len(kept))

    def __repr__(self) -> str:
        return (
            f"ConflictMonitor(tasks={self.tasks!r}, groups={shown(self.groups)}, every={self.every}, "
            f"step={self.step}, measurements={len(self._reports)})"
        )

    # --- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Versioned state: count, names and the measurements that are kept; no setting and no parameter."""
        size = (len(self.groups), len(self.tasks), len(self.tasks))
        kept = list(self._reports)

        def table(rows: list[Tensor], *shape: int) -> Tensor:
            return torch.stack(rows).cpu().double() if rows else torch.empty(0, *shape, dtype=torch.float64)

        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "tasks": list(self.tasks),
            "groups": list(self.groups),
            "steps": [report.step for report in kept],
            "passes": [report.passes for report in kept],
            "gram": table([report.gram for report in kept], *size),
            "weights": table([report.weights for report in kept], size[-1]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, or nothing of it when any part does not fit.

        Raises:
            StateError: if the version is newer, tasks or groups differ, or a key, type or shape does not fit.
        """
        reference = self.state_dict()
        steps = state.get("steps") if isinstance(state, Mapping) else None
        count = len(steps) if isinstance(steps, list) else 0
        reference |= {"steps": [0] * count, "passes": [0] * count}
        for key in ("gram", "weights"):
            reference[key] = torch.empty(count, *reference[key].shape[1:], dtype=torch.float64)
        check_state("ConflictMonitor", state, reference, version=FORMAT_VERSION)
        for key in ("tasks", "groups"):
            if state[key] != reference[key]:
                raise StateError(
                    f"ConflictMonitor.{key} must be {reference[key]}, got {state[key]}. Build it as when it was saved."
                )
        home = self._params[0].device
        dtype = torch.float32 if home.type == "mps" else torch.float64
        self.step = state["step"]
        self._reports.clear()
        rows = zip(state["steps"], state["passes"], state["gram"], state["weights"], strict=True)
        for step, passes, grams, weights in rows:
            tensors = (each.to(home, dtype, copy=True) for each in (grams, weights))
            self._reports.append(ConflictReport(step, self.tasks, self.groups, *tensors, passes))


# --- checks -------------------------------------------------------------------------------------------------


def _task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    if (
        isinstance(tasks, str)
        or not isinstance(tasks, Sequence)
        or not all(isinstance(t, str) for t in tasks)
    ):
        raise TypeError(
            f'tasks must be a sequence of names, got {shown(tasks)}. Pass ("depth", "seg"), for example.'
        )
    if len(set(tasks)) != len(tasks) or len(tasks) < 2:
        raise ValueError(
            f"tasks must be at least two different names, got {shown(tuple(tasks))}. "
            "With one loss there is nothing to compare."
        )
    return tuple(tasks)


def _refuse_shards(rows: Sequence[tuple[str, Tensor, str]]) -> None:
    for name, param, group in rows:
        if hasattr(param, "placements"):
            raise TypeError(
                f"params must hold plain tensors, got the sharded {name}. Leave it out by groups=..., "
                "or monitor a replica that is not sharded."
            )
        if group == ALL:
            raise ValueError(f"groups must not use the name {ALL!r}, got it for {name}. It joins all groups.")


def _check_block(
    passes: int, rows: Sequence[Sequence[Tensor | None]], params: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Refuse a block in which something else happened than one backward pass of the total."""
    if passes != 1:
        raise RuntimeError(
            f"monitor.around must hold one backward pass of total, got {passes}. "
            "Write: with monitor.around(losses, total): total.backward()"
        )
    for name, param, *column in zip(names, params, *rows, strict=True):
        if param.grad is None and count_present(column):
            raise RuntimeError(
                f"monitor.around must hold the backward pass alone, got no .grad of {name} after it. Move "
                "optimizer.step() and zero_grad() behind the block."
            )


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
