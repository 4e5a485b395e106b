"""What a gradient inversion gives back, at the end and on its way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from pullback.core.kinds.search import SearchResult


@dataclass(frozen=True)
class Reconstruction(SearchResult[Tensor]):
    """What an attack found.

    Args:
        value: best images, of ``input_shape``.
        status: ``"converged"`` when the loss fell below the tolerance, ``"max_steps"`` when budget or patience ended,
            ``"diverged"`` when a loss was not finite (``value`` is then the best iterate before it).
        steps: evaluations of the loss, of all restarts together.
        message: what happened.
        loss: the smallest loss, that of ``value``.
        labels: the labels that were used; soft ones [B, classes] if they were searched for.
        masks: dropout masks by call, empty where there are none; see ``pullback.methods.dia``.
        trace: per term of the loss the values at all iterations of the best restart, on the host: ``"loss"``,
            ``"match"``, ``"tv"``, perhaps more, and ``"lr"``.
        restart: which start was the best.
        restart_losses: smallest loss of every start.
        notes: what a reader should know, such as more unknowns than equations.
    """

    loss: float = math.inf
    labels: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)
    restart: int = 0
    restart_losses: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> Tensor:
        """The best images; the same as ``value``."""
        return self.value


@dataclass(frozen=True)
class Progress:
    """What a callback is given between two blocks of iterations.

    Args:
        restart: number of the start.
        step: iterations of this start so far.
        loss: smallest loss of this start so far.
        images: its images.
    """

    restart: int
    step: int
    loss: float
    images: Tensor
    _state: Callable[[], dict[str, Any]] = field(repr=False)

    def state_dict(self) -> dict[str, Any]:
        """All that ``reconstruct(..., resume=state)`` needs to go on from here, bit for bit: tensors, plain values."""
        return self._state()


Callback: TypeAlias = Callable[[Progress], bool | None]
"""Called every ``check_every`` iterations; True ends the attack."""
