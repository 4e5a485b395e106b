"""What is reported of a layer: bias shift of the plain and the unit natural step, their angle, theorem 2's k."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.checks import instance
from pullback.core.layer_signals import Signal
from pullback.core.streams import generator
from pullback.core.weighted_gram import Solved, WeightedGrams

# --- reports ----------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("mean ratio", "mean_ratio"),
    ("|mean|", "median_abs_mean"),
    ("shift", "shift_fraction"),
    ("natural", "shift_fraction_natural"),
    ("cos", "cos_natural"),
    ("k", "k"),
    ("dead", "dead_fraction"),
)


@dataclass(frozen=True)
class LayerShift:
    """One layer. "Incoming" are the activations that its units see; medians are over solved units unless it is said.

    Args:
        mean_activation: mean of all incoming activations.
        median_activation: median over incoming activations of their mean over the rows (appendix C of the paper).
        median_abs_mean: median over them of the absolute value of that mean.
        mean_ratio: ``||E a|| / sqrt(E ||a||^2)``, in [0, 1]; 0 for centred activations.
        shift_fraction: (E dz)^2 / E dz^2 of the plain gradient step, in [0, 1], over all units that get a gradient: the
            part of the change of a pre-activation that is the same for all inputs.
        shift_fraction_natural: the same of the unit natural gradient.
        cos_natural: cosine between the gradient and the unit natural gradient over (w, w0).
        k: multiplier of theorem 2: the natural gradient subtracts k E_q[a] from the mean of the incoming activations; 1
            where delta^2 is independent of a. NaN for a layer without bias.
        s: 1 / (c - b^T A^-1 b) of theorem 1, in the unit of z squared. NaN for a layer without bias.
        dead_fraction: share of units with E[delta^2] < 1e-12; they are in no median but this.
        units: number of units.
        solved: number of live units for which a linear system was solved; medians of natural quantities are over them.
        rows: number of rows (examples, times positions of a convolution) that were used.
        iterations: of conjugate gradients; 0 for a direct solve.
        residual: largest relative residual of conjugate gradients, 0 for a direct solve.
        per_unit: tensors by name, where asked for: ``unit`` [solved] (their numbers), ``shift_fraction`` [units],
            ``c`` [units], and ``shift_fraction_natural``, ``cos_natural``, ``k``, ``s`` [solved].
    """

    mean_activation: float
    median_activation: float
    median_abs_mean: float
    mean_ratio: float
    shift_fraction: float
    shift_fraction_natural: float
    cos_natural: float
    k: float
    s: float
    dead_fraction: float
    units: int
    solved: int
    rows: int
    iterations: int = 0
    residual: float = 0.0
    per_unit: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class BiasShiftReport:
    """One measurement of `BiasShiftProbe`.

    Args:
        fisher: ``"model"`` or ``"empirical"``.
        damping: that was used.
        loss: mean loss on the batch.
        layers: results by layer name, in the order of the model; ``report["fc3"]`` is ``report.layers["fc3"]``.
    """

    fisher: str
    damping: float
    loss: float
    layers: Mapping[str, LayerShift]

    def __getitem__(self, layer: str) -> LayerShift:
        """The result of one layer.

        Raises:
            KeyError: if there is no such layer; the message lists those there are.
        """
        if layer not in self.layers:
            raise KeyError(
                f"there is no layer {layer!r} in this report. Its layers are {', '.join(self.layers)}."
            )
        return self.layers[layer]

    def table(self) -> str:
        """A table of plain text, one line per layer, medians over units."""
        head = ("layer", *(title for title, _ in _COLUMNS), "solved")
        lines = [
            (name, *(f"{getattr(each, key):.3g}" for _, key in _COLUMNS), f"{each.solved}/{each.units}")
            for name, each in self.layers.items()
        ]
        widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                text.rjust(width) if column else text.ljust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *lines)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings by layer, ready for JSON; tensors of ``per_unit`` become lists."""
        return {
            "fisher": self.fisher,
            "damping": self.damping,
            "loss": self.loss,
            "layers": {name: _plain(each) for name, each in self.layers.items()},
        }


