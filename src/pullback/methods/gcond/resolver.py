"""Which of several gradients gives way, and by how much: the conflict resolution of GCond (arXiv:2509.07252).

Everything is decided on the Gram matrix of the gradients. Projections stay in their span, so that the matrix is
updated by algebra instead of by reading gradients again, and one weighted sum of the original gradients ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pullback.core.checks import NonFiniteError, choice, finite, fraction, integer, non_negative, positive
from pullback.core.kinds.aggregator import GramianAggregator, Weighting
from pullback.core.span import Rows, Span, inner_products, normalised

FULL_ZONES = (-0.8, -0.5, 0.0)


@dataclass(frozen=True)
class ArbiterMemory:
    """What the arbiter remembers from step to step.

    Args:
        averages: running mean of every task's gradient norm (before any bias correction).
        steps: how many steps went into it.
        winners: positions of the last winners, oldest first, at most ``dominance_window`` of them.
    """

    averages: tuple[float, ...]
    steps: int = 0
    winners: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conflict:
    """One pair that was resolved.

    Args:
        winner: position of the task that the arbiter preferred (in a `StepInfo`: its name).
        loser: the other one.
        cosine: cosine of their gradients before this round.
        winner_share: how much of the projection off the loser the winner took (0 none, 1 all of it).
        loser_share: how much of the projection off the winner the loser took; with ``smooth=False`` a loser that was
            set to zero has infinity.
    """

    winner: int | str
    loser: int | str
    cosine: float
    winner_share: float
    loser_share: float


@dataclass(frozen=True)
class Resolution:
    """What came out of one resolution of N gradients.

    Args:
        weights: the direction is ``sum_j weights[j] * g_j`` over the original gradients.
        coefficients: resolved gradient i is ``sum_j coefficients[i][j] * g_j``; columns sum up to ``weights``.
        norms: norm of every resolved gradient.
        conflicts: the resolved pairs, one per round.
        stability: cosine of every gradient with its reference (0 where there is none).
        memory: the arbiter's memory for the next step.
    """

    weights: list[float]
    coefficients: list[list[float]]
    norms: list[float]
    conflicts: tuple[Conflict, ...]
    stability: list[float]
    memory: ArbiterMemory


def projection_shares(
    cosine: float, thresholds: tuple[float, float, float] = FULL_ZONES, power: float = 2.0
) -> tuple[float, float]:
    r"""How much of their projections winner and loser take: the sines of the effective angle.

    The angle is 0 at the weak threshold, :math:`\pi/2` at the main one and :math:`\pi` from the critical one down;
    shares are :math:`\sin\alpha` and :math:`\sin\min(\alpha, \pi/2)`.

    Args:
        cosine: cosine of the two gradients.
        thresholds: (critical, main, weak).
        power: exponent of the angle between main and critical threshold.

    Returns:
        Shares of winner and loser, each in [0, 1].
    """
    critical, main, weak = thresholds
    if cosine >= weak:
        return 0.0, 0.0
    if cosine <= critical:
        return 0.0, 1.0
    if cosine >= main:
        angle = math.pi / 2 * (1.0 - (cosine - main) / (weak - main))
        return math.sin(angle), math.sin(angle)
    return math.sin(math.pi / 2 * (1.0 + ((cosine - main) / (critical - main)) ** power)), 1.0


class ConflictResolver(GramianAggregator):
    r"""Project conflicting gradients off each other, the worst pair first, then add them up (section 3 of the paper).

    In every round the pair of least cosine is taken; below ``thresholds[2]`` an arbiter names the winner by
    :math:`w_1 \max(0, \cos(g_i, g_i^{old})) + w_2 N_i`, with :math:`N_i` the share of a norm relative to its running
    mean, and both gradients are projected off each other's old value by `projection_shares`.

    Called with a Jacobian ``[tasks, n]`` it is pure: without a memory there is no stability, the larger gradient
    wins (an equal one: the earlier), and equal Jacobians give equal directions. `GradientConductor` gives it the
    memory. Being one of TorchJD's aggregators with weights from the Gramian, it is driven by ``jac_to_grad``, also
    with ``optimize_gramian_computation=True``, and ``gramian_weighting`` by TorchJD's autogram engine.

    Args:
        thresholds: cosines (critical, main, weak), ascending; ``(-1, -1, -1)`` resolves nothing.
        power: exponent of the angle between main and critical threshold.
        max_iters: most rounds; None: twice the number of tasks.
        smooth: False for the step-wise zones of the paper's appendix: below critical the loser is set to zero, down
            from main the loser is made orthogonal, above main both are, without an arbiter.
        arbiter_weights: of stability and of relative strength.
        stability_reference: ``"raw"`` compares with the last accumulated gradient (equation 8) and scores once per
            step; ``"resolved"`` with the last *projected* one and scores again after each round, as the published
            code does.
        dominance_window: after so many victories in a row a task loses its next conflict; 0 is off.
        ema_decay: of the running mean of norms.
        ema_bias_correction: begin that mean at 0 instead of at 1; the correction itself is common to all tasks and
            leaves their shares alone.
        norm_cap: shorten longer gradients to this norm before anything else; None does not.
        zero_tolerance: gradients shorter than this share of the longest one take part in no conflict.

    Raises:
        TypeError: if an option is of a wrong type.
        ValueError: if an option is out of its range.

    Example:
        >>> jacobian = torch.tensor([[2.0, 0.0], [-0.9, 0.1]])
        >>> ConflictResolver()(jacobian)
        tensor([2.0000, 0.1000])
    """

    def __init__(
        self,
        *,
        thresholds: tuple[float, float, float] = FULL_ZONES,
        power: float = 2.0,
        max_iters: int | None = 3,
        smooth: bool = True,
        arbiter_weights: tuple[float, float] = (0.8, 0.2),
        stability_reference: Literal["raw", "resolved"] = "raw",
        dominance_window: int = 0,
        ema_decay: float = 0.95,
        ema_bias_correction: bool = False,
        norm_cap: float | None = None,
        zero_tolerance: float = 1e-12,
    ) -> None:
        super().__init__(_Weights(self._of_gramian))
        self.weighting = _Weights(self._of_matrix)
        self.thresholds = _thresholds(thresholds)
        self.power = positive("power", power)
        self.max_iters = None if max_iters is None else integer("max_iters", max_iters, minimum=1)
        self.smooth = choice("smooth", smooth, (True, False))
        self.arbiter_weights = _pair("arbiter_weights", arbiter_weights)
        self.stability_reference = choice("stability_reference", stability_reference, ("raw", "resolved"))
        self.dominance_window = integer("dominance_window", dominance_window, minimum=0)
        self.ema_decay = fraction("ema_decay", ema_decay)
        self.ema_bias_correction = choice("ema_bias_correction", ema_bias_correction, (True, False))
        self.norm_cap = None if norm_cap is None else positive("norm_cap", norm_cap)
        self.zero_tolerance = non_negative("zero_tolerance", zero_tolerance)

    # --- as an aggregator ----------------------------------------------------------------------------------------

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Direction of a Jacobian.

        Args:
            matrix: Jacobian ``[tasks, n]``, real; half precision is read in float32.

        Returns:
            Direction ``[n]`` in the Jacobian's dtype, without autograd graph.

        Raises:
            ValueError: if it is no matrix.
            NonFiniteError: if it holds NaN or Inf.
        """
        rows = matrix.detach()
        if rows.numel() == 0:
            return rows.new_zeros(rows.shape[1])
        if rows.dtype in {torch.float16, torch.bfloat16}:
            rows = rows.float()
        return torch.mv(rows.T, self.weighting(rows)).to(matrix.dtype)

    def _of_matrix(self, rows: Tensor) -> Tensor:
        norms, cosines, _ = inner_products([rows])
        return self._admitted(norms, cosines, rows)

    def _of_gramian(self, gramian: Tensor) -> Tensor:
        return self._admitted(*normalised(gramian.detach().double().tolist()), gramian)

    def _admitted(self, norms: list[float], cosines: Rows, like: Tensor) -> Tensor:
        bad = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        if bad:
            raise NonFiniteError(
                f"matrix must be finite, got NaN or Inf in row {bad[0]}. Leave this step out, or look at that loss."
            )
        found = self.resolve(norms, cosines, rounding=torch.finfo(like.dtype).eps)
        return torch.tensor(found.weights, dtype=like.dtype, device=like.device)

    # --- the decision --------------------------------------------------------------------------------------------

    def resolve(
        self,
        norms: Sequence[float],
        cosines: Rows,
        *,
        alignment: Rows | None = None,
        memory: ArbiterMemory | None = None,
        rounding: float = 2.0**-52,
    ) -> Resolution:
        """Decide on norms and cosines alone; pure, on the host, in float64.

        Args:
            norms: norm of each of N gradients.
            cosines: their cosines ``[N][N]``, 0 where a gradient is zero.
            alignment: ``alignment[k][i]`` is the cosine of gradient k with the reference of task i; with raw
                references only the diagonal counts. None: no stability.
            memory: what the last resolution returned; None begins.
            rounding: relative precision of the cosines. A gradient that a projection left with less than
                ``16 * rounding`` of its squared norm counts as zero, because rounding decides where it points;
                scores that differ by less are a tie, and cosines so close to the weak threshold no conflict.

        Returns:
            Weights, coefficients, conflicts and the next memory.

        Raises:
            ValueError: if the memory belongs to another number of tasks.
        """
        averages, steps, winners = self._remembered(norms, memory)
        sizes = [n if self.norm_cap is None else min(n, self.norm_cap) for n in norms]
        strength = [n / a if a > 0 else 0.0 for n, a in zip(sizes, averages, strict=True)]
        alive = [n > self.zero_tolerance * max(norms) for n in norms]
        state = Span(cosines, alive, 16.0 * rounding)
        stability = [0.0] * len(norms) if alignment is None else state.along(alignment)
        conflicts, winners = self._rounds(state, alignment, stability, strength, winners, 16.0 * rounding)
        coefficients = state.over(norms, sizes)
        return Resolution(
            weights=[sum(column) for column in zip(*coefficients, strict=True)],
            coefficients=coefficients,
            norms=[n * state.length(i) if state.alive[i] else n for i, n in enumerate(sizes)],
            conflicts=tuple(conflicts),
            stability=stability,
            memory=ArbiterMemory(tuple(averages), steps, winners),
        )

    def _rounds(
        self,
        state: Span,
        alignment: Rows | None,
        stability: list[float],
        strength: list[float],
        winners: tuple[int, ...],
        slack: float,
    ) -> tuple[list[Conflict], tuple[int, ...]]:
        """Resolve the worst pair until none is left or the rounds are used up."""
        conflicts: list[Conflict] = []
        current = strength
        for _ in range(2 * len(strength) if self.max_iters is None else self.max_iters):
            cosine, i, j = state.worst_pair()
            if cosine >= self.thresholds[2] - slack:
                break
            if self.stability_reference == "resolved" and conflicts:
                stability = stability if alignment is None else state.along(alignment)
                current = [r * state.length(k) for k, r in enumerate(strength)]
            shares, judged = self._shares(cosine)
            if judged:
                i, j = self._winner(i, j, self._scores(stability, current, i, j), winners, slack)
                winners = (*winners, i)[-self.dominance_window :] if self.dominance_window else ()
            _project(state, i, j, *shares)
            conflicts.append(Conflict(i, j, cosine, *shares))
        return conflicts, winners

    def start(self, tasks: int) -> ArbiterMemory:
        """The memory before the first step: running means at 1 (equation 9), or at 0 with bias correction."""
        return ArbiterMemory((0.0 if self.ema_bias_correction else 1.0,) * tasks)

    def _remembered(
        self, norms: Sequence[float], memory: ArbiterMemory | None
    ) -> tuple[list[float], int, tuple[int, ...]]:
        """Running means after this step, the number of steps, and the last winners."""
        old = self.start(len(norms)) if memory is None else memory
        if len(old.averages) != len(norms):
            raise ValueError(
                f"memory must be that of {len(norms)} tasks, got one of {len(old.averages)}. Begin with None."
            )
        decay = self.ema_decay
        averages = [decay * a + (1.0 - decay) * n for a, n in zip(old.averages, norms, strict=True)]
        return averages, old.steps + 1, old.winners

    def _scores(
        self, stability: Sequence[float], strength: Sequence[float], i: int, j: int
    ) -> tuple[float, float]:
        """The arbiter's scores of the two tasks of a pair (equations 7 to 10)."""
        both = strength[i] + strength[j]
        share = strength[i] / both if both > 0 else 0.5
        first, second = self.arbiter_weights
        return (
            first * max(0.0, stability[i]) + second * share,
            first * max(0.0, stability[j]) + second * (1.0 - share),
        )

    def _winner(
        self, i: int, j: int, scores: tuple[float, float], winners: tuple[int, ...], slack: float
    ) -> tuple[int, int]:
        """Winner and loser of a pair: the one that did not win every recent conflict, else the higher score.

        Scores that rounding alone may tell apart are a tie, and a tie goes to the earlier task.
        """
        if self.dominance_window and len(winners) == self.dominance_window and len(set(winners)) == 1:
            if winners[0] == i:
                return j, i
            if winners[0] == j:
                return i, j
        return (j, i) if scores[1] > scores[0] + slack else (i, j)

    def _shares(self, cosine: float) -> tuple[tuple[float, float], bool]:
        """Shares of winner and loser, and whether an arbiter is called."""
        if self.smooth:
            return projection_shares(cosine, self.thresholds, self.power), True
        critical, main, _ = self.thresholds
        if cosine < critical:
            return (0.0, math.inf), True
        return ((0.0, 1.0), True) if cosine < main else ((1.0, 1.0), False)


