"""GCond whole: accumulate, resolve, smooth, write ``.grad`` (Limarenko et al. 2025, arXiv:2509.07252)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from pullback.core.checks import NonFinite, choice, instance, integer, shown
from pullback.core.finite import admit
from pullback.core.flat import Parameters
from pullback.core.span import inner_products, product
from pullback.core.state import StateError, check_state
from pullback.core.stepping import inside_line_search
from pullback.methods.gcond.buffers import MomentumWriter, TaskAccumulator
from pullback.methods.gcond.resolver import ArbiterMemory, Conflict, ConflictResolver, Resolution

_Batch = TypeVar("_Batch")


class RuleOptions(TypedDict, total=False):
    """Keywords that `GradientConductor` passes on to `ConflictResolver`."""

    thresholds: tuple[float, float, float]
    power: float
    max_iters: int | None
    smooth: bool
    arbiter_weights: tuple[float, float]
    stability_reference: Literal["raw", "resolved"]
    dominance_window: int
    ema_decay: float
    ema_bias_correction: bool
    norm_cap: float | None
    zero_tolerance: float


@dataclass(frozen=True)
class StepInfo:
    """What happened in one step: plain numbers on the host, free to log.

    Args:
        step: number of the step, from 0.
        skipped: whether it was left out because something was not finite; then all else is empty or NaN.
        min_cosine: least cosine of two tasks' gradients before anything was resolved (1 with one task).
        winner: the task that won the worst conflict; None without one.
        conflicts: the resolved pairs, one per round, worst first.
        norms: norm of every task's accumulated, weighted gradient.
        cosines: their cosines, in the order of ``norms``.
        stability: cosine of every gradient with its reference of the last step (0 at the first).
        weights: the direction is the sum of the accumulated, weighted gradients times these.
    """

    step: int
    skipped: bool
    min_cosine: float
    winner: str | None
    conflicts: tuple[Conflict, ...]
    norms: Mapping[str, float]
    cosines: tuple[tuple[float, ...], ...]
    stability: Mapping[str, float]
    weights: Mapping[str, float]

    @property
    def rounds(self) -> int:
        """How many pairs were resolved."""
        return len(self.conflicts)


class GradientConductor:
    """Accumulate the gradient of each task, resolve their conflicts, and write one smoothed ``.grad``.

    A step is ``accumulate`` micro-batches, then `step`, then the optimizer's own step. The parts are at hand as
    ``accumulator``, ``resolver`` and ``writer``, and are public classes to recombine. The model is never put into
    ``eval()``: what batch norm and dropout do in the blocks is the caller's decision.

    Args:
        params: a module (under DistributedDataParallel: the wrapped one), an optimizer, (name, tensor) pairs or
            tensors; frozen parameters are left out.
        tasks: names, or names with positive weights that multiply their losses.
        accumulate: micro-batches per step (K).
        mode: ``"stochastic"`` gives every task its own K / N of them, ``"sequential"`` gives every task all K.
        momentum: of the writer, in [0, 1); the optimizer's own first moment should then be 0.
        update: ``"gradient"`` or ``"lion_lars"``, see `MomentumWriter`; so are ``coefficient`` and ``trust_clip``.
        coefficient: factor of ``"lion_lars"``.
        trust_clip: largest ratio of norms in ``"lion_lars"``.
        nonfinite: on NaN or Inf in a task's gradient ``"raise"``, or ``"skip"`` the step: ``.grad`` becomes None, so
            that the optimizer does nothing, and no state changes.
        process_group: whose ranks average their accumulated gradients before the resolution, see `TaskAccumulator`.
        **rules: options of `ConflictResolver`.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if an option is out of its range, or K is no multiple of the number of tasks in stochastic mode.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> conductor = GradientConductor(model, tasks={"fit": 0.9, "size": 0.1}, accumulate=4)
        >>> optimizer = torch.optim.AdamW(model.parameters(), betas=(0.0, 0.95))
        >>> losses = {"fit": lambda y: (y - 1).square().mean(), "size": lambda y: y.abs().mean()}
        >>> for task, x in conductor.schedule(torch.randn(4, 8, 3)):
        ...     with conductor.accumulate(task):
        ...         losses[task](model(x)).backward()
        >>> info = conductor.step()
        >>> optimizer.step()
        >>> sorted(info.norms)
        ['fit', 'size']
    """

    format_version = 1

    def __init__(
        self,
        params: Parameters,
        tasks: Sequence[str] | Mapping[str, float],
        *,
        accumulate: int,
        mode: Literal["stochastic", "sequential"] = "stochastic",
        momentum: float = 0.9,
        update: Literal["gradient", "lion_lars"] = "gradient",
        coefficient: float = 1e-4,
        trust_clip: float = 100.0,
        nonfinite: Literal["raise", "skip"] = "raise",
        process_group: Any = "auto",
        **rules: Unpack[RuleOptions],
    ) -> None:
        self.micro_batches = integer("accumulate", accumulate, minimum=1)
        self.mode = choice("mode", mode, ("stochastic", "sequential"))
        self.nonfinite: NonFinite = choice("nonfinite", nonfinite, ("raise", "skip"))
        self.resolver = ConflictResolver(**rules)
        several = len(tasks) > 1 and self.resolver.arbiter_weights[0] > 0
        self.accumulator = TaskAccumulator(params, tasks, keep_previous=several, process_group=process_group)
        count = len(self.accumulator.tasks)
        if self.mode == "stochastic" and self.micro_batches % count:
            raise ValueError(
                f"accumulate must be a multiple of the {count} tasks in stochastic mode, got {accumulate}. "
                f"Use {-(-self.micro_batches // count) * count}, or mode='sequential'."
            )
        self.writer = MomentumWriter(
            self.accumulator.layout, momentum, update=update, coefficient=coefficient, trust_clip=trust_clip
        )
        self._memory = self.resolver.start(count)
        self._reference: list[list[float]] = [[0.0] * count for _ in range(count)]
        self.steps = 0
        self.skipped = 0

    # --- accumulation --------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return self.accumulator.tasks

    @property
    def _share(self) -> int:
        """Micro-batches of each task per step."""
        return self.micro_batches // (len(self.tasks) if self.mode == "stochastic" else 1)

    def schedule(self, batches: Iterable[_Batch]) -> Iterator[tuple[str, _Batch]]:
        """Pair the K micro-batches of a step with tasks.

        Stochastic: consecutive blocks, one per task. Sequential: every micro-batch with every task in turn.

        Args:
            batches: exactly K micro-batches, of any kind.

        Yields:
            (task, micro-batch).

        Raises:
            ValueError: if there are fewer or more than K.
        """
        seen = 0
        for seen, batch in enumerate(batches, start=1):
            if seen > self.micro_batches:
                break
            block = self.tasks[(seen - 1) // self._share :][:1] if self.mode == "stochastic" else self.tasks
            for task in block:
                yield task, batch
        if seen != self.micro_batches:
            got = seen if seen < self.micro_batches else "more"
            raise ValueError(
                f"batches must hold {self.micro_batches} micro-batches per step, got {got}. "
                "Group the loader's batches, and leave an incomplete last group out."
            )

    def accumulate(self, task: str, *, allow_empty: bool = False) -> AbstractContextManager[None]:
        """Add the gradients that the block computes to ``task``; see `TaskAccumulator.accumulate`.

        Raises:
            RuntimeError: if the task already has all micro-batches of this step.
        """
        if self.accumulator.counts.get(task, 0) >= self._share:
            raise RuntimeError(
                f"accumulate({task!r}) must be called {self._share} times per step, got one call more. "
                "Call step() after the last micro-batch, or reset() to begin again."
            )
        return self.accumulator.accumulate(task, allow_empty=allow_empty)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Accumulate all tasks of one micro-batch whose losses share a forward pass (sequential mode).

        Under DistributedDataParallel run the forward pass inside `no_sync`.

        Args:
            losses: one scalar per task.

        Raises:
            RuntimeError: in stochastic mode, or if the step has all its micro-batches.
            ValueError: if the names are not those of the tasks.
        """
        if self.mode != "sequential":
            raise RuntimeError(
                "backward(losses) must be used with mode='sequential', got 'stochastic', where a micro-batch "
                "serves one task. Use schedule() and accumulate()."
            )
        if set(losses) != set(self.tasks):
            raise ValueError(f"losses must be those of {', '.join(self.tasks)}, got {', '.join(losses)}.")
        for task in self.tasks:
            with self.accumulate(task):
                losses[task].backward(retain_graph=task != self.tasks[-1])

    def no_sync(self) -> AbstractContextManager[None]:
        """Keep DistributedDataParallel from reducing, for a forward pass outside `accumulate`."""
        return self.accumulator.no_sync()

    def reset(self) -> None:
        """Drop what this step has accumulated so far."""
        self.accumulator.reset()

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, scaler: torch.amp.GradScaler | None = None) -> StepInfo:
        """Resolve what was accumulated and write ``.grad``; the optimizer's step follows.

        The host reads the norms and inner products once, at most N * N + N * N numbers, because the choice of pairs
        depends on them.

        Args:
            scaler: the ``GradScaler`` whose scaled losses were differentiated. Norms are then unscaled, ``.grad`` is
                written scaled, so that ``scaler.step(optimizer)`` follows as usual; after an overflow ``.grad``
                is infinite, the scaler leaves the step out, and no state changes. Costs one more read by the host.

        Returns:
            What happened.

        Raises:
            RuntimeError: if a task lacks micro-batches, or inside the closure of LBFGS.
            NonFiniteError: if a gradient holds NaN or Inf, there is no scaler, and ``nonfinite="raise"``; nothing was
                changed, and `reset` drops the step.
        """
        if inside_line_search():
            raise RuntimeError(
                "GradientConductor.step must run once per optimizer step, got a call inside the closure of LBFGS, "
                "which is evaluated several times. Use an optimizer that evaluates it once."
            )
        wanting = [
            f"{t} {n} of {self._share}" for t, n in self.accumulator.counts.items() if n != self._share
        ]
        if wanting:
            raise RuntimeError(
                f"step must follow all micro-batches of every task, got {', '.join(wanting)}. "
                "Accumulate the rest, or reset() to drop the step."
            )
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        self.accumulator.reduce_()
        factors = [f / scale for f in self.accumulator.factors()]
        sums = self.accumulator.sums
        others = self.accumulator.previous if self._memory.steps else []
        lengths, cosines, cross = inner_products(
            sums, others, pairs=self.resolver.stability_reference == "resolved"
        )
        norms = [n * f for n, f in zip(lengths, factors, strict=True)]
        if not all(map(math.isfinite, norms)):
            return self._trouble(overflow=scaler is not None and scaler.is_enabled())
        rounding = max(torch.finfo(rows.dtype).eps for rows in sums)
        alignment = product(cross, self._reference) if cross else None
        found = self.resolver.resolve(
            norms, cosines, alignment=alignment, memory=self._memory, rounding=rounding
        )
        weights = [w * f for w, f in zip(found.weights, factors, strict=True)]
        self.writer.combine_(sums, weights, scale=scale)
        info = self._info(found, norms, cosines)
        self._memory = found.memory
        self._reference = self._next_reference(found, factors, lengths)
        self.accumulator.advance()
        self.steps += 1
        return info

    def _next_reference(
        self, found: Resolution, factors: list[float], lengths: list[float]
    ) -> list[list[float]]:
        """Combinations of this step's sums that are the unit references of the next step, as columns."""
        count = range(len(lengths))
        if self.resolver.stability_reference == "raw":
            return [[1.0 / lengths[i] if i == j and lengths[i] > 0 else 0.0 for j in count] for i in count]
        return [
            [
                found.coefficients[j][i] * factors[i] / found.norms[j] if found.norms[j] > 0 else 0.0
                for j in count
            ]
            for i in count
        ]

    def _trouble(self, *, overflow: bool) -> StepInfo:
        """Leave a step out in which something is not finite, or raise."""
        if overflow:
            self.writer.overflow_()
        else:
            self._admit()
            self.writer.withhold_()
        self.accumulator.reset()
        self.skipped += 1
        empty: dict[str, float] = {}
        return StepInfo(self.steps, True, math.nan, None, (), empty, (), empty, empty)

    def _admit(self) -> None:
        for k, group in enumerate(self.accumulator.layout.groups):
            for task, row in zip(self.tasks, self.accumulator.sums[k], strict=True):
                names = [f"{name} for task {task}" for name in group.names]
                admit(
                    group.views(row), names, policy=self.nonfinite, owner="GradientConductor", step=self.steps
                )

    def _info(self, found: Resolution, norms: list[float], cosines: list[list[float]]) -> StepInfo:
        names = self.tasks
        conflicts = tuple(
            replace(c, winner=names[int(c.winner)], loser=names[int(c.loser)]) for c in found.conflicts
        )
        pairs = [row[j] for i, row in enumerate(cosines) for j in range(i + 1, len(row))]
        return StepInfo(
            step=self.steps,
            skipped=False,
            min_cosine=min(pairs, default=1.0),
            winner=str(conflicts[0].winner) if conflicts else None,
            conflicts=conflicts,
            norms=dict(zip(names, norms, strict=True)),
            cosines=tuple(map(tuple, cosines)),
            stability=dict(zip(names, found.stability, strict=True)),
            weights=dict(zip(names, found.weights, strict=True)),
        )

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Versioned state after the last step: momentum, last gradients, the arbiter's memory.

        Micro-batches of a step that is under way are not part of it: a resumed run begins that step again.
        """
        return {
            "format_version": self.format_version,
            "tasks": list(self.tasks),
            "steps": self.steps,
            "skipped": self.skipped,
            "averages": list(self._memory.averages),
            "averaged": self._memory.steps,
            "winners": list(self._memory.winners),
            "reference": [list(row) for row in self._reference],
            "previous": [rows.clone() for rows in self.accumulator.previous],
            "writer": self.writer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict`, or nothing of it when any part does not fit; drops a step under way.

        Raises:
            StateError: if it is of a newer version, of other tasks or parameters, or a part does not fit.
        """
        own = {**self.state_dict(), "winners": None}
        check_state("GradientConductor", state, own, version=self.format_version, open_keys=("writer",))
        if list(state["tasks"]) != list(self.tasks):
            raise StateError(
                f"GradientConductor.tasks must be {list(self.tasks)}, got {shown(state['tasks'])}."
            )
        winners = instance("GradientConductor.winners", state["winners"], (list, tuple))
        if not all(isinstance(w, int) and 0 <= w < len(self.tasks) for w in winners):
            raise StateError(f"GradientConductor.winners must be positions of tasks, got {shown(winners)}.")
        self.writer.load_state_dict(state["writer"])
        for rows, saved in zip(self.accumulator.previous, state["previous"], strict=True):
            rows.copy_(saved)
        window = self.resolver.dominance_window
        kept = tuple(winners)[-window:] if window else ()
        self._memory = ArbiterMemory(tuple(map(float, state["averages"])), state["averaged"], kept)
        self._reference = [list(map(float, row)) for row in state["reference"]]
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.accumulator.reset()

    def __repr__(self) -> str:
        return (
            f"GradientConductor({self.accumulator!r}, mode={self.mode!r}, accumulate={self.micro_batches}, "
            f"{self.writer!r}, steps={self.steps}, skipped={self.skipped})"
        )