def _plain(layer: LayerShift) -> dict[str, Any]:
    units = layer.per_unit
    row = {key: value for key, value in asdict(layer).items() if key != "per_unit"}
    if units is not None:
        row["per_unit"] = {name: tensor.tolist() for name, tensor in units.items()}
    return row


def median_variance(reports: Iterable[BiasShiftReport]) -> dict[str, float]:
    """Variance over training of the median incoming activation, by layer (appendix C of the paper).

    Args:
        reports: measurements of one model at several steps, at least two.

    Returns:
        Population variances by the name of every layer that all reports hold.

    Raises:
        ValueError: if there are fewer than two reports.
    """
    seen = [instance("reports", each, BiasShiftReport) for each in reports]
    if len(seen) < 2:
        raise ValueError(
            f"reports must hold at least 2 measurements, got {len(seen)}. Measure at several steps."
        )
    return {
        name: statistics.pvariance([each.layers[name].median_activation for each in seen])
        for name in seen[0].layers
        if all(name in each.layers for each in seen)
    }


# --- numbers ----------------------------------------------------------------------------------------------------

DEAD = 1e-12
"""A unit whose mean squared derivative is below this is dead: it takes no part."""

Solve = Callable[[WeightedGrams, Tensor], Solved]


@dataclass(frozen=True)
class Natural:
    """Solutions for some units.

    Args:
        units: their numbers, [u].
        step: unit natural gradient (w, w0), [u, n + bias], float64.
        shift: shift fraction of that step, [u].
        cos: cosine with the gradient, [u].
        k: theorem 2's multiplier, [u]; NaN without bias.
        s: theorem 1's s, [u]; NaN without bias.
    """

    units: Tensor
    step: Tensor
    shift: Tensor
    cos: Tensor
    k: Tensor
    s: Tensor
    iterations: int = 0
    residual: float = 0.0


