"""Gradients accumulated per task, and the momentum their combination goes through (arXiv:2509.07252, 3.1 and 3.5)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from pullback.core.checks import choice, fraction, positive, shown
from pullback.core.flat import FlatLayout, Parameters
from pullback.core.ranks import Ranks
from pullback.core.state import check_state

TINY = 1e-8  # norms below it have no trust ratio (published code)


class TaskAccumulator:
    r"""One running gradient per task, averaged over micro-batches (section 3.1).

    Whatever ``backward()`` adds to ``.grad`` inside ``with accumulate(task)`` goes to that task; ``.grad`` itself is
    given back as it was found. A block that raises leaves nothing behind. Sums are kept in float32 for half-precision
    parameters, else in the parameters' dtype.

    Under DistributedDataParallel (pass the wrapped module) no gradient is reduced inside the blocks; `reduce_` does it
    once for all tasks.

    Args:
        params: a module, an optimizer, (name, tensor) pairs or plain tensors; frozen ones are left out.
        tasks: names, or names with positive weights: the weight multiplies the task's gradient, as it would its loss.
        keep_previous: keep the sums of the last step as well (`previous`), at the price of as much memory again.
        process_group: whose ranks average their sums: ``"auto"`` takes that of a DistributedDataParallel module in
            ``params``, a group is taken as it is, None never reduces.

    Raises:
        TypeError: if a parameter is complex or sharded, or a task's name is no string.
        ValueError: if there is no task or no trainable parameter, a name comes twice, or a weight is not positive;
            or if several processes run and ``"auto"`` finds no DistributedDataParallel module.

    Example:
        >>> from torchjd.aggregation import PCGrad
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> tasks = TaskAccumulator([weight], tasks=("fit", "decay"))
        >>> for micro_batch in range(4):
        ...     for name, loss in (("fit", -weight.sum()), ("decay", 2 * weight[0])):
        ...         with tasks.accumulate(name):
        ...             loss.backward()
        >>> PCGrad()(tasks.jacobian())
        tensor([ 1., -2.])
        >>> tasks.reset()
    """

    def __init__(
        self,
        params: Parameters,
        tasks: Sequence[str] | Mapping[str, float],
        *,
        keep_previous: bool = False,
        process_group: Any = "auto",
    ) -> None:
        self._weights = _weights(tasks)
        self._ranks = Ranks(params, process_group)
        self.layout = FlatLayout(params)
        self.tasks = tuple(self._weights)
        self._params = [p for group in self.layout.groups for p in group.params]
        banks = 2 if keep_previous else 1
        self._banks = [[group.rows(len(self.tasks)) for group in self.layout.groups] for _ in range(banks)]
        self._views = [
            [[group.views(row) for row in rows] for group, rows in zip(self.layout.groups, bank, strict=True)]
            for bank in self._banks
        ]
        self._counts = [0] * len(self.tasks)
        self._open: str | None = None
        self._reduced = False

    # --- accumulation --------------------------------------------------------------------------------------------

    @contextmanager
    def accumulate(self, task: str, *, allow_empty: bool = False) -> Generator[None]:
        """Add the gradients of the block to ``task``, as one micro-batch.

        Args:
            task: its name.
            allow_empty: accept a block without any gradient: a micro-batch that holds nothing for this task.

        Raises:
            ValueError: if there is no such task.
            RuntimeError: if blocks are nested, the step was reduced already, or the block computed no gradient and
                ``allow_empty`` is False.
        """
        if task not in self._weights:
            raise ValueError(f"task must be one of {', '.join(self.tasks)}, got {shown(task)}.")
        if self._open is not None:
            raise RuntimeError(
                f"accumulate({task!r}) must not be nested, got it inside accumulate({self._open!r}). "
                "End that block first."
            )
        if self._reduced:
            raise RuntimeError(
                f"accumulate({task!r}) must come before reduce_() or jacobian() in a step, got it after. "
                "Call advance() or reset() to begin the next step."
            )
        params = self._params
        found = [p.grad for p in params]
        for p in params:
            p.grad = None
        self._open = task
        try:
            with self.no_sync():
                yield
            grads = [p.grad for p in params]
        finally:
            self._open = None
            for p, grad in zip(params, found, strict=True):
                p.grad = grad
        if not allow_empty and all(grad is None for grad in grads):
            raise RuntimeError(
                f"accumulate({task!r}) must compute a gradient, got none in {len(params)} parameters. Call "
                "loss.backward() inside the block, or pass allow_empty=True where a micro-batch holds nothing for it."
            )
        self._add(self.tasks.index(task), grads)

    @torch.no_grad()
    def _add(self, index: int, grads: list[Tensor | None]) -> None:
        """Add to one row; the first micro-batch overwrites what the row held before, so that nothing is cleared."""
        first, start = self._counts[index] == 0, 0
        for views_of in self._views[0]:
            views = views_of[index]
            part = grads[start : start + len(views)]
            start += len(views)
            into = [v for v, g in zip(views, part, strict=True) if g is not None]
            what = [g if g.layout == torch.strided else g.to_dense() for g in part if g is not None]
            if first:
                missing = [v for v, g in zip(views, part, strict=True) if g is None]
                if missing:
                    torch._foreach_zero_(missing)
                if into:
                    torch._foreach_copy_(into, what)
            elif into:
                torch._foreach_add_(into, what)
        self._counts[index] += 1

    def no_sync(self) -> AbstractContextManager[None]:
        """Keep DistributedDataParallel from reducing: for a forward pass that stands outside ``accumulate``."""
        return self._ranks.no_sync()

    # --- what was accumulated ------------------------------------------------------------------------------------

    @property
    def counts(self) -> Mapping[str, int]:
        """Micro-batches of every task in this step."""
        return MappingProxyType(dict(zip(self.tasks, self._counts, strict=True)))

    @property
    def sums(self) -> list[Tensor]:
        """Sums over micro-batches ``[tasks, n_k]``, one tensor per device and dtype; the rows are reused."""
        return self._banks[0]

    @property
    def previous(self) -> list[Tensor]:
        """The sums of the last step (with ``keep_previous``)."""
        return self._banks[-1] if len(self._banks) > 1 else []

    def factors(self) -> list[float]:
        """What turns every row of `sums` into the weighted mean gradient of its task.

        Raises:
            RuntimeError: if a task has no micro-batch yet.
        """
        lacking = [task for task, count in self.counts.items() if not count]
        if lacking:
            raise RuntimeError(
                f"every task must be accumulated before a step, got no micro-batch of {', '.join(lacking)}. "
                "Run accumulate(task) for each of them."
            )
        world = self._ranks.world if self._reduced else 1
        return [w / (c * world) for w, c in zip(self._weights.values(), self._counts, strict=True)]

    def reduce_(self) -> None:
        """Sum the accumulated gradients over all ranks; at most once per step, and nothing with a single process."""
        if not self._reduced:
            self._ranks.sum_(self.sums)
            self._reduced = True

    def jacobian(self) -> Tensor:
        """Weighted mean gradients ``[tasks, n]`` of all ranks, as TorchJD's aggregators take them; a new tensor.

        Parameters follow each other in the order given, each in its memory order; `MomentumWriter.write_` takes the
        same order.

        Raises:
            RuntimeError: if a task has no micro-batch yet.
            ValueError: if parameters differ in device or dtype: use `sums` and `factors` then.
        """
        self.factors()
        if len(self.sums) > 1:
            raise ValueError(
                f"parameters must share one device and dtype for a Jacobian, got {len(self.sums)} kinds. "
                "Use sums and factors."
            )
        self.reduce_()
        factors = self.factors()
        (rows,) = self.sums
        return rows * torch.tensor(factors, dtype=rows.dtype, device=rows.device)[:, None]

    def advance(self) -> None:
        """End the step: its sums become `previous`, the next step begins empty."""
        self._banks.reverse()
        self._views.reverse()
        self.reset()

    def reset(self) -> None:
        """Drop what was accumulated in this step."""
        self._counts = [0] * len(self.tasks)
        self._reduced = False

    def __repr__(self) -> str:
        tasks = ", ".join(f"{task}: {weight:g}" for task, weight in self._weights.items())
        return f"TaskAccumulator({{{tasks}}}, parameters={self.layout.size}, ranks={self._ranks.world})"


def _weights(tasks: object) -> dict[str, float]:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence | Mapping) or not tasks:
        raise ValueError(
            f"tasks must be names, or names with weights, got {shown(tasks)}. Use for example ('l1', 'ssim')."
        )
    for task in tasks:
        if not isinstance(task, str):
            raise TypeError(
                f"tasks must be named by strings, got {shown(task)}. Use for example ('l1', 'ssim')."
            )
    if isinstance(tasks, Mapping):
        return {
            task: positive(f"tasks[{task!r}]", weight, fix="Leave the task out.")
            for task, weight in tasks.items()
        }
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must have distinct names, got {shown(tasks)}. Rename one.")
    return dict.fromkeys(tasks, 1.0)


# --- momentum ------------------------------------------------------------------------------------------------------


class MomentumWriter:
    r"""Smooth a direction by bias-corrected momentum and write it to ``.grad`` (section 3.5).

    :math:`m \leftarrow \beta m + (1 - \beta) u`, :math:`.grad \leftarrow m / (1 - \beta^t)`. Use it with an optimizer
    whose own first moment is off, such as ``AdamW(betas=(0, 0.95))``; with ``beta=0`` the direction is written as it
    is. ``update="lion_lars"`` writes per tensor ``sign(m) * coefficient * min(|p| / |m|, trust_clip)`` instead (ratio 1
    where a norm is below 1e-8), for plain SGD with learning rate 1.

    ``.grad`` are views of buffers that are reused in every step: clip or scale them in place as usual.

    Args:
        params: as for `TaskAccumulator`, or its ``layout``.
        beta: momentum in [0, 1).
        update: ``"gradient"`` or ``"lion_lars"``.
        coefficient: factor of ``"lion_lars"`` (the paper's runs: 1e-5).
        trust_clip: largest ratio of norms in ``"lion_lars"`` (the paper's runs: 50).

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> writer = MomentumWriter([weight], beta=0.9)
        >>> writer.write_(torch.tensor([1.0, 2.0]))
        >>> weight.grad
        tensor([1., 2.])
    """

    format_version = 1

    def __init__(
        self,
        params: Parameters | FlatLayout,
        beta: float = 0.9,
        *,
        update: Literal["gradient", "lion_lars"] = "gradient",
        coefficient: float = 1e-4,
        trust_clip: float = 100.0,
    ) -> None:
        self.layout = params if isinstance(params, FlatLayout) else FlatLayout(params)
        self.beta = fraction("beta", beta)
        if self.beta == 1.0:
            raise ValueError("beta must be < 1, got 1.0. Use for example 0.9, or 0 for no momentum.")
        self.update = choice("update", update, ("gradient", "lion_lars"))
        self.coefficient = positive("coefficient", coefficient)
        self.trust_clip = positive("trust_clip", trust_clip)
        self.steps = 0
        groups = self.layout.groups
        self._momentum = [g.rows(1)[0] for g in groups] if self.beta else []
        self._out = [g.rows(1, g.dtype)[0] for g in groups]
        self._grads = [g.views(row) for g, row in zip(groups, self._out, strict=True)]

    def write_(self, direction: Tensor | Sequence[Tensor]) -> None:
        """Take one direction into the momentum and write the gradient.

        Args:
            direction: ``[n]``, in the order of `TaskAccumulator.jacobian`; or one vector per device and dtype.

        Raises:
            ValueError: if its length is not that of the parameters.
        """
        parts = [direction] if isinstance(direction, Tensor) else list(direction)
        sizes = [group.size for group in self.layout.groups]
        if [tuple(part.shape) for part in parts] != [(size,) for size in sizes]:
            raise ValueError(
                f"direction must have {sizes} entries, got {[list(p.shape) for p in parts]}. Pass all parameters."
            )
        self.combine_([part.detach()[None] for part in parts], [1.0])

    @torch.no_grad()
    def combine_(self, rows: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0) -> None:
        """The same for ``sum_i weights[i] * rows[i]``, in one pass over the rows.

        Args:
            rows: ``[k, n_g]`` per device and dtype, as `TaskAccumulator.sums`.
            weights: one number per row.
            scale: multiplies what is written, not the momentum: the loss scale of a ``GradScaler``.
        """
        self.layout.check_places("MomentumWriter")
        self.steps += 1
        correction = 1.0 / (1.0 - self.beta**self.steps)
        for k, group in enumerate(self.layout.groups):
            matrix = rows[k].to(group.wide)
            vector = torch.tensor(weights, dtype=group.wide, device=group.device)
            if not self.beta and self.update == "gradient" and group.dtype == group.wide:
                torch.mv(matrix.T, vector * scale, out=self._out[k])
                continue
            if self.beta:
                smooth = self._momentum[k].addmv_(matrix.T, vector, beta=self.beta, alpha=1.0 - self.beta)
            else:
                smooth = torch.mv(matrix.T, vector)
            if self.update == "gradient":
                torch.mul(smooth, correction * scale, out=self._out[k])
            else:
                self._lion_lars(k, smooth, correction, scale)
        self._bind()

    def _lion_lars(self, k: int, smooth: Tensor, correction: float, scale: float) -> None:
        group = self.layout.groups[k]
        params = [p.detach() for p in group.params]
        of_params = torch.stack(torch._foreach_norm(params, dtype=group.wide))
        of_smooth = torch.stack(torch._foreach_norm(group.views(smooth))) * correction
        small = (of_params < TINY) | (of_smooth < TINY)
        ratio = torch.where(small, torch.ones_like(of_smooth), of_params / of_smooth).clamp_max(
            self.trust_clip
        )
        factors = (ratio * (self.coefficient * scale)).to(group.dtype)
        self._out[k].copy_(torch.sign(smooth))
        torch._foreach_mul_(self._grads[k], list(factors.unbind()))

    def overflow_(self) -> None:
        """Write infinite gradients, which make a ``GradScaler`` leave the step out; the momentum stays as it is."""
        for row in self._out:
            row.fill_(torch.inf)
        self._bind()

    def withhold_(self) -> None:
        """Take all gradients away, which makes torch's optimizers do nothing; the momentum stays as it is."""
        for group in self.layout.groups:
            for p in group.params:
                p.grad = None

    def _bind(self) -> None:
        for group, grads in zip(self.layout.groups, self._grads, strict=True):
            for p, grad in zip(group.params, grads, strict=True):
                p.grad = grad if p.requires_grad else None  # frozen since

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Versioned state: number of steps, momentum, and the parameters' sizes it belongs to."""
        return {
            "format_version": self.format_version,
            "steps": self.steps,
            "sizes": self.layout.sizes(),
            "momentum": [row.clone() for row in self._momentum],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict`, or nothing of it when any part does not fit.

        Raises:
            StateError: if it is of a newer version, of other parameters, or kept with another kind of momentum.
        """
        check_state("MomentumWriter", state, self.state_dict(), version=self.format_version)
        self.layout.check_sizes("MomentumWriter", state["sizes"])
        for row, saved in zip(self._momentum, state["momentum"], strict=True):
            row.copy_(saved)
        self.steps = int(state["steps"])

    def __repr__(self) -> str:
        return f"MomentumWriter(beta={self.beta:g}, update={self.update!r}, steps={self.steps})"