class _Weights(Weighting[Tensor]):
    """TorchJD's form of the decision: from a matrix, or from its Gramian, to the weights of its rows."""

    def __init__(self, weights: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, stat: Tensor, /) -> Tensor:
        """Weights ``[tasks]`` of the rows."""
        return self._weights(stat)


# --- on the vectors in their span ----------------------------------------------------------------------------------


def _project(state: Span, winner: int, loser: int, share_w: float, share_l: float) -> None:
    """Project both off each other's old value by their shares; an infinite share sets the loser to zero."""
    inner = state.inner(winner, loser)
    gone = share_l == math.inf
    off_loser = -share_w * inner / state.inner(loser, loser)
    off_winner = 0.0 if gone else -share_l * inner / state.inner(winner, winner)
    state.combine(winner, loser, ((1.0, off_loser), (off_winner, 0.0 if gone else 1.0)))


# --- arguments -----------------------------------------------------------------------------------------------------


def _thresholds(value: object) -> tuple[float, float, float]:
    if not isinstance(value, Sequence) or len(value) != 3:
        raise ValueError(f"thresholds must be (critical, main, weak), got {value!r}. Use (-0.8, -0.5, 0.0).")
    critical, main, weak = (finite("thresholds", each) for each in value)
    if not -1.0 <= critical <= main <= weak <= 1.0:
        raise ValueError(f"thresholds must ascend within [-1, 1], got {value!r}. Use (-0.8, -0.5, 0.0).")
    return critical, main, weak


def _pair(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be (stability, strength), got {value!r}. Use (0.8, 0.2).")
    first, second = (non_negative(name, each) for each in value)
    if first + second == 0:
        raise ValueError(f"{name} must not both be 0, got {value!r}. Use (0.8, 0.2).")
    return first, second