def natural(
    signal: Signal, units: Tensor, c: Tensor, *, damping: float, bias: bool, solve: Solve, more: bool = True
) -> Natural:
    """Solve for ``units`` (live ones, ascending) with mean squared derivatives ``c`` [u], group by group.

    ``more`` False leaves shift, cosine, k and s out.
    """
    per_group = signal.delta.shape[1] // len(signal.rows)
    parts: list[tuple[Tensor, ...]] = []
    iterations, residual = 0, 0.0
    for group in torch.unique(units // per_group).tolist():
        inside = units // per_group == group
        mine, size = units[inside], c[inside]
        rows, delta = signal.rows[group], signal.delta[:, mine]
        fisher = WeightedGrams(rows, delta.square() / size.to(delta.dtype), damping=damping, bias=bias)
        g = signal.g[mine].to(torch.float64)
        if bias:
            g = torch.cat([g, signal.g0[mine, None].to(torch.float64)], 1)
        right = [g]
        if bias and more:
            last = torch.zeros_like(g)
            last[:, -1] = 1.0
            right.append(last)
        solved = solve(fisher, torch.stack(right))
        iterations, residual = max(iterations, solved.iterations), max(residual, solved.residual)
        parts.append(_numbers(rows, g, solved.x, size, bias=bias, more=more))
    step, shift, cos, k, s = (torch.cat(each) for each in zip(*parts, strict=True))
    return Natural(units, step, shift, cos, k, s, iterations, residual)


def _numbers(rows: Tensor, g: Tensor, x: Tensor, c: Tensor, *, bias: bool, more: bool) -> tuple[Tensor, ...]:
    r"""Step, shift fraction, cosine, k and s of the units of one group from ``x`` = (F/c)^-1 (gradient, e_0).

    With :math:`v = F^{-1} e_0 = s\,(-A^{-1} b,\,1)` theorem 2's multiplier is
    :math:`k = c\,s\,(1 - E_p[a]^T A^{-1} b) = c\,(E_p[a]^T v_w + v_0)`: no covariance has to be inverted.
    """
    step = x[0] / c[:, None]
    nan = torch.full_like(c, math.nan)
    if not more:
        return step, nan, nan, nan, nan
    cos = torch.nn.functional.cosine_similarity(g, step, dim=1, eps=0.0)
    mean, n = rows.mean(0).to(torch.float64), rows.shape[1]
    dz = rows @ (step / step.norm(dim=1, keepdim=True))[:, :n].T.to(rows.dtype)
    if bias:
        dz += (step[:, -1] / step.norm(dim=1)).to(rows.dtype)
    shift = shift_fraction(dz).to(torch.float64)
    if not bias:
        return step, shift, cos, nan, nan
    return step, shift, cos, x[1, :, :-1] @ mean + x[1, :, -1], x[1, :, -1] / c


def shift_fraction(dz: Tensor) -> Tensor:
    """(E dz)^2 / E dz^2 over the rows, [..., R, u] -> [..., u]; NaN where nothing moves."""
    return dz.mean(-2).square() / mean_square(dz)


def mean_square(values: Tensor) -> Tensor:
    """Mean square over the rows, [..., R, u] -> [..., u] in float64, without a copy of the values."""
    return torch.linalg.vector_norm(values, dim=-2).to(torch.float64).square() / values.shape[-2]


def live_units(signal: Signal) -> tuple[Tensor, Tensor]:
    """Numbers of the units with E[delta^2] >= 1e-12, ascending, and that mean."""
    c = mean_square(signal.delta)
    units = (c >= DEAD).nonzero()[:, 0]
    return units, c[units]


def measure(
    signal: Signal,
    *,
    damping: float,
    bias: bool,
    solve: Solve,
    max_units: int | None,
    seed: int,
    per_unit: bool,
) -> LayerShift:
    """All numbers of one layer; natural quantities for at most ``max_units`` live units, the same ones every time."""
    rows, m = signal.rows, signal.delta.shape[1]
    c = mean_square(signal.delta)
    alive = c >= DEAD
    order = torch.randperm(m, generator=generator("bias_shift.units", seed)).to(alive.device)
    units = order[alive[order]][:max_units].sort().values
    found = _none(rows.device) if len(units) == 0 else natural(
        signal, units, c[units], damping=damping, bias=bias, solve=solve
    )  # fmt: skip
    g = signal.g.unflatten(0, (len(rows), -1))
    dz = rows @ g.mT
    if bias:
        dz += signal.g0.view(len(rows), 1, -1)
    plain = torch.where(alive, shift_fraction(dz).flatten(), math.nan)
    means = rows.mean(1).to(torch.float64)
    power = torch.linalg.vector_norm(rows).to(torch.float64).square() / rows.shape[1]
    values = {"shift_fraction": plain, "c": c, "unit": found.units, "shift_fraction_natural": found.shift,
              "cos_natural": found.cos, "k": found.k, "s": found.s}  # fmt: skip
    return LayerShift(
        mean_activation=float(means.mean()),
        median_activation=median(means),
        median_abs_mean=median(means.abs()),
        mean_ratio=float((means.square().sum() / power).sqrt()) if float(power) > 0 else 0.0,
        shift_fraction=median(plain),
        shift_fraction_natural=median(found.shift),
        cos_natural=median(found.cos),
        k=median(found.k),
        s=median(found.s),
        dead_fraction=1.0 - float(alive.double().mean()),
        units=m,
        solved=len(units),
        rows=rows.shape[1],
        iterations=found.iterations,
        residual=found.residual,
        per_unit=values if per_unit else None,
    )


def unmeasured(units: int) -> LayerShift:
    """The row of a layer whose values are not finite."""
    return LayerShift(*[math.nan] * 10, units=units, solved=0, rows=0)


def median(values: Tensor) -> float:
    """Median of the entries that are numbers; NaN where there is none."""
    numbers = [value for value in values.flatten().tolist() if value == value]
    return statistics.median(numbers) if numbers else math.nan


def _none(device: torch.device) -> Natural:
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return Natural(torch.zeros(0, dtype=torch.int64, device=device), empty, empty, empty, empty, empty)
