"""Explicit Runge-Kutta methods of fixed steps, on several tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Method: TypeAlias = Literal["euler", "heun", "rk4"]
METHODS: tuple[Method, ...] = get_args(Method)
State: TypeAlias = Sequence[Tensor]
Slope: TypeAlias = Callable[[State, float], State]


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method (Butcher's notation).

    Args:
        order: of accuracy.
        nodes: c, where in the step a stage stands.
        stages: a, row i the weights of the earlier slopes in stage i.
        weights: b, the weights of all slopes in the step.
    """

    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUS: dict[Method, Tableau] = {
    "euler": Tableau(1, (0.0,), ((),), (1.0,)),
    "heun": Tableau(2, (0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau(
        4, (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
}


def runge_kutta_step(slope: Slope, state: State, s: float, t: float, method: Method) -> list[Tensor]:
    """One step of ``d state / d time = slope(state, time)`` from ``s`` to ``t``, forwards or backwards.

    Args:
        slope: takes the state and the time, gives tensors of the state's shapes; called once per stage.
        state: tensors; they are left as they are.
        s: time of ``state``.
        t: time of the result. The last stage of "heun" and "rk4" stands exactly there.
        method: one of `METHODS`.

    Returns:
        The state at ``t``.
    """
    tableau = TABLEAUS[method]
    slopes: list[State] = []
    for node, row in zip(tableau.nodes, tableau.stages, strict=True):
        time = t if node == 1.0 else s + node * (t - s)
        slopes.append(slope(_moved(state, slopes, row, t - s), time))
    return _moved(state, slopes, tableau.weights, t - s)


def _moved(state: State, slopes: Sequence[State], weights: Sequence[float], step: float) -> list[Tensor]:
    """State + step * sum_i weights_i slopes_i."""
    moved = list(state)
    fresh = False
    for weight, each in zip(weights, slopes, strict=True):
        if weight:
            if fresh:
                torch._foreach_add_(moved, list(each), alpha=step * weight)
            else:
                moved, fresh = list(torch._foreach_add(moved, list(each), alpha=step * weight)), True
    return moved


def integrate(
    slope: Slope, state: State, times: Sequence[float], method: Method, *, last: Method | None = None
) -> list[Tensor]:
    """Follow ``slope`` through ``times``.

    Args:
        slope: see `runge_kutta_step`.
        state: tensors at ``times[0]``.
        times: at least two, without repetitions.
        method: of all steps.
        last: of the last step, where the slope must not be asked for at ``times[-1]``: "euler".

    Returns:
        The state at ``times[-1]``.
    """
    moved, count = list(state), len(times) - 1
    for i in range(count):
        chosen = last if last is not None and i == count - 1 else method
        moved = runge_kutta_step(slope, moved, times[i], times[i + 1], chosen)
    return moved
