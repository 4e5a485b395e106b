"""Two-layer students of a random teacher, many of them stacked and trained at once by written-out updates.

At this size autograd and one optimizer step per network cost far more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pullback.core.streams import generator


@dataclass(frozen=True)
class Shape:
    """Size and kind of teacher and student, y = phi(W2 phi(W1 x)), without biases.

    Args:
        inputs: M.
        hidden: N.
        tanh: whether phi is tanh; else the identity.
        spread: the student's initial weights are uniform as the teacher's, times this factor.
    """

    inputs: int
    hidden: int
    tanh: bool = False
    spread: float = 1.0


@dataclass(frozen=True)
class Weights:
    """A stack of S networks: ``hidden`` [S, N, M] and ``readout`` [S, 1, N]."""

    hidden: Tensor
    readout: Tensor

    def norms(self) -> tuple[Tensor, Tensor]:
        """Frobenius norm of each layer [S, 1, 1]."""
        return _norm(self.hidden), _norm(self.readout)

    def clone(self) -> Weights:
        """Independent weights."""
        return Weights(self.hidden.clone(), self.readout.clone())

    def flat(self) -> Tensor:
        """All weights of each network [S, weights], a copy."""
        return torch.cat([self.hidden.flatten(1), self.readout.flatten(1)], 1)


@dataclass(frozen=True)
class Points:
    """Inputs [S, points, M] and the teachers' answers [S, points, 1]."""

    x: Tensor
    y: Tensor


def _norm(stack: Tensor) -> Tensor:
    return torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)


def _uniform(shape: tuple[int, ...], scale: float, stream: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=stream) - 1) * scale


def draw_weights(shape: Shape, stack: int, name: str, seed: int, spread: float = 1.0) -> Weights:
    """Uniform weights: W1 in +-spread / sqrt(M), W2 in +-spread / sqrt(N)."""
    stream = generator(name, seed)
    m, n = shape.inputs, shape.hidden
    hidden = _uniform((stack, n, m), spread / m**0.5, stream)
    return Weights(hidden, _uniform((stack, 1, n), spread / n**0.5, stream))


def draw_points(shape: Shape, teacher: Weights, count: int, name: str, seed: int) -> Points:
    """Inputs of covariance I / 2 and the answers of each network of ``teacher`` to inputs of its own."""
    stack = len(teacher.hidden)
    x = torch.randn(stack, count, shape.inputs, generator=generator(name, seed)) / 2**0.5
    return Points(x, answer(shape, teacher, x))


def answer(shape: Shape, weights: Weights, x: Tensor) -> Tensor:
    """Outputs [S, points, 1]."""
    hidden = torch.bmm(x, weights.hidden.mT)
    out = torch.bmm(hidden.tanh_() if shape.tanh else hidden, weights.readout.mT)
    return out.tanh_() if shape.tanh else out


def error(shape: Shape, weights: Weights, points: Points) -> Tensor:
    """Half the mean squared error of each network [S]."""
    return 0.5 * (answer(shape, weights, points.x) - points.y).square().mean((1, 2))


