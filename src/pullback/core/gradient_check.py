"""Is a gradient estimator right, and how fast does its error vanish with its step size?

For estimators that approach a gradient as a size goes to 0 (finite differences, contrasts of two equilibria, truncated
solvers): relative errors against the exact gradient and the fitted order, the slope of log error against log size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pullback.core.checks import fraction, positive, shown

Gradient: TypeAlias = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]
"""A gradient in one piece, as a sequence, or by name; None stands for zero."""

ROUNDING = 64.0
"""An error below this many roundings over the size is taken for rounding and not fitted."""


@dataclass(frozen=True)
class EstimatorOrder:
    """What one estimator's errors say.

    Args:
        name: the estimator's name.
        sizes: step sizes, largest first, in the estimator's own unit.
        errors: Euclidean norm of (estimate - exact) over that of the exact gradient, at every size; infinite where
            the estimate holds NaN or Inf.
        cosines: cosine between estimate and exact gradient.
        used: whether a size took part in the fit: its error lies below the ceiling and above rounding, and falls.
        order: slope of log error against log size over those sizes by least squares; NaN when fewer than two are left.
    """

    name: str
    sizes: tuple[float, ...]
    errors: tuple[float, ...]
    cosines: tuple[float, ...]
    used: tuple[bool, ...]
    order: float


@dataclass(frozen=True)
class GradientCheck:
    """The outcome of `check_gradient`; printing it gives a table.

    Args:
        rows: one for each estimator.
        norm: Euclidean norm of the exact gradient.
    """

    rows: tuple[EstimatorOrder, ...]
    norm: float

    def __getitem__(self, name: str) -> EstimatorOrder:
        """The row of one estimator.

        Raises:
            KeyError: if there is none of this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"name must be one of {', '.join(r.name for r in self.rows)}, got {name!r}.")

    def __str__(self) -> str:
        sizes = self.rows[0].sizes
        width = max(len("estimator"), *(len(row.name) for row in self.rows))
        head = f"{'estimator':<{width}}  {'order':>6}" + "".join(f"{size:>11.4g}" for size in sizes)
        lines = [f"relative error against the exact gradient (norm {self.norm:.4g}) by size", head]
        for row in self.rows:
            marks = [
                f"{error:>10.2e}{' ' if used else '*'}"
                for error, used in zip(row.errors, row.used, strict=True)
            ]
            lines.append(f"{row.name:<{width}}  {row.order:>6.2f}" + "".join(marks))
        if not all(used for row in self.rows for used in row.used):
            lines.append("* not fitted: lost (error above the ceiling), not falling, or down to rounding")
        return "\n".join(lines)


