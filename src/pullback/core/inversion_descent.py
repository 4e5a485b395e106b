"""The loop of a gradient inversion: steps, schedule, the best iterate, stop rules; one host read per block of steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pullback.core.checks import choice, integer, non_negative, positive
from pullback.core.kinds.search import SearchStatus

OptimizerName: TypeAlias = Literal["signed", "adam", "lbfgs"]
Schedule: TypeAlias = Literal["plateau", "milestones", "constant"] | Callable[[int, int], float]
_MILESTONES = (3 / 8, 5 / 8, 7 / 8)
_FACTOR, _THRESHOLD = 0.1, 1e-4


class Problem(Protocol):
    """What is searched for and how a guess is judged."""

    signed: frozenset[str]

    def start(self, restart: int) -> dict[str, Tensor]:
        """First guess: new leaves by name."""
        ...

    def evaluate(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """The loss and its parts as 0-dim tensors; the loss is the first."""
        ...

    def project_(self, leaves: Mapping[str, Tensor]) -> None:
        """Put the leaves back where they may lie, in place."""
        ...


@dataclass(frozen=True)
class Plan:
    """How a search goes on and when it ends; see `pullback.core.inversion.GradientInversion` for the arguments."""

    max_iters: int = 20_000
    optimizer: OptimizerName = "signed"
    lr: float = 0.1
    schedule: Schedule = "plateau"
    patience: int = 800
    stop_patience: int | None = 4_000
    tolerance: float = 1e-5
    check_every: int = 20

    def __post_init__(self) -> None:
        integer("max_iters", self.max_iters, minimum=1, fix="An attack needs at least one iteration.")
        choice("optimizer", self.optimizer, ("signed", "adam", "lbfgs"))
        positive("lr", self.lr)
        if not callable(self.schedule):
            choice("schedule", self.schedule, ("plateau", "milestones", "constant"))
        integer("patience", self.patience, minimum=1)
        if self.stop_patience is not None:
            integer("stop_patience", self.stop_patience, minimum=1, fix="None never stops early.")
        non_negative("tolerance", self.tolerance, fix="Use 0 to spend the whole budget.")
        integer("check_every", self.check_every, minimum=1)


@dataclass(frozen=True)
class Trial:
    """How one start ended: the best leaves, their loss, and the trace of all terms.

    Args:
        leaves: best iterate, by name, without graph.
        loss: its loss; infinite if no loss was finite.
        status: how it ended.
        steps: evaluations of the loss.
        message: what happened.
        trace: [steps, terms + 1], the last column being the step size.
    """

    leaves: dict[str, Tensor]
    loss: float
    status: SearchStatus
    steps: int
    message: str
    trace: Tensor


class Tally:
    """What is kept of every evaluation, all of it on the device: trace, best iterate, step size on plateaus.

    The best iterate is stored with the loss that was computed *for it*, before the step that follows. The plateau rule
    is that of ``torch.optim.lr_scheduler.ReduceLROnPlateau``: factor 0.1, relative threshold 1e-4.

    Args:
        leaves: the leaves of the search.
        plan: step size and schedule.
    """

    def __init__(self, leaves: Mapping[str, Tensor], plan: Plan) -> None:
        self.leaves, self.plan = {name: leaf.detach() for name, leaf in leaves.items()}, plan
        self.kept = {name: leaf.clone() for name, leaf in self.leaves.items()}
        first = next(iter(self.leaves.values()))
        self.best = first.new_full((), math.inf)
        self.lowest, self.bad = self.best.clone(), torch.zeros((), dtype=torch.int64, device=first.device)
        self.lr = first.new_full((), plan.lr)
        self.rows: list[Tensor] = []
        self.trace = torch.zeros(0)
        self.steps = 0

    @torch.no_grad()
    def note(self, terms: Sequence[Tensor]) -> None:
        """Note the terms of the present leaves, before their step."""
        plan, loss = self.plan, terms[0].detach()
        self._set_rate(plan)
        self.rows.append(torch.stack([*(each.detach() for each in terms), self.lr]))
        better = loss < self.best  # never true of NaN
        torch.where(better, loss, self.best, out=self.best)
        for name, kept in self.kept.items():
            torch.where(better, self.leaves[name], kept, out=kept)
        if plan.schedule == "plateau":
            self._plateau(loss)
        self.steps += 1

    def _plateau(self, loss: Tensor) -> None:
        better = loss < self.lowest * (1 - _THRESHOLD)
        torch.where(better, loss, self.lowest, out=self.lowest)
        self.bad.add_(1).masked_fill_(better, 0)
        drop = self.bad > self.plan.patience
        torch.where(drop, self.lr * _FACTOR, self.lr, out=self.lr)
        self.bad.masked_fill_(drop, 0)

    def _set_rate(self, plan: Plan) -> None:
        if callable(plan.schedule):
            self.lr.fill_(plan.lr * float(plan.schedule(self.steps, plan.max_iters)))
        elif plan.schedule == "milestones":
            passed = sum(self.steps >= share * plan.max_iters for share in _MILESTONES)
            self.lr.fill_(plan.lr * _FACTOR**passed)

    def read(self) -> None:
        """Append the noted rows to the trace on the host: the one read of a block."""
        if self.rows:
            new = torch.stack(self.rows).cpu()
            self.trace = torch.cat([self.trace, new]) if len(self.trace) else new
            self.rows = []

    def state(self) -> dict[str, Any]:
        """Copies of all that is kept, for a resume."""
        names = ("best", "lowest", "bad", "lr", "trace")
        kept = {name: leaf.clone() for name, leaf in self.kept.items()}
        return {name: getattr(self, name).clone() for name in names} | {"steps": self.steps, "kept": kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the place of the tally whose `state` this is."""
        for name in ("best", "lowest", "bad", "lr"):
            getattr(self, name).copy_(state[name])
        self.trace, self.steps = state["trace"].clone(), int(state["steps"])
        for name, leaf in self.kept.items():
            leaf.copy_(state["kept"][name])