# --- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How a stack learns.

    Args:
        eta: step size of a whole epoch; a minibatch of b of n points takes eta * b / n.
        factor_hidden: what the update of W1 is multiplied by, broadcast to [S, N, M]; None: 1.
        factor_readout: likewise for W2, [S, 1, N].
        exact: whether the derivative of the output's nonlinearity is kept (the official rule leaves it out).
        reset: whether each layer gets its initial Frobenius norm back after every update.
        momentum: heavy-ball momentum.
    """

    eta: float
    factor_hidden: Tensor | None = None
    factor_readout: Tensor | None = None
    exact: bool = False
    reset: bool = True
    momentum: float = 0.0


@dataclass
class Learner:
    """A stack of students in training; weights are changed in place."""

    shape: Shape
    weights: Weights
    rule: Rule
    _moving: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.weights.norms()

    def step(self, x: Tensor, y: Tensor, share: float = 1.0) -> None:
        """One update on a batch [S, b, M], with ``share`` = b / n of the epoch's step size."""
        g1, g2 = self.gradients(x, y)
        if self.rule.momentum:
            if not self._moving:
                self._moving = [torch.zeros_like(g1), torch.zeros_like(g2)]
            g1, g2 = (v.mul_(self.rule.momentum).add_(g) for v, g in zip(self._moving, (g1, g2), strict=True))
        size = self.rule.eta * share
        _subtract_(self.weights.hidden, g1, self.rule.factor_hidden, size)
        _subtract_(self.weights.readout, g2, self.rule.factor_readout, size)
        if self.rule.reset:
            self.weights.hidden.mul_(self.start[0] / _norm(self.weights.hidden))
            self.weights.readout.mul_(self.start[1] / _norm(self.weights.readout))

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean gradients of half the squared error for W1 [S, N, M] and W2 [S, 1, N]; none of them is flipped."""
        hidden = torch.bmm(x, self.weights.hidden.mT)
        if self.shape.tanh:
            hidden.tanh_()
        out = torch.bmm(hidden, self.weights.readout.mT)
        if self.shape.tanh:
            out.tanh_()
        delta = (out - y).div_(x.shape[1])
        if self.shape.tanh and self.rule.exact:
            delta.mul_(1 - out.square_())
        readout = torch.bmm(delta.mT, hidden)
        back = delta * self.weights.readout
        if self.shape.tanh:
            back.mul_(1 - hidden.square_())
        return torch.bmm(back.mT, x), readout


def _subtract_(weights: Tensor, gradient: Tensor, factor: Tensor | None, size: float) -> None:
    if factor is None:
        weights.sub_(gradient, alpha=size)
    else:
        weights.addcmul_(gradient, factor, value=-size)


def epochs_to(
    learner: Learner,
    points: Points,
    held: tuple[Points, ...],
    *,
    batch: int,
    epochs: int,
    goal: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Train until every student has met the goal on every held-out set, at most ``epochs``.

    Args:
        learner: the students.
        points: what they train on; all students of a stack see their points in the same order.
        held: sets on which the error is measured after every epoch.
        batch: points per update.
        epochs: the most epochs, which also stands for students that never meet the goal.
        goal: error below which a student is done.
        seed: stream of the order.

    Returns:
        First epoch below the goal [held, S], and the smallest error seen [held, S].
    """
    count = points.x.shape[1]
    first = torch.full((len(held), len(points.x)), float(epochs))
    best = torch.full_like(first, torch.inf)
    met = torch.zeros_like(first, dtype=torch.bool)
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator("student order", seed, epoch))
        for rows in order.split(batch):
            learner.step(points.x[:, rows], points.y[:, rows], len(rows) / count)
        now = torch.stack([error(learner.shape, learner.weights, part) for part in held])
        best = torch.minimum(best, now.nan_to_num(torch.inf))
        first[(now < goal) & ~met] = epoch + 1
        met |= now < goal
        if bool(met.all()):
            break
    return first, best


def train_full(
    learner: Learner, points: Points, *, steps: int, keep: int, watch: Callable[[int], None] | None = None
) -> Tensor:
    """``steps`` updates on all points; the weights of the last ``keep`` of them [keep, S, weights]."""
    path = []
    for step in range(steps):
        learner.step(points.x, points.y)
        if step >= steps - keep:
            path.append(learner.weights.flat())
        if watch is not None:
            watch(step + 1)
    return torch.stack(path)


# --- near a solution -----------------------------------------------------------------------------------------------


def leaves_solution(
    solution: Weights, factors: tuple[Tensor, Tensor], reset: Tensor, *, eta: float, steps: int, seed: int
) -> Tensor:
    """Whether linear students that start beside the teacher's own weights leave that solution (covariance I / 2).

    Exact in the input's covariance: nothing is sampled. W1 is disturbed by normal noise of size 1e-4 / sqrt(M); a
    student has left when the error of its effective weights exceeds 30 times that of the start.

    Args:
        solution: the teacher [1, N, M].
        factors: signs of the updates of W1 [B, 1, M] and W2 [B, 1, N] of B students.
        reset: 1 for students whose layers' norms are reset, 0 for the others [B, 1, 1].
        eta: step size.
        steps: number of steps.
        seed: stream of the disturbance, the same for all students.

    Returns:
        One truth value per student [B].
    """
    signs_in, signs_hidden = (factor.double() for factor in factors)
    size = len(signs_in)
    w1 = solution.hidden.double().repeat(size, 1, 1)
    w2 = solution.readout.double().repeat(size, 1, 1)
    target = torch.bmm(w2, w1)
    noise = torch.randn(w1.shape[1:], generator=generator("beside the solution", seed), dtype=torch.float64)
    w1 += noise * 1e-4 / w1.shape[-1] ** 0.5
    norms = _norm(w1), _norm(w2)
    start = _norm(torch.bmm(w2, w1) - target).flatten()
    left = torch.zeros(size, dtype=torch.bool)
    for step in range(steps):
        delta = (torch.bmm(w2, w1) - target) * (0.5 * eta)
        change = torch.bmm(delta, w1.mT).mul_(signs_hidden)
        w1.baddbmm_(w2.mT, delta * signs_in, alpha=-1.0)
        w2 -= change
        w1.mul_(torch.where(reset > 0, norms[0] / _norm(w1), 1.0))
        w2.mul_(torch.where(reset > 0, norms[1] / _norm(w2), 1.0))
        if step % 20 == 19:
            apart = _norm(torch.bmm(w2, w1) - target).flatten()
            left |= ~(apart <= 30 * start)  # also what is no number any more
    return left
