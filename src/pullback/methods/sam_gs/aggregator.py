"""SAM-GS as an aggregator of Jacobians (Borsani et al. 2025, arXiv:2506.06130)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torchjd import Stateful

from pullback.core.buffers import ExactBuffers
from pullback.core.checks import (
    NonFinite,
    NonFiniteError,
    choice,
    floating,
    fraction,
    integer,
    non_negative,
    positive,
)
from pullback.core.finite import admit
from pullback.core.kinds import Aggregator
from pullback.core.state import StateError, check_version
from pullback.methods.sam_gs.surgery import (
    equalised_,
    in_range,
    modulated_,
    pair_dissimilarities,
    pairwise_dissimilarity,
    row_norms,
    state_dtype,
)

Branch: TypeAlias = Literal["equalise", "momentum", "single", "skip"]
"""What a call did: rescaled gradients to their mean norm, weighed them by momentum, had one task, or was left out."""

_VERSION = 1
_POLICIES: tuple[NonFinite, ...] = ("raise", "skip")
_SCALARS = ("format_version", "steps", "dissimilarity", "reach")


@dataclass(frozen=True)
class SAMGSReport:
    """What the last call saw and did.

    Args:
        step: number of the call among those that counted, from 0.
        branch: what was done.
        similarity: mean magnitude similarity Psi of the variant, in [0, 1]; NaN where it was not measured.
        norms: Euclidean norm of every task's gradient.
    """

    step: int
    branch: Branch
    similarity: float
    norms: tuple[float, ...]


class _Plan(NamedTuple):
    """All numbers of one call, worked out before anything is changed."""

    branch: Literal["equalise", "momentum"]
    similarity: float
    dissimilarity: float  # h
    reach: float  # bound on the norm of every momentum
    weights: list[float]  # equalise
    g_scale: float  # momentum
    m_scale: float
    scale: float  # what the sum is multiplied by before clipping


@final
class SAMGS(ExactBuffers, Aggregator, Stateful):
    r"""Similarity-aware momentum gradient surgery: ``[tasks, parameters] -> [parameters]``.

    Rows are the tasks' gradients :math:`g_k` with respect to the shared parameters. Their magnitude similarity

    .. math:: \Psi = \operatorname{mean}_{i<j} \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2} \in [0, 1]

    chooses between two sums: below ``gamma`` all gradients are rescaled to their mean norm; otherwise each is
    multiplied, entry by entry, by the size of its own momentum and divided by the root of a running mean of
    :math:`(1 - \Psi)^2`. Momentum is kept up to date in both cases. The sum is then clipped, because the second one is
    of degree 2 in the gradients and would otherwise jump in size whenever the choice changes.

    Call it once per optimizer step, on gradients that are complete: accumulated over micro-batches, unscaled (loss
    scales do not cancel) and averaged over ranks. `multitask_backward` sees to all three.

    Args:
        num_tasks: refuse any other number of rows; None takes the number of the first call.
        gamma: threshold of the similarity: 0 never equalises, above 1 always. The paper's toys use 0.1, its networks
            0.7 to 0.9.
        beta1: decay of the momentum, in [0, 1).
        beta2: decay of the mean squared dissimilarity, in [0, 1).
        eps: ``"official"`` adds it to the running mean at every step, ``"paper"`` to the denominator.
        reduction: ``"mean"`` compares :math:`\Psi` with ``gamma``, ``"min"`` the least similar pair (the official
            code for reinforcement learning); the running mean always uses :math:`\Psi`.
        max_norm: largest norm of the result, as ``clip_grad_norm_`` clips; ``inf`` never clips; None is the variant's
            own, 1 or inf.
        variant: ``"official"`` is the authors' code, which gives their results: :math:`\Psi` over pairs i < j, a
            factor of the number of tasks, a clip at 1. ``"paper"`` is the algorithm as printed: :math:`\Psi` over all
            pairs with the diagonal (so at least 1/tasks), no factor, no clip.
        nonfinite: ``"raise"``, or ``"skip"``: nothing is changed, zeros are returned and `report` says ``"skip"``.

    Raises:
        TypeError, ValueError: if an argument makes no sense.

    Example:
        >>> jacobian = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
        >>> aggregator = SAMGS(gamma=0.9, max_norm=float("inf"))
        >>> aggregator(jacobian)  # 2 tasks x mean norm 2.75 x unit vectors (0.6, 0.8) and (0, 1)
        tensor([3.3000, 9.9000])
        >>> aggregator.report.branch
        'equalise'
    """

    momentum: Tensor

    def __init__(
        self,
        num_tasks: int | None = None,
        *,
        gamma: float = 0.7,
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-8,
        reduction: Literal["mean", "min"] = "mean",
        max_norm: float | None = None,
        variant: Literal["official", "paper"] = "official",
        nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        self.num_tasks = None if num_tasks is None else integer("num_tasks", num_tasks, minimum=1)
        self.gamma = non_negative("gamma", gamma, fix="Use 0 to never equalise.")
        self.beta1, self.beta2 = _decay("beta1", beta1), _decay("beta2", beta2)
        self.eps = positive("eps", eps)
        self.reduction = choice("reduction", reduction, ("mean", "min"))
        self.variant = choice("variant", variant, ("official", "paper"))
        if max_norm is None:
            max_norm = 1.0 if self.variant == "official" else math.inf
        unlimited = isinstance(max_norm, float) and max_norm == math.inf
        self.max_norm = (
            math.inf if unlimited else positive("max_norm", max_norm, fix="Use inf to never clip.")
        )
        self.nonfinite: NonFinite = choice("nonfinite", nonfinite, _POLICIES)
        self.register_buffer("momentum", torch.zeros(0, 0))
        self.report: SAMGSReport | None = None
        self.steps, self._dissimilarity, self._reach = 0, 0.0, 0.0

    # --- a call --------------------------------------

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Aggregate the gradients; reads their norms from the device once.

        Args:
            matrix: [tasks, parameters] of a floating dtype; sums and momentum are in float32, or float64 for float64.

        Returns:
            [parameters], in the dtype of ``matrix``.

        Raises:
            TypeError: if ``matrix`` is no dense floating tensor.
            ValueError: if its shape or dtype does not fit the momentum.
            NonFiniteError: if ``nonfinite="raise"`` and there is NaN or Inf, or an unclipped result would overflow.
        """
        self._check(matrix)
        norms = row_norms(matrix)
        if len(norms) == 1:
            return self._single(matrix, norms)
        finite = all(map(math.isfinite, norms))
        plan = self._plan(norms, matrix.dtype) if finite else None
        if plan is None:
            return self._leave_out(matrix, norms)
        if self.momentum.shape != matrix.shape:
            self.momentum = torch.zeros(matrix.shape, dtype=state_dtype(matrix.dtype), device=matrix.device)
        elif self.momentum.device != matrix.device:  # a state that was loaded before it was moved
            self.momentum = self.momentum.to(matrix.device)
        if plan.branch == "equalise":
            out = equalised_(matrix, self.momentum, self.beta1, plan.weights)
        else:
            out = modulated_(matrix, self.momentum, self.beta1, plan.g_scale, plan.m_scale)
        self.report = SAMGSReport(self.steps, plan.branch, plan.similarity, tuple(norms))
        self.steps, self._dissimilarity, self._reach = self.steps + 1, plan.dissimilarity, plan.reach
        return self._clipped_(out, plan.scale).to(matrix.dtype)

    def _plan(self, norms: list[float], dtype: torch.dtype) -> _Plan | None:
        """All numbers of a call; None where the result could overflow."""
        pairs = pair_dissimilarities(norms)
        tasks, official = len(norms), self.variant == "official"
        apart = min(1.0, 2.0 * sum(pairs) / (tasks * (tasks - 1) if official else tasks * tasks))
        h = self.beta2 * self._dissimilarity + (1.0 - self.beta2) * apart**2 + (self.eps if official else 0.0)
        largest, factor = max(norms), float(tasks) if official else 1.0
        reach = self.beta1 * self._reach + (1.0 - self.beta1) * largest
        tested = apart if self.reduction == "mean" else max(pairs)
        info = torch.finfo(state_dtype(dtype))
        if 1.0 - tested < self.gamma:
            unit = largest or 1.0
            mean = sum(size / unit for size in norms) / tasks
            weights = [mean / size if size > 0.0 else 0.0 for size in norms]
            if self.max_norm == math.inf and factor * mean * largest * tasks > info.max:
                return None
            return _Plan("equalise", 1.0 - apart, h, reach, weights, 1.0, 1.0, min(factor * unit, info.max))
        root = math.sqrt(h / (1.0 - self.beta2 ** (self.steps + 1)))
        scale = factor / ((1.0 - self.beta1 ** (self.steps + 1)) * (root if official else root + self.eps))
        g_scale, m_scale = in_range(largest, reach, info)
        scale /= g_scale * m_scale
        if self.max_norm == math.inf and scale * tasks * (largest * g_scale) * (reach * m_scale) > info.max:
            return None
        return _Plan("momentum", 1.0 - apart, h, reach, [], g_scale, m_scale, min(scale, info.max))

    def _clipped_(self, out: Tensor, scale: float) -> Tensor:
        """``scale * out``, shortened to ``max_norm`` as ``clip_grad_norm_`` does; nothing is read by the host."""
        if self.max_norm == math.inf or scale == 0.0:
            return out.mul_(scale)
        norm = torch.dot(out, out).sqrt()
        # scale * min(1, max_norm / (scale * norm + 1e-6)), in a form in which no product overflows
        return out.mul_((self.max_norm / (norm + 1e-6 / scale)).clamp(max=scale))

    # --- what is no ordinary call ------------------------------

    def _check(self, matrix: Tensor) -> None:
        floating("matrix", matrix, ndim=2)
        if hasattr(matrix, "placements") or matrix.layout is not torch.strided:
            raise TypeError(
                f"matrix must be a dense tensor on one device, got {type(matrix).__name__} of layout "
                f"{matrix.layout}. Gather sharded gradients, convert sparse ones with .to_dense()."
            )
        tasks, size = matrix.shape
        if tasks == 0 or size == 0:
            raise ValueError(
                f"matrix must have at least one row and one column, got shape {tuple(matrix.shape)}."
            )
        wanted = self.num_tasks if len(self.momentum) == 0 else len(self.momentum)
        if wanted is not None and tasks != wanted:
            raise ValueError(
                f"matrix must have {wanted} rows, one per task, got {tasks}. Give a missing task a zero gradient, "
                "or call reset() when the set of tasks has changed."
            )
        if len(self.momentum) and size != self.momentum.shape[1]:
            raise ValueError(
                f"matrix must have {self.momentum.shape[1]} columns as at the first call, got {size}. "
                "Call reset() when the set of shared parameters has changed."
            )
        if len(self.momentum) and state_dtype(matrix.dtype) != self.momentum.dtype:
            raise ValueError(
                f"matrix must have a dtype whose momentum is kept in {self.momentum.dtype}, got {matrix.dtype}. "
                "Call reset() when the dtype of the model has changed."
            )

    def _single(self, matrix: Tensor, norms: list[float]) -> Tensor:
        if not math.isfinite(norms[0]):
            return self._leave_out(matrix, norms)
        warnings.warn(
            "SAMGS: matrix has a single row, so there is no similarity to measure; it is returned as it is, "
            "unclipped. For one task call loss.backward().",
            RuntimeWarning,
            stacklevel=7,
        )
        self.report = SAMGSReport(self.steps, "single", math.nan, tuple(norms))
        return matrix[0].clone()

    def _leave_out(self, matrix: Tensor, norms: list[float]) -> Tensor:
        """Refuse gradients that are not finite or too large, or leave the call out."""
        names = [f"task {k}" for k in range(len(matrix))]
        fine = admit(list(matrix), names, policy=self.nonfinite, owner="SAMGS", step=self.steps)
        if fine and self.nonfinite == "raise":
            raise NonFiniteError(
                f"SAMGS, step {self.steps}: gradients of norm {max(norms):.3g} give a result beyond the range of "
                f"{state_dtype(matrix.dtype)} (momentum makes it quadratic). Set max_norm, or scale the losses."
            )
        self.report = SAMGSReport(self.steps, "skip", math.nan, tuple(norms))
        return matrix.new_zeros(matrix.shape[1])

    # --- diagnosis -------------------------------

    @torch.no_grad()
    def similarity_matrix(self, matrix: Tensor) -> Tensor:
        r"""Magnitude similarity :math:`2 \|g_i\| \|g_j\| / (\|g_i\|^2 + \|g_j\|^2)` of every pair; changes nothing.

        Args:
            matrix: gradients [tasks, parameters].

        Returns:
            [tasks, tasks], symmetric, in [0, 1], ones on the diagonal; 1 for two zero gradients, 0 for one. In
            float32, or float64 for float64.

        Raises:
            TypeError: if ``matrix`` is no floating tensor.
            ValueError: if it is no matrix with at least one row and one column.
        """
        floating("matrix", matrix, ndim=2)
        if not matrix.numel():
            raise ValueError(f"matrix must have at least one row and one column, got {tuple(matrix.shape)}.")
        norms = torch.tensor(row_norms(matrix), dtype=torch.float64)
        return (1.0 - pairwise_dissimilarity(norms)).to(matrix.device, state_dtype(matrix.dtype))

    # --- state ---------------------------------

    def reset(self) -> None:
        """Forget momentum, dissimilarity and the number of steps."""
        self.momentum = torch.zeros(0, 0, device=self.momentum.device)
        self.steps, self._dissimilarity, self._reach, self.report = 0, 0.0, 0.0, None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "dissimilarity"] = torch.tensor(self._dissimilarity, dtype=torch.float64)
        destination[prefix + "reach"] = torch.tensor(self._reach, dtype=torch.float64)
        destination[prefix + "steps"] = torch.tensor(self.steps)
        destination[prefix + "format_version"] = torch.tensor(_VERSION)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check everything first, so that a state that does not fit changes nothing."""
        del local_metadata  # part of torch's signature
        known = ("momentum", *_SCALARS)
        missing = [prefix + name for name in known if prefix + name not in state_dict]
        unknown = [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in known]
        missing_keys.extend(missing)
        if strict:
            unexpected_keys.extend(unknown)
        if missing or (strict and unknown):
            return
        try:
            momentum, numbers = self._admitted({name: state_dict[prefix + name] for name in known})
        except StateError as error:
            error_msgs.append(str(error))
            return
        self.momentum = momentum.to(self.momentum.device, copy=True)
        self.steps, self._dissimilarity, self._reach = int(numbers[0]), numbers[1], numbers[2]
        self.report = None

    def _admitted(self, state: dict[str, Any]) -> tuple[Tensor, tuple[float, float, float]]:
        """Momentum and numbers of a state that fits.

        Raises:
            StateError: if it does not.
        """
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() != (2 if name == "momentum" else 0):
                raise StateError(f"SAMGS.{name} must be a tensor as state_dict() gives it, got {value!r}.")
        check_version("SAMGS", {"format_version": int(state["format_version"])}, _VERSION)
        momentum = state["momentum"]
        if momentum.dtype not in (torch.float32, torch.float64):
            raise StateError(
                f"SAMGS.momentum must be float32 or float64, got {momentum.dtype}. Save the state without casting it."
            )
        if len(momentum) and self.num_tasks not in (None, len(momentum)):
            raise StateError(
                f"SAMGS.momentum must have {self.num_tasks} rows as num_tasks says, got {len(momentum)}."
            )
        steps, h, reach = (float(state[name]) for name in ("steps", "dissimilarity", "reach"))
        if not (steps >= 0 and h >= 0.0 and reach >= 0.0) or (steps > 0) != (len(momentum) > 0):
            raise StateError(
                f"SAMGS: the state must be consistent, got steps={steps:g}, dissimilarity={h:g}, reach={reach:g} and "
                f"momentum of shape {tuple(momentum.shape)}. Pass what state_dict() returned."
            )
        return momentum, (steps, h, reach)

    def __repr__(self) -> str:
        return (
            f"SAMGS(gamma={self.gamma:g}, beta1={self.beta1:g}, beta2={self.beta2:g}, "
            f"max_norm={self.max_norm:g}, variant={self.variant!r})"
        )


def _decay(name: str, value: object) -> float:
    beta = fraction(name, value, fix="Use 0 for no memory.")
    if beta == 1.0:
        raise ValueError(f"{name} must be < 1, got {value!r}. At 1 nothing new would ever enter.")
    return beta