Evaluate: TypeAlias = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]
"""Gives the loss at the present leaves, and its gradients."""


class Adam:
    """Adam on a handful of leaves, with the sign of the gradient for some of them, and a step size on the device.

    Betas 0.9 and 0.999, epsilon 1e-8, no weight decay, as ``torch.optim.Adam``; grouped calls without its bookkeeping,
    which for leaves as small as an image costs as much as a small model's pass.

    Args:
        leaves: what is moved, in place.
        signed: names of the leaves that get the sign of their gradient.
        tally: holds the step size.
    """

    def __init__(self, leaves: Mapping[str, Tensor], signed: frozenset[str], tally: Tally) -> None:
        self.leaves = [leaf.detach() for leaf in leaves.values()]  # the same memory
        self.signed = [position for position, name in enumerate(leaves) if name in signed]
        self.first = [torch.zeros_like(leaf) for leaf in self.leaves]
        self.second = [torch.zeros_like(leaf) for leaf in self.leaves]
        self.tally, self.count = tally, 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor] | tuple[Tensor, ...]) -> None:
        """One step; gradients of signed leaves are overwritten."""
        for position in self.signed:
            gradients[position].sign_()
        self.count += 1
        torch._foreach_lerp_(self.first, gradients, 1 - 0.9)
        torch._foreach_mul_(self.second, 0.999)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - 0.999)
        below = torch._foreach_sqrt(self.second)
        torch._foreach_div_(below, (1 - 0.999**self.count) ** 0.5)
        torch._foreach_add_(below, 1e-8)
        moves = torch._foreach_div(self.first, below)
        torch._foreach_mul_(moves, self.tally.lr / (1 - 0.9**self.count))
        torch._foreach_sub_(self.leaves, moves)

    def run(self, evaluate: Evaluate, project_: Callable[[], None], budget: int) -> None:
        """A block of iterations, at most ``budget``."""
        for _ in range(min(budget, self.tally.plan.check_every)):
            self.step(evaluate()[1])
            project_()

    def state(self) -> dict[str, Any]:
        """Copies of the moments, for a resume."""
        rows = {"first": self.first, "second": self.second}
        return {name: [each.clone() for each in row] for name, row in rows.items()} | {"count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the place of the optimizer whose `state` this is."""
        torch._foreach_copy_(self.first, list(state["first"]))
        torch._foreach_copy_(self.second, list(state["second"]))
        self.count = int(state["count"])


class _Spent(Exception):
    """The budget ended inside a line search."""


class LBFGS:
    """torch's L-BFGS with a strong Wolfe line search; every evaluation counts against the budget.

    Args:
        leaves: what is moved, in place. There is no projection: it would break the pairs that curvature is taken from.
        plan: step size, and how many evaluations a block has.
    """

    def __init__(self, leaves: Mapping[str, Tensor], plan: Plan) -> None:
        self.leaves = list(leaves.values())
        block = plan.check_every
        self.optimizer = torch.optim.LBFGS(
            self.leaves, lr=plan.lr, max_iter=block, max_eval=block, tolerance_grad=0.0, tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

    def run(self, evaluate: Evaluate, project_: Callable[[], None], budget: int) -> None:
        """Iterate until about ``check_every`` and at most ``budget`` evaluations are spent."""
        del project_
        left = budget

        def closure() -> Any:
            nonlocal left
            if left == 0:
                raise _Spent
            left -= 1
            loss, gradients = evaluate()
            for leaf, gradient in zip(self.leaves, gradients, strict=True):
                leaf.grad = gradient
            return loss

        try:
            self.optimizer.step(closure)
        except _Spent:
            pass
        finally:
            for leaf in self.leaves:
                leaf.grad = None

    def state(self) -> dict[str, Any]:
        """A copy of torch's own state, for a resume."""
        return copy.deepcopy(self.optimizer.state_dict())

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the place of the optimizer whose `state` this is."""
        self.optimizer.load_state_dict(copy.deepcopy(dict(state)))


class Descent:
    """One start of a search: leaves, optimizer and tally, advanced block by block.

    Args:
        problem: what is searched for.
        plan: how.
        restart: number of the start.
    """

    def __init__(self, problem: Problem, plan: Plan, restart: int) -> None:
        self.problem, self.plan = problem, plan
        self.leaves = {name: leaf.detach().requires_grad_() for name, leaf in problem.start(restart).items()}
        self.tally = Tally(self.leaves, plan)
        lbfgs = plan.optimizer == "lbfgs"
        self.mover = LBFGS(self.leaves, plan) if lbfgs else Adam(self.leaves, problem.signed, self.tally)

    def state(self) -> dict[str, Any]:
        """Copies of everything that changes, for a resume between two blocks."""
        leaves = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        return {"leaves": leaves, "mover": self.mover.state(), "tally": self.tally.state()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name, leaf in self.leaves.items():
            leaf.copy_(state["leaves"][name])
        self.mover.load(state["mover"])
        self.tally.load(state["tally"])

    def _evaluate(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        terms = self.problem.evaluate(self.leaves)
        gradients = torch.autograd.grad(terms[0], list(self.leaves.values()))
        self.tally.note(terms)
        return terms[0].detach(), gradients

    def advance(self) -> Trial | None:
        """One block of iterations.

        Returns:
            How it ended, or None if it goes on.
        """
        left = self.plan.max_iters - self.tally.steps
        if left > 0:
            project_ = partial(self.problem.project_, self.leaves)
            self.mover.run(self._evaluate, project_, left)
            self.tally.read()
        return self._verdict()

    def _verdict(self) -> Trial | None:
        losses, plan = self.tally.trace[:, 0], self.plan
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            at = int(wrong[0])
            what = (
                f"the loss was {float(losses[at])} at iteration {at}; the best iterate before it is returned"
            )
            return self.ended("diverged", f"{what}. Lower lr.", at + 1)
        best, steps = int(losses.argmin()), len(losses)
        if plan.tolerance > 0 and float(losses[best]) <= plan.tolerance:
            return self.ended("converged", f"the loss fell to {plan.tolerance:g} in {best} iterations")
        if plan.stop_patience is not None and steps - 1 - best >= plan.stop_patience:
            return self.ended(
                "max_steps", f"no better loss for {plan.stop_patience} iterations, stopped at {steps}"
            )
        if steps >= plan.max_iters:
            return self.ended("max_steps", f"the budget of {plan.max_iters} iterations is spent")
        return None

    def ended(self, status: SearchStatus, message: str, steps: int | None = None) -> Trial:
        """The present best as the end of this start."""
        trace = self.tally.trace[:steps].clone()
        finite = trace[:, 0][trace[:, 0].isfinite()]
        loss = float(finite.min()) if len(finite) else math.inf
        kept = {name: leaf.clone() for name, leaf in self.tally.kept.items()}
        return Trial(kept, loss, status, len(trace), message, trace)


def best_of(trials: Sequence[Trial]) -> int:
    """Position of the trial with the smallest loss; the first of equal ones."""
    return min(range(len(trials)), key=lambda position: trials[position].loss)