def check_gradient(
    estimators: Callable[[float], Gradient] | Mapping[str, Callable[[float], Gradient]],
    exact: Gradient,
    sizes: Iterable[float],
    *,
    ceiling: float = 0.3,
) -> GradientCheck:
    """Compare gradient estimators with the exact gradient at several step sizes and fit their orders.

    Args:
        estimators: ``estimate(size) -> gradient``, or several by name; each gradient in the form of ``exact``.
        exact: the exact gradient: a tensor, a sequence, or a mapping of names.
        sizes: at least two distinct positive step sizes.
        ceiling: relative error from which an estimate counts as lost and is not fitted, at most 1.

    Returns:
        Relative errors, cosines and fitted orders.

    Raises:
        TypeError: if an estimate has another form or other shapes than ``exact``.
        ValueError: if fewer than two sizes are given, or the exact gradient is zero or not finite.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.3, 1.1], dtype=torch.float64)
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> forward = lambda h: torch.stack([((x + h * e).sin() - x.sin()).sum() / h for e in one])
        >>> central = lambda h: torch.stack([((x + h * e).sin() - (x - h * e).sin()).sum() / (2 * h) for e in one])
        >>> found = check_gradient({"forward": forward, "central": central}, x.cos(), (0.1, 0.05, 0.025))
        >>> [round(row.order, 1) for row in found.rows]
        [1.0, 2.0]
    """
    named = {"estimator": estimators} if callable(estimators) else dict(estimators)
    if not named:
        raise ValueError(
            "estimators must hold at least one function, got none. Pass estimate or {name: estimate}."
        )
    steps = sorted({positive("sizes", size) for size in sizes}, reverse=True)
    if len(steps) < 2:
        raise ValueError(
            f"sizes must hold two distinct numbers or more, got {steps}. Pass (0.1, 0.05, 0.025)."
        )
    limit = fraction("ceiling", ceiling)
    wanted = _pieces("exact", exact)
    reference = _flat(wanted, wanted)
    norm = float(reference.norm())
    if not math.isfinite(norm) or norm == 0.0:
        raise ValueError(
            f"exact must be a finite gradient that is not zero, got norm {norm}. Relative errors need one: take "
            "another point or batch."
        )
    eps = max(
        (
            torch.finfo(each.dtype).eps
            for each in wanted.values()
            if each is not None and each.is_floating_point()
        ),
        default=torch.finfo(torch.float64).eps,
    )
    rows = []
    for name, estimate in named.items():
        found = [_flat(_pieces(name, estimate(size)), wanted, name) for size in steps]
        errors = [_finite(float((each - reference).norm()) / norm) for each in found]
        cosines = [float(each @ reference) / (float(each.norm()) * norm or math.nan) for each in found]
        used = _usable(steps, errors, limit, eps)
        order = _slope([row for row, use in zip(zip(steps, errors, strict=True), used, strict=True) if use])
        rows.append(EstimatorOrder(name, tuple(steps), tuple(errors), tuple(cosines), tuple(used), order))
    return GradientCheck(tuple(rows), norm)


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def _usable(sizes: Sequence[float], errors: Sequence[float], ceiling: float, eps: float) -> list[bool]:
    """From the first size below the ceiling on, as long as errors fall and are more than rounding."""
    used, last = [], math.inf
    for size, error in zip(sizes, errors, strict=True):
        good = error < min(ceiling, last) and error > ROUNDING * eps / size
        used.append(good)
        if error < ceiling:
            last = error if good else -math.inf  # after the first one that does not fall, none is trusted
    return used


def _slope(points: Sequence[tuple[float, float]]) -> float:
    if len(points) < 2:
        return math.nan
    logs = [(math.log(size), math.log(error)) for size, error in points]
    mx, my = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def _pieces(name: str, gradient: Any) -> dict[Any, Tensor | None]:
    if isinstance(gradient, Tensor):
        return {0: gradient}
    rows = gradient if isinstance(gradient, Mapping) else None
    if rows is None and isinstance(gradient, Sequence) and not isinstance(gradient, str):
        rows = dict(enumerate(gradient))
    if rows is None or not all(each is None or isinstance(each, Tensor) for each in rows.values()):
        raise TypeError(
            f"{name} must give a tensor, a sequence or a mapping of tensors, got {shown(gradient)}. "
            "Return [p.grad for p in parameters]."
        )
    return dict(rows)


def _flat(
    pieces: Mapping[Any, Tensor | None], like: Mapping[Any, Tensor | None], name: str = "exact"
) -> Tensor:
    """All pieces in float64 in one row, in the order of ``like``; None as zeros."""
    if set(pieces) != set(like):
        raise TypeError(
            f"{name} must give the pieces {list(like)}, got {list(pieces)}. Return them in the form of exact."
        )
    parts = []
    for key, other in like.items():
        one = pieces[key]
        model = one if one is not None else other
        if model is None:
            continue
        if one is not None and other is not None and one.shape != other.shape:
            raise TypeError(
                f"{name}[{key!r}] must have shape {tuple(other.shape)}, got {tuple(one.shape)}. "
                "Return it in the form of exact."
            )
        part = torch.zeros_like(model) if one is None else one
        parts.append(part.detach().to("cpu").double().reshape(-1))
    return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64)
