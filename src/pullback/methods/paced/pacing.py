"""Weights at the frontier of a student's competence: the Beta kernel, and pass rates to feed it (arXiv:2603.11178)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pullback.core.checks import (
    NON_FINITE_POLICIES,
    NonFinite,
    NonFiniteError,
    choice,
    floating,
    instance,
    integer,
    non_negative,
)
from pullback.core.kinds import Objective
from pullback.core.state import check_state

_PER_EXAMPLE = "Use a loss with reduction='none', so that each example has one."
_BEFORE = "It is the size of the batch before examples were left out."
NEVER = -1  # the step at which a problem that was never measured was measured

# --- weights -------------------------------------------------------------------------------------------------------


class BetaKernel(Objective):
    r"""Weights :math:`w(p) = p^\alpha (1 - p)^\beta` of competences p, and losses weighted by them (paper eq. 3).

    ``kernel(rate)`` gives the weights. ``kernel(rate, loss, ids)`` gives the weighted loss of a batch:
    :math:`\frac{1}{B} \sum_b w(p_b) L_b / \bar w`. Weights are constants of the gradient. Any loss per example and
    any competence per example in [0, 1] will do; the paper's are a distillation loss and a pass rate.

    A rate of NaN means *unknown* (no verifier, never measured): such an example gets the mean weight of the known
    ones, and weight 1 where none is known. A call whose weights are all zero gives zero with zero gradients and is
    counted in ``empty``; leave such steps out with `active`, because an optimizer with momentum or weight decay moves
    even without gradients. Where nothing in the pool has a weight (all solved, or out of reach) it warns, once.

    Args:
        alpha: exponent of p, >= 0; 0 with ``beta=0`` weighs all alike (0^0 is 1).
        beta: exponent of 1 - p, >= 0. The largest weight is at alpha / (alpha + beta).
        normalize: what :math:`\bar w` is. ``"pool-mean"``: the mean weight of the whole pool, so that neither the
            composition of a batch nor its split for accumulation matters (the pool's rates must be equal on all
            ranks, see `PassRateTracker.synchronize`). ``"batch-mean"``: of the batch, over all ranks; give the whole
            batch at once. ``"none"``: 1, which shrinks the loss to less than a quarter with the default exponents.
        reduction: ``"mean"`` over the batch, ``"sum"`` (divide by a global count yourself), or ``"none"``.
        nonfinite: what to do when the weighted loss is NaN or Inf: ``"raise"``, ``"skip"`` (a zero without gradient;
            not under DDP, where ranks would disagree) or ``"warn"``. Losses of weight zero do not count.
        group: process group of ``"batch-mean"``; None: the default one, if there is one.

    Raises:
        TypeError: if an exponent is no number.
        ValueError: if an exponent is negative or not finite, or an option is unknown.

    Example:
        >>> kernel = BetaKernel(normalize="none")
        >>> kernel(torch.tensor([0.0, 0.125, 0.5, 1.0]))
        tensor([0.0000, 0.1094, 0.2500, 0.0000])
    """

    empty: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        *,
        normalize: Literal["pool-mean", "batch-mean", "none"] = "pool-mean",
        reduction: Literal["mean", "sum", "none"] = "mean",
        nonfinite: NonFinite = "raise",
        group: Any = None,
    ) -> None:
        super().__init__()
        self.alpha = non_negative("alpha", alpha, fix="Use 0 to leave that side unweighted.")
        self.beta = non_negative("beta", beta, fix="Use 0 to leave that side unweighted.")
        self.normalize = choice("normalize", normalize, ("pool-mean", "batch-mean", "none"))
        self.reduction = choice("reduction", reduction, ("mean", "sum", "none"))
        self.nonfinite = choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
        self.group = group
        self.register_buffer("empty", torch.tensor(0))
        self._warned = False

    def forward(
        self,
        rate: Tensor,
        loss: Tensor | None = None,
        ids: Tensor | None = None,
        *,
        count: int | None = None,
    ) -> Tensor:
        """Weights, or the weighted loss.

        Reads the device once a call: rates out of range, weights all zero, a loss that is not finite. Inside a
        compiled region or a ``torch.func`` transform nothing is read, checked or counted.

        Args:
            rate: competences in [0, 1] or NaN. With ``ids``: [pool], of the whole pool; without: [n], of the
                examples at hand.
            loss: losses [n], one per example of the batch; None: return weights.
            ids: which entries of ``rate`` the losses belong to [n]; needed with ``"pool-mean"``.
            count: number of examples that the batch had before those of weight zero were left out (see `active`).

        Returns:
            Weights as ``rate`` is shaped, float32 (float64 for float64 rates), without gradient; or the weighted
            loss, 0-dim ([n] with ``reduction="none"``).

        Raises:
            TypeError: if a tensor is of a wrong dtype.
            ValueError: if a rate lies outside [0, 1], shapes do not fit, or the batch is empty.
            NonFiniteError: if the loss is NaN or Inf and ``nonfinite="raise"``.
        """
        rate = floating("rate", rate, ndim=1, fix="Pass one competence per example.").detach()
        n = len(rate if loss is None else floating("loss", loss, ndim=1, fix=_PER_EXAMPLE))
        size = n if count is None else integer("count", count, minimum=max(n, 1), fix=_BEFORE)
        raw = self._raw(rate)
        if loss is None:
            weights = self._normalized(raw, size - n)
            return self._watch(rate, raw, weights, weights)
        if not size:
            raise ValueError(
                "loss must hold at least one example, got none. Leave the step out, or pass count=."
            )
        weights = self._batch_weights(raw, loss, ids, size - n)
        terms = torch.where(weights != 0, weights * loss, 0)  # a loss of weight zero may be anything
        total = terms if self.reduction == "none" else terms.sum()
        return self._watch(rate, raw, weights, total / size if self.reduction == "mean" else total)

    def active(self, rate: Tensor, ids: Tensor | None = None, *, least: int = 0) -> Tensor:
        """Examples whose weight is not zero; leaving out the others is exact, and cheaper.

        Args:
            rate: competences [pool] in [0, 1] or NaN.
            ids: positions [n] of the batch in the pool; None: all of it.
            least: keep at least so many examples, of weight zero if need be: 1 under DDP, where every rank must
                run the backward pass, 0 in one process.

        Returns:
            Those of ``ids`` that are kept, in their order. Reads the device, as all indices of unknown length do.

        Raises:
            ValueError: if a rate lies outside [0, 1] or ``least`` is negative.
        """
        rate = floating("rate", rate, ndim=1).detach()
        wanted = integer("least", least, minimum=0)
        ids = torch.arange(len(rate), device=rate.device) if ids is None else _ids(ids).to(rate.device)
        raw = self._raw(rate)
        kept = (raw != 0)[ids]  # also true for NaN
        self._watch(rate, raw, kept | bool(wanted), kept)
        if wanted:  # of those without a weight, the first few
            kept |= ~kept & ((~kept).cumsum(0) <= wanted - kept.sum())
        return ids[kept]

    def extra_repr(self) -> str:
        """Exponents and options."""
        return f"alpha={self.alpha:g}, beta={self.beta:g}, normalize={self.normalize!r}, reduction={self.reduction!r}"

    def _raw(self, rate: Tensor) -> Tensor:
        """Weights before the normaliser, NaN where unknown."""
        p = rate if rate.dtype == torch.float64 else rate.float()
        return torch.where(p.isnan(), torch.nan, p.pow(self.alpha) * (1 - p).pow(self.beta))

    def _normalized(self, raw: Tensor, left_out: int) -> Tensor:
        """Weights [n]; their mean is over as many more examples of weight zero as were left out."""
        known = ~raw.isnan()
        total, number = raw.nansum(), known.sum() + left_out
        if self.normalize == "batch-mean" and dist.is_available() and dist.is_initialized():
            both = torch.stack([total, number.to(total.dtype)])
            dist.all_reduce(both, group=self.group)
            total, number = both
        mean = torch.where(number > 0, total / number.clamp(min=1), 1)
        if self.normalize == "none":
            return torch.where(known, raw, mean)
        return torch.where(mean > 0, torch.where(known, raw / mean, 1), 0)

    def _batch_weights(self, raw: Tensor, loss: Tensor, ids: Tensor | None, left_out: int) -> Tensor:
        if ids is not None:
            ids = _ids(ids).to(raw.device)
            batch = self.normalize == "batch-mean"
            weights = self._normalized(raw[ids], left_out) if batch else self._normalized(raw, 0)[ids]
        elif self.normalize == "pool-mean":
            raise ValueError(
                "ids must be given with normalize='pool-mean', got None. Pass the rates of the whole pool and "
                "the ids of the batch, or use normalize='batch-mean'."
            )
        else:
            weights = self._normalized(raw, left_out)
        if weights.shape != loss.shape:
            raise ValueError(
                f"loss must hold one value per weight, got {len(loss)} for {len(weights)}. {_PER_EXAMPLE}"
            )
        return weights.to(loss.device, torch.promote_types(loss.dtype, torch.float32))

    def _watch(self, rate: Tensor, raw: Tensor, weights: Tensor, result: Tensor) -> Tensor:
        """Check the rates and what came of them in one read; count batches, warn of pools without a weight."""
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return result
        flags = [
            ((rate < 0) | (rate > 1)).any(),
            ~weights.any(),
            ~raw.nan_to_num().any() & ~raw.isnan().all(),
            result.detach().isfinite().all(),
        ]
        outside, nothing, exhausted, fine = torch.stack([flag.to(result.device) for flag in flags]).tolist()
        if outside:
            bad = rate[(rate < 0) | (rate > 1)][0]
            raise ValueError(
                f"rate must lie in [0, 1], got {float(bad):g}. Divide passes by tries; NaN stands for unknown."
            )
        if nothing and len(weights):
            self.empty.add_(1)
        if exhausted and not self._warned:
            self._warned = True
            warnings.warn(
                "BetaKernel: every weight is zero, because all examples are solved or out of reach. Leave such steps "
                "out, refresh the rates, or smooth them. Counted in .empty, warned once.",
                RuntimeWarning,
                stacklevel=5 if weights.dtype != torch.bool else 3,
            )
        return result if fine else self._not_finite(result)

    def _not_finite(self, total: Tensor) -> Tensor:
        text = "BetaKernel: the weighted loss is NaN or Inf. Lower the learning rate, or look at the losses"
        if self.nonfinite == "raise":
            raise NonFiniteError(f"{text}; nonfinite='skip' leaves such batches out.")
        if self.nonfinite == "skip":
            return torch.zeros_like(total, requires_grad=total.requires_grad)
        warnings.warn(f"{text}. It is returned because nonfinite='warn'.", RuntimeWarning, stacklevel=6)
        return total


def _ids(ids: Tensor) -> Tensor:
    instance("ids", ids, Tensor, fix="Pass positions in the pool as an integer tensor.")
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1:
        raise TypeError(
            f"ids must be a 1-dim integer tensor, got shape {tuple(ids.shape)} and dtype {ids.dtype}. "
            "Pass positions in the pool."
        )
    return ids


# --- pass rates ----------------------------------------------------------------------------------------------------


class PassRateTracker:
    """Pass rates of a pool of problems, from rewards of any sampler.

    For each problem it keeps passes, tries and the step at which they were measured. Only the newest measurement
    counts: a later call replaces it, unless it says that it is older (from a slow sampler). It knows nothing of
    models and never enters a graph.

    Args:
        num_problems: size of the pool.
        k: rollouts per problem and measurement. One rollout says 0 or 1, so that a `BetaKernel` gives weight zero
            to everything: ``k=1`` is refused without smoothing.
        smoothing: s >= 0 of the estimator (passes + s) / (tries + 2 s). 0 is the raw rate; 1 the posterior mean
            under a uniform prior, which is never 0 or 1.
        device: where the counts live.

    Raises:
        TypeError: if a number is of a wrong type.
        ValueError: if a number is out of its range, or ``k=1`` comes without smoothing.

    Example:
        >>> tracker = PassRateTracker(num_problems=3, k=4)
        >>> tracker.update(torch.tensor([2, 0]), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]))
        >>> tracker.rate
        tensor([1.0000,    nan, 0.2500])
    """

    format_version = 1

    def __init__(
        self, num_problems: int, k: int = 8, *, smoothing: float = 0.0, device: torch.device | str = "cpu"
    ) -> None:
        self.num_problems = integer("num_problems", num_problems, minimum=1)
        self.k = integer("k", k, minimum=1)
        self.smoothing = non_negative("smoothing", smoothing)
        if self.k == 1 and self.smoothing == 0:
            raise ValueError(
                "k must be >= 2 without smoothing, got 1. A single rollout says 0 or 1, and both have weight zero: "
                "use more rollouts, or smoothing=1."
            )
        self.passes = torch.zeros(self.num_problems, device=device)
        self.tries = torch.zeros(self.num_problems, device=device)
        self.measured_at = torch.full((self.num_problems,), NEVER, device=device)
        self.fresh = torch.zeros(self.num_problems, dtype=torch.bool, device=device)
        self.clock = 0

    @property
    def rate(self) -> Tensor:
        """Estimated pass rates [num_problems], float32 in [0, 1]; NaN where nothing was measured."""
        estimate = (self.passes + self.smoothing) / (self.tries + 2 * self.smoothing)
        return torch.where(self.tries > 0, estimate, torch.nan)

    def update(self, ids: Tensor, rewards: Tensor, *, step: int | None = None) -> None:
        """Take in the rewards of rollouts.

        Args:
            ids: problems [n]; one that occurs twice gets all its tries.
            rewards: [n, k], bool or numbers: 1 passed, 0 failed, between them partly right, NaN no verdict (a try that
                does not count; a problem with nothing but NaN becomes unknown).
            step: training step at which the student answered; None: one more than the newest so far.

        Raises:
            TypeError: if a tensor is of a wrong dtype.
            ValueError: if an id or reward is out of range or shapes do not fit; nothing is taken in then.
        """
        ids = _ids(ids).to(self.passes.device, torch.int64)
        scores = instance("rewards", rewards, Tensor).to(self.passes)
        if scores.shape != (len(ids), self.k):
            raise ValueError(
                f"rewards must be of shape {(len(ids), self.k)}, got {tuple(rewards.shape)}. "
                "Fill missing tries with NaN."
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_problems:
            raise ValueError(
                f"ids must lie in [0, {self.num_problems}), got {int(ids.min())} to {int(ids.max())}. "
                "Number the problems of the pool from 0."
            )
        if bool(((scores < 0) | (scores > 1)).any()):
            raise ValueError(
                f"rewards must lie in [0, 1], got {float(scores.min()):g} to {float(scores.max()):g}. Pass 1 for right."
            )
        now = self.clock + 1 if step is None else integer("step", step, minimum=0)
        passes, tries = torch.zeros_like(self.passes), torch.zeros_like(self.tries)
        passes.index_add_(0, ids, scores.nan_to_num(0.0).sum(1))
        tries.index_add_(0, ids, (~scores.isnan()).to(tries).sum(1))
        touched = torch.zeros_like(self.fresh)
        touched[ids] = True
        taken = touched & (self.measured_at <= now)
        self.passes = torch.where(taken, passes, self.passes)
        self.tries = torch.where(taken, tries, self.tries)
        self.measured_at = torch.where(taken, now, self.measured_at)
        self.fresh |= taken
        self.clock = max(self.clock, now)

    def stale(self, step: int, max_age: int) -> Tensor:
        """Problems that were never measured or whose measurement is older than ``max_age`` steps at ``step``.

        Returns:
            Their ids, ascending.

        Raises:
            TypeError: if an argument is no integer.
            ValueError: if an argument is negative.
        """
        oldest = integer("step", step, minimum=0) - integer("max_age", max_age, minimum=0)
        return ((self.measured_at == NEVER) | (self.measured_at < oldest)).nonzero().squeeze(1)

    def synchronize(self, group: Any = None) -> None:
        """Put together what all ranks have measured since the last call, so that all hold the same rates.

        Every rank of ``group`` (None: the default one) must call it. The newest measurement of a problem counts;
        equally new ones add up. In one process it does nothing but forget what was new.

        """
        if dist.is_available() and dist.is_initialized():
            measured = torch.where(self.fresh, self.measured_at, NEVER)
            newest = torch.cat([measured, measured.new_tensor([self.clock])])
            dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=group)
            newest, self.clock = newest[:-1], int(newest[-1])
            mine = self.fresh & (measured == newest)
            counts = torch.stack([self.passes, self.tries]) * mine
            dist.all_reduce(counts, group=group)
            given = newest > NEVER
            self.passes = torch.where(given, counts[0], self.passes)
            self.tries = torch.where(given, counts[1], self.tries)
            self.measured_at = torch.where(given, newest, self.measured_at)
        self.fresh.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Counts, steps and clock, as copies; ``k`` and ``smoothing`` are settings, not state."""
        kept = {name: getattr(self, name).clone() for name in _STATE}
        return {"format_version": self.format_version, "clock": self.clock, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict`, or nothing of it when any part does not fit.

        Raises:
            StateError: if a key is missing, unknown or of another type or shape, or the version is newer.
        """
        check_state("PassRateTracker", state, self.state_dict(), version=self.format_version)
        for name in _STATE:
            getattr(self, name).copy_(state[name])
        self.clock = int(state["clock"])

    def __repr__(self) -> str:
        known = int((self.tries > 0).sum())
        settings = f"num_problems={self.num_problems}, k={self.k}, smoothing={self.smoothing:g}"
        return f"PassRateTracker({settings}, known={known})"


_STATE = ("passes", "tries", "measured_at", "fresh")
