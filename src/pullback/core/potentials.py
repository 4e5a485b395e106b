"""Activations with what an energy needs: G whose derivative inverts sigma, and the slope of sigma."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """sigma and what belongs to it.

    Args:
        call: sigma(u).
        potential: G(s) with G' the inverse of sigma, elementwise.
        slope: sigma'(u) as a function of s = sigma(u).
        curvature: a where G(s) = a s^2 / 2 inside the bounds; None for another G.
        bounds: interval of the states, where sigma clips.
    """

    call: Callable[[Tensor], Tensor]
    potential: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: float | None = None
    bounds: tuple[float, float] | None = None


def _xlogx(s: Tensor) -> Tensor:
    return s * s.log() if s.is_complex() else -torch.special.entr(s)


def _clipped(a: float) -> Activation:
    """clip(u / a, 0, 1)."""
    return Activation(
        call=(lambda u: u.clamp(0.0, 1.0)) if a == 1.0 else (lambda u: (u / a).clamp(0.0, 1.0)),
        potential=lambda s: 0.5 * a * s * s,
        slope=lambda s: ((s > 0.0) & (s < 1.0)).to(s.dtype) / a,
        curvature=a,
        bounds=(0.0, 1.0),
    )


ACTIVATIONS: dict[str, Activation] = {
    "hard_sigmoid": _clipped(1.0),
    "half_hard_sigmoid": _clipped(2.0),
    "sigmoid": Activation(
        call=lambda u: torch.sigmoid(4.0 * u - 2.0),
        potential=lambda s: 0.5 * s + 0.25 * (_xlogx(s) + _xlogx(1.0 - s)),
        slope=lambda s: 4.0 * s * (1.0 - s),
    ),
    "tanh": Activation(
        call=torch.tanh,
        potential=lambda s: 0.5 * (_xlogx(1.0 + s) + _xlogx(1.0 - s)),
        slope=lambda s: 1.0 - s * s,
    ),
    "identity": Activation(
        call=lambda u: u, potential=lambda s: 0.5 * s * s, slope=torch.ones_like, curvature=1.0
    ),
}
"""clip(u, 0, 1), clip(u/2, 0, 1), 1/(1 + exp(2 - 4u)), tanh(u), u. The last three are holomorphic."""

ActivationName: TypeAlias = Literal["hard_sigmoid", "half_hard_sigmoid", "sigmoid", "tanh", "identity"]
